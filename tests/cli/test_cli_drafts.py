"""The options that say what drafts are made from, and what is shown of it; models are stand-ins."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import stand_ins
from helpers.stand_ins import StandInGenerator

from quasar_cli.main import run
from quasar_core.config import GenerationConfig
from quasar_core.records import Piece, Step

pytest_plugins = ["helpers.cli_fixtures"]
pytestmark = pytest.mark.usefixtures("own_home", "stand_in_pair")


@pytest.fixture
def asked(stand_in_pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> list[GenerationConfig]:
    """The configs that generators were made with."""
    seen: list[GenerationConfig] = []

    class Watched(StandInGenerator):
        def __init__(self, pair: Any, config: GenerationConfig, progress: Any) -> None:
            seen.append(config)
            super().__init__(pair, config)

    monkeypatch.setattr("quasar_core.api.decoding.Generator", Watched)
    return seen


def test_a_prediction_is_read_from_its_file(asked: list[GenerationConfig], tmp_path: Path) -> None:
    (tmp_path / "old.py").write_text("a = 1\n")
    assert run(["generate", "x", "--prediction", str(tmp_path / "old.py")]) == 0
    assert asked[0].prediction == "a = 1\n"
    assert asked[0].draft == "auto"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--prediction", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--prediction", "binary"], "binary is not UTF-8 text"),
        (["--draft", "nothing-such"], "--draft must be one of auto, none, ngram, suffix"),
        (["--draft", "none", "--draft-from", "text"], "--draft-from is what drafts are made from"),
        (["--draft", "none", "--prediction", "text"], "--prediction is what drafts are made from"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(
    options: list[str], why: str, asked: list[GenerationConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "text").write_text("some text")
    assert run(["generate", "x", *options]) == 2
    assert why in capsys.readouterr().err
    assert not asked


def test_statistics_tell_what_each_drafter_did(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [Step(4, 3, [Piece("prediction", 3, 2), Piece("suffix", 1, 2)]), Step(0, 0)]
    monkeypatch.setattr(stand_ins, "STATS", replace(stand_ins.STATS, step_log=steps))
    assert run(["generate", "x"]) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "prediction 2 of 2 draft tokens in 1 step" in shown
    assert "suffix 1 of 2 draft tokens in 1 step" in shown
    assert run(["generate", "x", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["stats"]["drafters"]["suffix"] == {"steps": 1, "drafted": 2, "accepted": 1}


def test_the_help_lists_the_drafters(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["generate", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "auto|none|ngram|suffix" in shown
    assert "--draft-from" in shown
    assert "--prediction" in shown
