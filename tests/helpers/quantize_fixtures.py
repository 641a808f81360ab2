"""Fixtures of the tests of quantizing: a tiny model, short texts."""

from pathlib import Path

import pytest
from helpers.quantize_cases import save_model

from quasar_core.quantize import calibration


@pytest.fixture
def small_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and short rows of held-out and greedy text."""
    monkeypatch.setattr(calibration, "HELD_OUT_ROWS", 3)
    monkeypatch.setattr(calibration, "GREEDY_LENGTH", 40)


@pytest.fixture
def source(tmp_path: Path, small_texts: None) -> Path:
    """A tiny model's folder, head and embedding apart."""
    return save_model(tmp_path / "tiny", tied=False)
