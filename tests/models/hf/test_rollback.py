"""One cache, two models: after any passes and rollbacks the logits are those of a cache that never rolled back."""

import pytest
import torch
from helpers.tiny_models import VOCABULARY, quantized_copy, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_core.errors import QuasarError
from quasar_core.models.hf.causal_lm import TransformersLM

CAPACITY = 48
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=7)
# (tokens of a pass, by the verifier?, how far back the cache goes before it)
PASSES = st.lists(st.tuples(TOKENS, st.booleans(), st.integers(0, 9)), min_size=1, max_size=6)


def run_afresh(written: list[tuple[int, TransformersLM]]) -> torch.Tensor:
    """Logits of the last token of a new cache, each token passed by the model that wrote it, in the longest runs."""
    cache = written[0][1].new_cache(CAPACITY)
    begin = 0
    while begin < len(written):
        model, end = written[begin][1], begin
        while end < len(written) and written[end][1] is model:
            end += 1
        logits = model.forward([token for token, _ in written[begin:end]], cache)
        begin = end
    return logits[-1]


@pytest.mark.parametrize("architecture", ["llama", "mistral-sliding", "qwen3"])
@given(passes=PASSES)
@settings(deadline=None, derandomize=True, max_examples=25)
def test_logits_after_rollbacks_are_those_of_a_fresh_prefill(
    architecture: str, passes: list[tuple[list[int], bool, int]]
) -> None:
    target, verifier = random_model(architecture), quantized_copy(architecture)
    cache, written = target.new_cache(CAPACITY), list[tuple[int, TransformersLM]]()
    for tokens, by_verifier, back in passes:
        cache.rollback(max(0, cache.length - back))
        model = verifier if by_verifier else target
        written = written[: cache.length] + [(token, model) for token in tokens]
        logits = model.forward(tokens, cache)
        assert cache.length == len(written)
        assert logits.shape == (len(tokens), VOCABULARY)
        torch.testing.assert_close(logits[-1], run_afresh(written), atol=2e-4, rtol=1e-4)


def test_a_rollback_that_is_left_out_would_show() -> None:
    """The comparison above can fail: other tokens in the cache move the logits by far more than its tolerance."""
    target = random_model("llama")
    cache = target.new_cache(CAPACITY)
    target.forward([1, 2, 3], cache)
    stale = target.forward([4], cache)[-1]
    assert (stale - run_afresh([(1, target), (2, target), (4, target)])).abs().max() > 0.1


def test_each_model_writes_its_own_keys_and_values() -> None:
    target, verifier = random_model("llama"), quantized_copy("llama")
    mixed = run_afresh([(1, target), (2, verifier), (3, target)])
    assert not torch.allclose(mixed, run_afresh([(1, target), (2, target), (3, target)]), atol=1e-3)


def test_rolling_back_copies_nothing() -> None:
    target = random_model("llama")
    cache = target.new_cache(CAPACITY)
    target.forward([1, 2, 3], cache)
    before = [layer.keys.data_ptr() for layer in cache.layers]
    cache.rollback(1)
    target.forward([4, 5], cache)
    assert [layer.keys.data_ptr() for layer in cache.layers] == before
    assert (cache.length, cache.capacity) == (3, CAPACITY)


def test_what_is_not_written_is_not_read() -> None:
    target = random_model("llama")
    cache = target.new_cache(CAPACITY)
    target.forward([1, 2, 3], cache)
    cache.rollback(2)
    with torch.inference_mode():
        for layer in cache.decoder_layers:
            layer.keys[:, :, 2:] = layer.values[:, :, 2:] = float("nan")
    logits = target.forward([4, 5], cache)
    torch.testing.assert_close(
        logits[-1], run_afresh([(token, target) for token in (1, 2, 4, 5)]), atol=2e-4, rtol=1e-4
    )


def test_the_last_row_alone_is_the_last_row() -> None:
    target = random_model("qwen3")
    rows = target.forward([1, 2, 3], target.new_cache(CAPACITY))
    last = target.forward([1, 2, 3], target.new_cache(CAPACITY), last_only=True)
    assert last.shape == (1, VOCABULARY)
    torch.testing.assert_close(last[0], rows[-1], atol=1e-5, rtol=1e-5)


def test_a_length_ahead_of_what_is_written_is_refused() -> None:
    cache = random_model("llama").new_cache(CAPACITY)
    for length in (1, -1):
        with pytest.raises(ValueError, match="cannot move"):
            cache.rollback(length)


def test_a_pass_that_does_not_fit_is_refused() -> None:
    target = random_model("llama")
    cache = target.new_cache(4)
    target.forward([1, 2, 3], cache)
    with pytest.raises(QuasarError, match="holds 4 tokens, and 5 are needed"):
        target.forward([4, 5], cache)


def test_a_pass_that_transformers_cannot_run_fails_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("llama")

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("this class wants a cache of its own")

    monkeypatch.setattr(model.model.model, "forward", refuse)
    with pytest.raises(QuasarError, match="could not run this llama model: this class wants a cache of its own"):
        model.forward([1, 2, 3], model.new_cache(CAPACITY))
