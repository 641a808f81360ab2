"""What the measurement of quantizing prints, on a tiny model."""

import os
from pathlib import Path

import pytest

from tools.measure_quantize import main

pytest_plugins = ["helpers.quantize_fixtures"]


def test_stages_fidelity_and_the_estimate_are_printed(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = os.environ.get("QUASAR_HOME")
    main([str(source), "--samples", "4", "--seq-len", "16"])
    shown = capsys.readouterr().out
    stages = ("calibration text", "quantizing", "fidelity", "whole", "the dry run said", "KL ", "quasar's own decoder")
    assert all(word in shown for word in stages)
    assert os.environ.get("QUASAR_HOME") == home


def test_both_ways_of_writing_are_timed(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(source), "--text-only", "--rows", "3", "--seq-len", "8"])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("by quasar's own decoder in ")
    assert second.startswith("by transformers in bfloat16")
    assert all("tokens/s" in line and "ms of CPU a token" in line for line in (first, second))
