"""What can be told without a model's weights is refused before they are read, which takes minutes for a large one."""

import json
from pathlib import Path

import pytest
from helpers.tiny_model import save_tiny_model

from quasar_cli.main import run

pytest_plugins = ["helpers.cli_fixtures"]
pytestmark = pytest.mark.usefixtures("own_home")

GENERATE = ["generate", "--prompt", "abc", "-n", "2", "--verify", "full", "--model", "tiny"]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A model in the working folder."""
    return save_tiny_model(tmp_path / "tiny")


@pytest.mark.parametrize("content", ["{", '{"tokenizer_class": 3}', '{"tokenizer_class": "NobodyHasIt", "x": '])
def test_a_broken_tokenizer_is_refused_before_the_weights_are_read(
    tiny: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny / "tokenizer_config.json").write_text(content)
    assert run(GENERATE) == 1
    said = capsys.readouterr().err
    assert "tokenizer" in said
    assert "reading weights" not in said


@pytest.mark.usefixtures("tiny")
def test_a_kernel_that_is_not_there_is_refused_before_the_weights_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*GENERATE, "--kernel", "nobody-has-it"]) == 2
    said = capsys.readouterr().err
    assert "--kernel must be one of auto, " in said
    assert "reading weights" not in said


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("options", "holds"),
    [([], "the model's context holds 128."), (["--max-context", "64"], "--max-context allows holds 64.")],
)
def test_a_prompt_that_is_too_long_is_refused_before_the_weights_are_read(
    options: list[str], holds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    long = ["generate", "--prompt", "x" * 200, "--raw", "--verify", "full", "--model", "tiny"]
    assert run([*long, *options]) == 2
    said = capsys.readouterr().err
    assert "The prompt has 200 tokens, and " in said
    assert holds in said
    assert "reading weights" not in said


@pytest.mark.usefixtures("tiny")
def test_questions_that_are_all_too_long_are_refused_before_the_weights_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"question_id": length, "category": "a", "turns": ["x" * length]} for length in (300, 200)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(["bench", "--dataset", "long.jsonl", "--arms", "vanilla", "--model", "tiny"]) == 2
    said = capsys.readouterr().err
    assert "The prompt has 2" in said
    assert "reading weights" not in said


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("most", "times"), [("4096", 1), ("128", 0), ("64", 0)])
def test_a_context_that_is_cut_is_said(most: str, times: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*GENERATE, "--max-context", most]) == 0
    note = f"context: cut to the 128 tokens that the model was made for; --max-context asks for {most}"
    assert capsys.readouterr().err.count(note) == times
