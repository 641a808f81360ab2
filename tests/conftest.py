"""What every test starts from, so that none depends on the machine, on its user's files or on the tests before it.

`tests/machines.py` varies it: OMP_NUM_THREADS is the number of threads, QUASAR_TEST_DENORMALS=flush flushes denormals,
QUASAR_TEST_LACKS names what this processor is taken not to have, QUASAR_TEST_COMPILED the folder in which the C++ of
several runs is compiled. QUASAR_TEST_EMULATED is a command that runs the C++ of passes and products for another
processor (`tests/neon.py`). C++ that a compiler refuses fails its tests; with QUASAR_TEST_COMPILES=1 so does C++ that
does not run for another reason (`sanitized.py`).
"""

import gc
import os
import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # several threads on cores that other tests use
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, here and in processes that tests start
os.environ["TOKENIZERS_PARALLELISM"] = "false"
HERE = Path(__file__).parent
os.environ["PYTHONPATH"] = f"{HERE.parent}{os.pathsep}{HERE}"  # processes that tests start run this checkout
os.environ["QUASAR_HOME"] = os.path.join(os.devnull, "home")  # nothing can be written while tests are collected
FLUSHES = os.environ.get("QUASAR_TEST_DENORMALS") == "flush"

if find_spec("hypothesis"):  # which `make interop` does without
    from hypothesis import settings

    settings.register_profile("quasar", deadline=None, derandomize=True, database=None)
    settings.load_profile("quasar")


def pytest_configure(config: pytest.Config) -> None:
    """Tests of a GPU run beside no file that has its kernels interpreted."""
    if config.option.markexpr == "gpu":
        os.environ["QUASAR_TEST_GPU"] = "1"


def pytest_collection() -> None:
    """Nothing of what importing makes is garbage; to look through it took a sixth of collecting tests."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Collecting tests compiles nothing: a file that asks for a library while it is imported is a defect.

    So is one that imports Triton's kernels before they are to run interpreted: no later file could have them so.
    """
    gc.freeze()  # what importing made is not looked through while tests run either
    gc.enable()
    for name in ("quasar_core.kernels.cpu.library", "quasar_core.quantize.solve.cpp"):
        module = sys.modules.get(name)
        if module is not None and module._why_not_in.cache_info().currsize:
            raise pytest.UsageError(f"a test asks {name} for its library while it is collected: ask in a fixture")
    kernels = sys.modules.get("quasar_core.kernels.triton.language")
    if kernels is not None and not kernels.INTERPRETED.value and "QUASAR_TEST_GPU" not in os.environ:
        raise pytest.UsageError("a test imports Triton's kernels for a GPU: import helpers.interpreted before them")


@pytest.fixture(scope="session", autouse=True)
def _session_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The home of what modules share; and Matplotlib's."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("session")
        patch.setenv("QUASAR_HOME", str(folder / "home"))
        patch.setenv("MPLCONFIGDIR", str(folder / "matplotlib"))
        yield folder


@pytest.fixture(autouse=True)
def _same_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home of its own, `home` in the test's folder, which is not there yet; threads, seeds and denormals."""
    monkeypatch.setenv("QUASAR_HOME", str(tmp_path / "home"))
    random.seed(0)
    if find_spec("torch"):
        import torch

        # torch.manual_seed keeps a stack trace of each call for GPUs that are not in use yet
        (torch.manual_seed if torch.cuda.is_initialized() else torch.default_generator.manual_seed)(0)
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        torch.set_flush_denormal(FLUSHES)
    if threads := sys.modules.get("quasar_core.kernels.threads"):  # where a test chose a number, the next has none
        for name in ("steering", "own", "set"):
            monkeypatch.setattr(threads._Choice, name, None)
    if estimate := sys.modules.get("quasar_core.quantize.estimate"):  # of what a run takes: no test asks how long
        monkeypatch.setattr(estimate, "MEASURED_SECONDS", 0.01)
    if records := sys.modules.get("quasar_core.decode.costs.cost_records"):  # nor how long a pass takes
        monkeypatch.setattr(records, "SECONDS", 0.05)
        monkeypatch.setattr(records, "SLOPE_SECONDS", 0.02)
    if steps := sys.modules.get("quasar_core.bench.steps"):  # nor how fast memory is
        monkeypatch.setitem(steps.PROBE_BYTES, "cpu", 4_000_000)


@pytest.fixture(scope="session", autouse=True)
def _commands_freeze_nothing() -> Iterator[None]:
    """A command tells the collector to leave alone what it loaded; here later tests need that memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "freeze", lambda: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _command_line_once() -> Iterator[None]:
    """Typer makes all commands anew whenever one is run; here they are made once."""
    if not find_spec("typer"):
        yield
        return
    import typer.main
    import typer.testing

    made = cache(typer.main.get_command)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", made)
        patch.setattr(typer.testing, "_get_command", made, raising=False)
        yield


@pytest.fixture(scope="session")
def _compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home in which libraries of C++ are compiled: that of all the processes of a run, or of several runs."""
    if shared := os.environ.get("QUASAR_TEST_COMPILED"):
        return Path(shared)
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "compiled"


@pytest.fixture(scope="session", autouse=True)
def _compiled_once(_compiled: Path) -> Iterator[None]:
    """Compiles the package's C++ once in a run, whatever test asks for it first, and not in that test's home."""
    if not find_spec("torch"):
        yield
        return
    from quasar_core.kernels.cpu import library
    from quasar_core.quantize.solve import cpp

    def there(load: Any) -> Any:
        @cache
        def load_there(form: Any) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(library, "home", lambda: _compiled)
                return load(form)

        load_there.__wrapped__ = load.__wrapped__  # what loads in the home of the test that takes it
        return load_there

    with pytest.MonkeyPatch.context() as patch:
        for module in (library, cpp):
            patch.setattr(module, "_library_in", there(module._library_in))
        yield


@pytest.fixture
def compiled_at_home(tmp_path: Path, _compiled: Path) -> None:
    """What is compiled of the C++ lies in the test's home too, for processes that the test starts."""
    from quasar_core.kernels.cpu import library
    from quasar_core.quantize.solve import cpp

    obstacles = [module.why_not_here() for module in (library, cpp)]  # compiles both
    if any(obstacles):
        return
    unfinished = shutil.ignore_patterns("building-*", ".*.lock")  # of libraries that are compiled meanwhile
    shutil.copytree(_compiled / "kernels", tmp_path / "home" / "kernels", ignore=unfinished)


@pytest.fixture(scope="session")
def _lacking() -> Iterator[None]:
    """Takes off what this processor is not to have."""
    lacks = frozenset(filter(None, os.environ.get("QUASAR_TEST_LACKS", "").split(",")))
    if not lacks:
        yield
        return
    from quasar_core.kernels.cpu import forms

    has = forms.processor_flags()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms, "processor_flags", lambda: has - lacks)
        yield


@pytest.fixture(scope="session", autouse=True)
def _emulated(_compiled_once: None) -> Iterator[None]:
    """Lets another processor's C++ stand for this one's, where that is asked for."""
    if not (command := os.environ.get("QUASAR_TEST_EMULATED")):
        yield
        return
    from helpers.emulated import Emulated

    from quasar_core.kernels.cpu import library

    emulated = Emulated(command.split())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "_library_in", lambda form: emulated)
        patch.setattr(library, "_why_not_in", lambda form: None)
        yield


@pytest.fixture(scope="session")
def cpp_pass(_lacking: None) -> None:
    """Skips where the C++ library of passes and products does not run; compiles it, once."""
    from quasar_core.kernels.cpu import library

    _skip_without(library, "the C++ pass")


@pytest.fixture(scope="session")
def cpp_solver(_lacking: None) -> None:
    """Skips where the quantizer's loops in C++ do not run; compiles them, once."""
    from quasar_core.quantize.solve import cpp

    _skip_without(cpp, "the solver in C++")


@pytest.fixture(scope="session")
def tile_traps(_compiled: Path) -> Any:
    """What has instructions of AMX's tiles emulated; skips where that cannot be."""
    if sys.platform != "linux":
        pytest.skip("AMX's tiles are emulated on Linux alone")
    from helpers.trapped_tiles import load

    from quasar_core.errors import QuasarError
    from quasar_core.kernels.cpu import library

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "home", lambda: _compiled)
        try:
            return load()
        except QuasarError as error:
            pytest.skip(f"AMX's tiles are not emulated: {error}")


@pytest.fixture
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, _lacking: None) -> Iterator[str]:
    """QUASAR_ISA=amx: with the processor's tiles, "real", or where those are not to be had "emulated"."""
    from helpers.trapped_tiles import without_tiles

    from quasar_core.kernels.cpu import forms, library

    own, kind = forms.find_form("amx"), "real"
    with ExitStack() as ends:
        if forms.why_not(own):
            patched, kind = without_tiles(own), "emulated"
            if obstacle := forms.why_not(patched):
                pytest.skip(f"AMX's tiles are not emulated here: {obstacle}")
            traps = request.getfixturevalue("tile_traps")
            monkeypatch.setattr(forms, "FORMS", tuple(patched if form is own else form for form in forms.FORMS))
            traps.catch_tiles()
            ends.callback(traps.let_tiles_go)
        ends.callback(forms._chosen.cache_clear)
        monkeypatch.setenv(forms.VARIABLE, "amx")
        _skip_without(library, f"the C++ pass with {kind} tiles")
        if not library.describe_form().startswith(own.title):
            pytest.skip("this compiler does not know AMX")
        yield kind


@pytest.fixture(params=["avx512", "amx", "avx2", "neon", "portable"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, _lacking: None) -> str:
    """Each instruction set in turn for the C++ of passes and products; those that do not run here are skipped."""
    from quasar_core.kernels.cpu import library
    from quasar_core.kernels.cpu.forms import VARIABLE, find_form, usable, why_not

    if "QUASAR_TEST_EMULATED" in os.environ and request.param != usable()[0].name:
        pytest.skip("another processor's C++ stands for every form, and runs as the best one's")
    if request.param != os.environ.get(VARIABLE, request.param):
        pytest.skip(f"this machine is one of {os.environ[VARIABLE]}")
    if request.param == "amx":
        request.getfixturevalue("tiles")
    if obstacle := why_not(find_form(request.param)):
        pytest.skip(obstacle)
    monkeypatch.setenv(VARIABLE, request.param)
    _skip_without(library, f"the C++ pass for {request.param}")
    return str(request.param)


def _skip_without(module: ModuleType, what: str) -> None:
    """Load a module's library, compiled where it was not asked for yet; what a compiler refuses is a failure."""
    if reason := module.why_not_here():
        must_run = "could not compile" in reason or os.environ.get("QUASAR_TEST_COMPILES") == "1"
        (pytest.fail if must_run else pytest.skip)(f"{what}: {reason}")


@pytest.fixture(scope="module", params=["C++", "PyTorch"])
def solver(request: pytest.FixtureRequest) -> Iterator[str]:
    """The quantizer's inner loops both ways; those in C++ only where they run."""
    from quasar_core.quantize.solve import cpp

    with pytest.MonkeyPatch.context() as patch:
        if request.param == "C++":
            request.getfixturevalue("cpp_solver")
        else:
            patch.setattr(cpp, "runs", lambda tensor: False)
        yield request.param
