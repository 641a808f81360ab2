"""Compile the C++ that tests run: `python tests/compile_ahead.py`, where filelock is installed.

PyTorch is not needed, so this goes on beside its installation. The libraries lie where QUASAR_TEST_COMPILED says. What
is there already is kept, and what cannot be compiled is left to the tests, which fail or skip with the reason.
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from helpers.trapped_tiles import without_tiles  # noqa: E402

from quasar_core.errors import QuasarError  # noqa: E402
from quasar_core.kernels.cpu import build, forms, library  # noqa: E402


def forms_of_tests() -> list[forms.Chosen]:
    """Every form that this processor runs, the best first, and AMX's where its tiles can be emulated."""
    found = []
    for form in forms.usable():
        os.environ[forms.VARIABLE] = form.name
        found.append(forms.chosen())
    tiles = forms.find_form("amx")
    if found[0].form != tiles and forms.why_not(without_tiles(tiles)) is None:
        found.append(forms.Chosen(tiles, (), "emulated"))
    return found


def compile_one(source: str, form: forms.Chosen) -> None:
    """One library."""
    try:
        library.shared_library(build.HERE / f"{source}.cpp", form)
    except QuasarError as error:
        print(f"{source} for {form.form.title} is not compiled ahead: {error}", file=sys.stderr)


def main() -> None:
    """See the module's text."""
    os.environ["QUASAR_HOME"] = os.environ["QUASAR_TEST_COMPILED"]
    found = forms_of_tests() if platform.system() == "Linux" else []  # elsewhere PyTorch tells what a processor has
    wanted = [(build.PASS, form) for form in found] + [(build.SOLVER, form) for form in found[:1]]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda one: compile_one(*one), wanted))


if __name__ == "__main__":
    main()
