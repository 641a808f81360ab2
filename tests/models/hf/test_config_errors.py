"""What transformers raises of a config is one sentence that names the option, and other errors stay what they are."""

from pathlib import Path
from typing import Any

import pytest
from helpers.decoder_cases import SIZES
from packaging.version import Version
from transformers import LlamaConfig, __version__

from quasar_core.errors import QuasarError
from quasar_core.models.hf.config_errors import config_errors

FILE = Path("m/config.json")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attention_bias": "yes"}, 'attention_bias must be true or false, not "yes"'),
        ({"mlp_bias": None}, "mlp_bias must be true or false, not null"),
        ({"rms_norm_eps": [1]}, "rms_norm_eps must be a number with a point, not [1]"),
        (
            {"eos_token_id": "</s>"},
            'eos_token_id must be a whole number or a list or null, not "</s>"',
        ),
        (
            {"attention_dropout": ["x" * 99]},
            "attention_dropout must be a whole number or a number with a point or null",
        ),
        pytest.param(
            {"initializer_range": -1.0},
            "initializer_range: Value must be greater or equal to 0.0",
            marks=pytest.mark.skipif(Version(__version__) < Version("5.23"), reason="transformers takes it"),
        ),
        ({"hidden_size": 65}, "The hidden size (65) is not a multiple of the number of attention heads (4)"),
    ],
    ids=str,
)
def test_the_option_is_named(options: dict[str, Any], said: str) -> None:
    content = {**SIZES, **options}
    with pytest.raises(QuasarError) as error, config_errors("It failed", FILE, content):
        LlamaConfig(**content)
    assert str(error.value).startswith(f"{FILE} is not a model's config: {said}")
    assert len(str(error.value)) < 200


def test_an_option_that_is_wrong_for_us_explains_what_fails_within() -> None:
    content = {**SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": "x"}}
    with pytest.raises(QuasarError) as error, config_errors("It failed", FILE, content):
        raise TypeError("unsupported operand type(s) for ** or pow(): 'str' and 'Tensor'")
    assert str(error.value).startswith(f"{FILE} is not a model's config: rope_parameters.rope_theta must be a number")


@pytest.mark.parametrize(("error", "said"), [(ValueError("odd"), "It failed: odd."), (QuasarError("Ours."), "Ours.")])
def test_other_errors_stay_what_they_are(error: Exception, said: str) -> None:
    with pytest.raises(QuasarError) as found, config_errors("It failed", FILE, SIZES):
        raise error
    assert str(found.value) == said
