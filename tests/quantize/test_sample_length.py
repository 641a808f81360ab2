"""Samples are as long as the model reads at most, which is said; what is planned and kept is of that length."""

from pathlib import Path

import pytest
from helpers.quantize_cases import CONFIG

from quasar_core.api import quantizing
from quasar_core.config import QuantizeConfig
from quasar_core.quantize.sample_length import within_context

pytest_plugins = ["helpers.quantize_fixtures"]


@pytest.mark.parametrize(("asked", "limit", "length"), [(512, 128, 128), (32, 128, 32), (128, 128, 128), (64, 8, 16)])
def test_a_length_is_cut_to_the_context(asked: int, limit: int, length: int) -> None:
    config, note = within_context(QuantizeConfig(seq_len=asked), limit)
    assert config.seq_len == length
    assert (note is not None) == (length < asked)


def test_a_length_that_nobody_asked_for_is_left() -> None:
    assert within_context(QuantizeConfig(), 128) == (QuantizeConfig(), None)


def test_a_plan_is_of_the_length_that_will_be_read(source: Path) -> None:
    told = list[str]()

    def plan(length: int) -> quantizing.Plan:
        config = QuantizeConfig(group_size=32, samples=CONFIG.samples, seq_len=length)
        return quantizing.estimate(str(source), config, device="cpu", tell=told.append)

    assert plan(4096).activations == plan(128).activations
    assert told == ["Samples have 128 tokens, which the model was made for; --seq-len asks for 4096."]
