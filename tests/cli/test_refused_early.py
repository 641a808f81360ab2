"""What can be told without a model's weights is refused before they are read, which takes minutes for a large one."""

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
