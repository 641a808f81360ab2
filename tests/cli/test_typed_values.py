"""Values that cannot be, of every option and argument there is: each is refused by its name, before any work."""

from collections.abc import Iterator
from typing import Any

import pytest
import typer

from quasar_cli.help import TEXTS
from quasar_cli.main import app, run

pytestmark = pytest.mark.usefixtures("own_home")
pytest_plugins = ["helpers.cli_fixtures"]


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command below one, by the words that call it."""
    if path:
        yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*path, name))


def named_values() -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Every command's options and arguments that take a value: its words, the name, and the type as help has it."""
    for path, command in commands(typer.main.get_command(app)):
        context = command.make_context(path[-1], [], resilient_parsing=True)
        for parameter in command.get_params(context):
            record = parameter.get_help_record(context)
            if parameter.param_type_name == "argument":
                yield path, parameter.metavar, ""
            elif record is not None and not parameter.is_flag:
                yield path, parameter.opts[0], record[0].split()[-1]


VALUES = list(named_values())
EMPTY = [(path, name) for path, name, _ in VALUES if name not in TEXTS]
NUMBERS = [(path, name, kind) for path, name, kind in VALUES if kind.strip("<>").lower() in ("int", "integer", "float")]


def words(value: str | tuple[str, ...]) -> str:
    """How a case is called."""
    return value if isinstance(value, str) else "-".join(value)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command says that ends in the exit code of wrong usage."""
    assert run(arguments) == 2
    said = capsys.readouterr()
    assert not said.out
    return said.err


def test_all_commands_are_asked() -> None:
    assert {path[0] for path, _ in EMPTY} >= {"quantize", "generate", "chat", "serve", "deploy", "bench", "models"}
    assert len(EMPTY) > 150
    assert len(NUMBERS) > 40


@pytest.mark.parametrize(("path", "name"), EMPTY, ids=words)
@pytest.mark.parametrize("empty", ["", " "], ids=["empty", "blank"])
def test_an_empty_value_is_refused_by_its_name(
    path: tuple[str, ...], name: str, empty: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = ["some"] * ((path, name) == (("models", "push"), "REPO"))
    given = [name, empty] if name.startswith("-") else [*before, empty]
    said = f"Error: {name} must not be empty; see quasar {' '.join(path)} --help.\n"
    assert refusal(capsys, *path, *given) == said


def test_an_empty_one_among_several_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, "generate", "abc", "--draft-from", "a.txt", "--draft-from", "")
    assert said == "Error: --draft-from must not be empty; see quasar generate --help.\n"
    assert "must not be empty; see quasar bench compare --help." in refusal(capsys, "bench", "compare", "a.json", "")


def test_options_of_the_short_form_are_refused_by_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--output must not be empty" in refusal(capsys, "models", "export", "-o", "")


def test_texts_may_be_empty(capsys: pytest.CaptureFixture[str]) -> None:
    assert "The prompt is empty." in refusal(capsys, "generate", "")
    assert "The prompt is empty." in refusal(capsys, "generate", "--prompt", "")
    assert "No pair is current" in refusal(capsys, "generate", "abc", "--system", "")


@pytest.mark.parametrize(("path", "name", "kind"), NUMBERS, ids=words)
def test_what_is_no_number_is_refused_with_the_value(
    path: tuple[str, ...], name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = "a number" if "float" in kind.lower() else "a whole number"
    assert refusal(capsys, *path, name, "many") == f"Error: {name} must be {wanted}, not many.\n"
