"""The README's commands work: those marked to run are run, the others must name options that exist."""

import re
import shlex
from pathlib import Path

import click
import pytest
import typer

from quasar_cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^(<!-- run -->\n)?```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = [(bool(run), line) for run, block in BLOCK.findall(README) for line in block.splitlines() if line.strip()]
TO_RUN = [line for run, line in COMMANDS if run]
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
    assert program == "quasar"
    command, rest = find_command(arguments)
    assert command is not typer.main.get_command(main.app), "no such command"
    command.make_context(" ".join(arguments), list(rest))


@pytest.mark.skipif(not MODEL.exists(), reason="the demo model is not in this checkout")
def test_the_commands_marked_to_run_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for line in TO_RUN:
        program, *arguments = shlex.split(line)
        assert program == "quasar", f"only quasar commands are run: {line}"
        code = main.run(arguments)
        printed = capsys.readouterr()
        assert code == 0, f"{line}\n{printed.err}"
        assert printed.out + printed.err, f"{line} printed nothing"
    assert (tmp_path / "results.json").exists()
