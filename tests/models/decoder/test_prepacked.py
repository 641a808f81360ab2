"""Layers that oneDNN has laid out give what they gave before."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.decoder_cases import CASES, CPU, random_tokens, relative_error, save_model

from quasar_core.models.decoder import prepacked
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.decoder.prepacked import PrepackedLinear, can_prepack, prepack
from quasar_core.models.weights.lean_weights import load_target


def logits_of(decoder: LeanDecoder, count: int) -> torch.Tensor:
    return decoder.plain_logits(random_tokens(count), decoder.new_cache(64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["llama, all biases", "qwen3", "gemma 2", "muse glimmer", "qwen 3 moe"])
def test_logits_stay_what_they_were(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    save_model(tmp_path, *CASES[case])
    decoder = load_target(tmp_path, CPU, dtype)
    if not can_prepack(dtype):
        layers = decoder.layers
        prepack(decoder)
        assert decoder.layers is layers
        pytest.skip(f"oneDNN has no {dtype} on this processor")
    expected = [logits_of(decoder, count) for count in (1, 5, 40)]
    prepack(decoder)
    assert all(isinstance(layer.out, PrepackedLinear) for layer in decoder.layers)
    for count, before in zip((1, 5, 40), expected, strict=True):
        assert relative_error(logits_of(decoder, count), before) < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("dtype", "supported"), [(torch.float32, True), (torch.bfloat16, False)])
def test_a_dtype_that_onednn_lacks_is_left_as_it_is(
    dtype: torch.dtype, supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As bfloat16 on processors with AVX2 alone, where laying it out raises."""
    onednn = SimpleNamespace(
        _linear_pointwise=None, _reorder_linear_weight=None, _is_mkldnn_bf16_supported=lambda: False
    )
    monkeypatch.setattr(torch.ops, "mkldnn", onednn)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert can_prepack(dtype) is supported


def test_without_onednn_nothing_is_laid_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path, *CASES["llama"])
    decoder = load_target(tmp_path, CPU, torch.float32)
    layers = decoder.layers
    monkeypatch.setattr(prepacked, "can_prepack", lambda dtype: False)
    prepack(decoder)
    assert decoder.layers is layers
