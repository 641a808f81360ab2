"""Fixtures of the command line's tests: an empty folder, loading and quantizing replaced by stand-ins."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.stand_ins import FIDELITY, StandInGenerator, encode

from quasar_core.config import LoadOptions
from quasar_core.records import Progress, QuantizeReport


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working folder, no colours."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def stand_in_pair(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in pair; `asked` holds the LoadOptions."""
    loaded = SimpleNamespace(
        target_name="demo",
        verifier_name="demo-gptq-4bit-g128",
        tokenizer=None,
        fidelity=FIDELITY,
        notes=["dtype: why"],
        rounds_alike=True,
    )

    def load(options: LoadOptions, progress: Progress, encode: Any = None) -> SimpleNamespace:
        progress("loading", 0, 1)
        loaded.asked = options
        return loaded

    monkeypatch.setattr("quasar_core.api.decoding.load", load)
    monkeypatch.setattr("quasar_core.api.decoding.Generator", StandInGenerator)
    monkeypatch.setattr("quasar_core.api.decoding.encode_prompt", encode)
    return loaded


@pytest.fixture
def stand_in_quantize(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What quantizing.quantize was called with; it returns a report written by hand."""
    asked: dict[str, Any] = {}
    report = QuantizeReport(
        checkpoint="/models/demo-gptq-4bit-g128",
        target="demo",
        config={"bits": 4},
        bytes_before=16_400_000_000,
        bytes_after=6_100_000_000,
        bits_per_weight=4.15,
        layer_errors={"layers.0.up_proj": 0.01, "layers.1.up_proj": 0.02},
        seconds={"calibration text": 12.0, "total": 14.5},
        fidelity=FIDELITY,
    )

    def quantize(model: str, config: Any, **options: Any) -> QuantizeReport:
        asked.update(model=model, config=config, **options)
        options["progress"]("layers", 0, 2)
        return report

    monkeypatch.setattr("quasar_core.api.quantizing.quantize", quantize, raising=False)
    return asked
