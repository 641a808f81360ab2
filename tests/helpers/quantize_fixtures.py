"""Fixtures of the tests of quantizing: a tiny model, short texts."""

from pathlib import Path

import pytest
from helpers.quantize_cases import save_model, shorten_texts


@pytest.fixture
def small_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and short rows of held-out and greedy text."""
    shorten_texts(monkeypatch)


@pytest.fixture
def source(tmp_path: Path, small_texts: None) -> Path:
    """A tiny model's folder, head and embedding apart."""
    return save_model(tmp_path / "tiny", tied=False)
