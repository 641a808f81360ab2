"""The README's commands work: those marked to run are run, the others must name options that exist.

So do the Python blocks of the README and of docs/library.md, with the pair that the commands have made.
"""

import dataclasses
import inspect
import re
import shlex
from pathlib import Path

import click
import pytest
import typer

from quasar_cli import main
from quasar_core.api import decoding, quantizing
from quasar_core.config import GenerationConfig, QuantizeConfig, SamplingConfig

pytest_plugins = ["helpers.quantize_fixtures"]
ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^(<!-- run -->\n)?```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = [(bool(run), line) for run, block in BLOCK.findall(README) for line in block.splitlines() if line.strip()]
TO_RUN = [line for run, line in COMMANDS if run]
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LIBRARY = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
MODEL = ROOT / "quasar_core" / "demo" / "model" / "model.safetensors"


def find_command(arguments: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the words lead to, and the arguments left for it."""
    command = typer.main.get_command(main.app)
    while arguments and arguments[0] in getattr(command, "commands", {}):
        command, arguments = command.commands[arguments[0]], arguments[1:]
    return command, arguments


def test_the_readme_has_commands_to_run() -> None:
    verbs = {shlex.split(line)[1] for line in TO_RUN}
    assert {"quantize", "generate", "bench"} <= verbs


@pytest.mark.parametrize("line", [line for _, line in COMMANDS])
def test_every_command_exists(line: str) -> None:
    program, *arguments = shlex.split(line)
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(arguments) <= set(targets)
        return
    if line == "pip install .":
        return
    assert program == "quasar"
    command, rest = find_command(arguments)
    assert command is not typer.main.get_command(main.app), "no such command"
    command.make_context(" ".join(arguments), list(rest))


@pytest.mark.usefixtures("small_texts")
@pytest.mark.skipif(not MODEL.exists(), reason="the demo model is not in this checkout")
def test_the_commands_marked_to_run_and_the_python_blocks_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _run_commands(capsys)
    assert (tmp_path / "results.json").exists()
    for page in (README, LIBRARY):
        _run_blocks(page)
    printed = capsys.readouterr().out
    assert "count_lines" in printed
    assert "--temperature must be from 0 to 100" in printed
    assert "\nTrue\n" in printed, "the first turn of a conversation is the answer to its message alone"


def _run_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for line in TO_RUN:
        program, *arguments = shlex.split(line)
        assert program == "quasar", f"only quasar commands are run: {line}"
        code = main.run(arguments)
        printed = capsys.readouterr()
        assert code == 0, f"{line}\n{printed.err}"
        assert printed.out + printed.err, f"{line} printed nothing"


def _run_blocks(page: str) -> None:
    """Run the Python blocks of a page in turn, in one namespace."""
    names: dict[str, object] = {}
    blocks = PYTHON.findall(page)
    assert blocks
    for block in blocks:
        exec(block, names)


PAGES = sorted((ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_docs_exist(page: Path) -> None:
    """Those in code spans and in blocks, but for forms such as `FOLDER|HUB-ID` and `…`."""
    text = re.sub(r"(?<=\S)\n(?=\S)", " ", page.read_text(encoding="utf-8"))
    for line in re.findall(r"`(quasar [^`]*)`", text):
        if not re.search(r"[|…\[]", line):
            arguments = shlex.split(line)[1:]
            command, rest = find_command(arguments)
            if command is not typer.main.get_command(main.app) and rest:
                command.make_context(" ".join(arguments), list(rest), resilient_parsing="MODEL" not in line)


def test_the_library_page_names_every_option() -> None:
    fields = {f.name for c in (GenerationConfig, SamplingConfig) for f in dataclasses.fields(c)} - {"sampling"}
    loading = set(inspect.signature(decoding.load_pair).parameters) - {"options"}
    options = {f.name for f in dataclasses.fields(QuantizeConfig)} - {"mean_bits"} | {"mixed"}
    options |= set(inspect.signature(quantizing.quantize).parameters) - {"model", "config"}
    missing = {name for name in fields | loading | options if f"`{name}" not in LIBRARY and f"{name}=" not in LIBRARY}
    assert not missing
