"""What a chat says of itself."""

import pytest
from helpers.stand_ins import type_lines

from quasar_cli.commands.chat import HELP
from quasar_cli.main import run

pytest_plugins = ["helpers.cli_fixtures"]
pytestmark = pytest.mark.usefixtures("own_home")


def test_the_help_of_a_chat_is_whole_in_a_narrow_terminal() -> None:
    assert max(map(len, HELP.splitlines())) <= 60


@pytest.mark.usefixtures("stand_in_pair")
def test_one_turn_is_counted_as_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    type_lines(monkeypatch, "/drop\none\n/drop 9\n")
    run(["chat"])
    said = capsys.readouterr().err
    assert "Error: There is no turn to forget.\n" in said
    assert "Error: There is one turn to forget.\n" in said
