"""States of recurrent layers: equal to the last bit however a text is passed, and after going back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_cases import CASES, CPU, FLOAT, assert_close, fresh_logits, random_tokens, save_model
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_core.models import loading
from quasar_core.models.config.recurrence import RecurrenceConfig
from quasar_core.models.decoder.cache import DecoderCache
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.drafting.skipping import CacheView, skip_layers
from quasar_core.models.recurrent.rules import Recurrence
from quasar_core.models.recurrent.states import ENDING, REACH, Inputs, LayerStates, State
from quasar_core.models.rollback import reachable, settle
from quasar_core.models.weights.lean_weights import load_target

# Rows fill the widest vectors: PyTorch's exponentials of what is left over round otherwise. The last ones run in C++.
SHAPES = {
    "delta": RecurrenceConfig("delta", 4, key_heads=32, value_heads=64, key_size=8, value_size=6),
    "mamba": RecurrenceConfig("mamba", 3, key_heads=2, value_heads=64, key_size=32, value_size=4, conv_bias=True),
    "conv": RecurrenceConfig("conv", 3, width=40),
    "delta in C++": RecurrenceConfig("delta", 4, key_heads=32, value_heads=64, key_size=16, value_size=16),
    "mamba in C++": RecurrenceConfig("mamba", 3, key_heads=2, value_heads=64, key_size=32, value_size=16),
    "conv in C++": RecurrenceConfig("conv", 3, width=272),
}
COMPILED = {
    "delta": RecurrenceConfig("delta", 4, key_heads=2, value_heads=4, key_size=32, value_size=48),
    "mamba": RecurrenceConfig("mamba", 3, key_heads=2, value_heads=4, key_size=16, value_size=80, conv_bias=True),
    "conv": RecurrenceConfig("conv", 2, width=272),
}
HYBRIDS = ["qwen3.5", "lfm2", "granite 4", "granite 4, experts"]


def make_rule(shape: RecurrenceConfig) -> Recurrence:
    kind, draw = shape.kind, torch.Generator().manual_seed(3)

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=draw)

    heads = {} if kind == "conv" else {"fading": drawn(shape.value_heads), "step_bias": drawn(shape.value_heads)}
    if kind == "mamba":
        heads |= {"passed_by": drawn(shape.value_heads), "bias": drawn(shape.channels), "norm": drawn(shape.values)}
    if kind == "delta":
        heads |= {"norm": drawn(shape.value_size)}
    return Recurrence(shape, 1e-6, taps=drawn(shape.taps, shape.channels), **heads)


class Text:
    """What the products before a rule give of a text, each token by its position and by who passes it."""

    def __init__(self, kind: str) -> None:
        shape = SHAPES[kind]
        self.rule, kind = make_rule(shape), shape.kind
        draw, size = torch.Generator().manual_seed(4), 3 * REACH
        width = {"conv": 3 * shape.values, "delta": shape.channels + shape.values}
        width = width.get(kind, shape.values + shape.channels + shape.value_heads)
        self.projected = torch.randn(2, size, width, generator=draw)
        self.rates = torch.randn(2, size, 2 * shape.value_heads, generator=draw) if kind == "delta" else None

    def run(self, states: LayerStates, start: int, count: int, by: int = 0) -> torch.Tensor:
        part = slice(start, start + count)
        return self.rule(self.projected[by, part], None if self.rates is None else self.rates[by, part], states, start)

    def fresh(self) -> LayerStates:
        return LayerStates(self.rule.empty(CPU, FLOAT))


@pytest.mark.usefixtures("cpp_pass")
@pytest.mark.parametrize("kind", SHAPES)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_outputs_have_the_same_bits_however_a_text_is_cut_and_gone_back_in(kind: str, data: st.DataObject) -> None:
    """The oracle takes one token a pass, and never goes back; who passed a position last is who counts there.

    On one thread: before and behind the rule stand PyTorch's exponentials, which several cut where vectors are not
    full.
    """
    torch.set_num_threads(1)
    text, writers = Text(kind), list[int]()
    states, settled = text.fresh(), 0
    for _ in range(data.draw(st.integers(1, 5))):
        start = data.draw(st.integers(settled, len(writers)))
        count = data.draw(st.integers(1, min(REACH + 20, 3 * REACH - start))) if start < 3 * REACH else 0
        if not count:
            break
        by = data.draw(st.integers(0, 1))
        assert states.reachable(start) == start
        actual = text.run(states, start, count, by)
        writers[start:] = [by] * count
        oracle, rows = text.fresh(), []
        for position, writer in enumerate(writers):
            rows.append(text.run(oracle, position, 1, writer))
        assert torch.equal(actual, torch.cat(rows[start:]))
        settled = data.draw(st.integers(max(settled, len(writers) - REACH), len(writers)))
        states.settled = settled


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", COMPILED)
def test_the_rule_in_cpp_is_that_in_torch_whatever_the_threads(kind: str, dtype: torch.dtype) -> None:
    rule, shape, draw = make_rule(COMPILED[kind]), COMPILED[kind], torch.Generator().manual_seed(5)
    channels = torch.randn(20, shape.channels, generator=draw).to(dtype)
    inputs = Inputs(channels, torch.rand(20, 2, shape.value_heads, generator=draw))
    begin = rule.advance(rule.empty(CPU, dtype), inputs[:7])
    outputs, end = rule._run_in_torch(begin, inputs[7:])
    assert rule.compiled is not None
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found, after = rule.compiled(begin, inputs[7:])
        torch.testing.assert_close(found, outputs, atol=1e-5, rtol=1e-5)
        assert torch.equal(after.window, end.window)
        if shape.kind != "conv":
            torch.testing.assert_close(after.matrices, end.matrices, atol=1e-5, rtol=1e-5)
        first, middle = rule.compiled(begin, inputs[7:12])
        rest, last = rule.compiled(middle, inputs[12:])
        assert torch.equal(torch.cat((first, rest)), found)
        assert shape.kind == "conv" or torch.equal(last.matrices, after.matrices)


def test_a_rule_whose_heads_fill_no_vectors_runs_in_torch() -> None:
    assert make_rule(SHAPES["delta"]).compiled is None


def test_few_states_are_kept_and_only_the_inputs_that_are_of_use() -> None:
    text = Text("delta")
    states, one = text.fresh(), text.rule.empty(CPU, FLOAT).nbytes
    journal = 4 * (SHAPES["delta"].channels + 2 * SHAPES["delta"].value_heads)
    for position in range(2 * REACH):
        text.run(states, position, 1)
        states.settled = position + 1
        assert states.nbytes <= 4 * one + 2 * journal
    states = text.fresh()
    for position in range(3 * REACH):
        text.run(states, position, 1)
        assert states.nbytes <= 6 * one + 3 * REACH * journal
        assert states.reachable(max(position + 1 - REACH, 0)) == max(position + 1 - REACH, 0)


@pytest.fixture(params=HYBRIDS)
def hybrid(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[LeanDecoder, Any]:
    model = save_model(tmp_path, *CASES[request.param])
    return load_target(tmp_path, CPU, FLOAT), model


def test_a_prompts_end_is_kept_for_the_next_turn(hybrid: tuple[LeanDecoder, Any]) -> None:
    decoder, model = hybrid
    tokens, count = random_tokens(100), 90
    cache = decoder.new_cache(128)
    cache.begin(count)
    decoder.forward(tokens[:count], cache, last_only=True)
    for position in range(count, 100):
        settle(cache, position)
        decoder.forward([tokens[position]], cache)
    settle(cache, 100)
    decoder.forward([5], cache)
    assert cache.length == 101
    assert reachable(cache, 95) == reachable(cache, count - ENDING) == count - REACH
    assert reachable(cache, 100) == 100
    assert reachable(cache, 20) == 0
    with pytest.raises(ValueError, match="cannot move a cache of 101 positions to 95"):
        cache.rollback(95)
    cache.rollback(count - REACH)
    new = [*tokens[: count - REACH], *random_tokens(30, seed=9)]
    logits = decoder.forward(new[cache.length :], cache)
    assert_close(logits, fresh_logits(model, new)[count - REACH :], "qwen3.5")


def test_a_pass_that_ended_midway_leaves_states_that_the_next_one_mends(hybrid: tuple[LeanDecoder, Any]) -> None:
    decoder, model = hybrid
    tokens, cache = random_tokens(30), decoder.new_cache(64)
    decoder.forward(tokens[:20], cache)
    first = next(states for states in cache.states if states is not None)
    at = [state for states in cache.states if states is not None for state in [states]]
    decoder.forward([7, 8, 9], cache)
    cache.rollback(20)
    for states in at[1:]:  # as though the other layers had not been reached
        states._forget_from(20)
    assert first.reachable(23) == 23
    assert_close(decoder.forward(tokens[20:], cache), fresh_logits(model, tokens)[20:], "qwen3.5")


@pytest.mark.parametrize("layers", range(1, 5))
def test_a_prompt_that_was_interrupted_leaves_the_states_in_front_of_it(
    hybrid: tuple[LeanDecoder, Any], layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a pass, of one part and of several: the next text goes on where the cache stands."""
    decoder, model = hybrid
    tokens, text = random_tokens(110), random_tokens(30, seed=5)
    for parts in (1, 3):
        cache = decoder.new_cache(512)
        cache.begin(20)
        decoder.forward(text[:20], cache, last_only=True)
        settle(cache, 20)
        cache.begin(20 + 110 * parts)
        with monkeypatch.context() as patch:
            interrupt_after(patch, decoder, layers * parts)
            with pytest.raises(KeyboardInterrupt):
                decoder._sweep([tokens] * parts, cache, lambda: None)
        assert cache.length == 20
        assert cache.reachable(20) == 20
        cache.rollback(20)
        assert_close(decoder.forward(text[20:], cache), fresh_logits(model, text)[20:], "qwen3.5")


def interrupt_after(patch: pytest.MonkeyPatch, decoder: LeanDecoder, count: int) -> None:
    """Let the block after `count` of them be interrupted when its rule has run."""
    left, add = [count], decoder._add

    def interrupted(*given: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        add(*given)

    patch.setattr(decoder, "_add", interrupted)


def test_layers_that_know_different_states_go_back_to_one_that_all_know(hybrid: tuple[LeanDecoder, Any]) -> None:
    decoder, model = hybrid
    tokens, cache = random_tokens(30), decoder.new_cache(64)
    decoder.forward(tokens[:20], cache)
    some = [states for states in cache.states if states is not None]
    some[0]._forget_from(12)
    some[1]._journal.clear()  # it knows its states at 0 and at 20 alone
    assert reachable(cache, 20) == 0
    cache.rollback(0)
    assert_close(decoder.forward(tokens, cache), fresh_logits(model, tokens), "qwen3.5")


@pytest.mark.usefixtures("cpp_pass")
@pytest.mark.parametrize("passes", ["PyTorch", "C++"])
def test_a_long_window_goes_back_to_each_of_its_positions(hybrid: tuple[LeanDecoder, Any], passes: str) -> None:
    decoder, model = hybrid
    if passes == "C++":
        loading.attach(decoder)
        assert decoder.fast is not None
    tokens, window, cache = random_tokens(30), random_tokens(2 * REACH, seed=6), decoder.new_cache(256)
    expected = fresh_logits(model, tokens)[21:]
    decoder.forward(tokens[:20], cache, last_only=True)
    settle(cache, 20)
    decoder.forward([tokens[20], *window], cache)
    cache.rollback(21)
    assert_close(decoder.forward(tokens[21:], cache), expected, "qwen3.5")


def test_blocks_are_skipped_over_the_same_states(hybrid: tuple[LeanDecoder, Any]) -> None:
    decoder, model = hybrid
    tokens, cache = random_tokens(30), decoder.new_cache(64)
    decoder.forward(tokens[:20], cache)
    some = skip_layers(decoder, [0, 1, 3])
    view = CacheView(cache, [0, 1, 3])
    some.choose([4], view)
    some.choose([5], view)
    assert_close(decoder.forward(tokens[20:], cache), fresh_logits(model, tokens)[20:], "qwen3.5")


def test_no_tree_passes_through_states(hybrid: tuple[LeanDecoder, Any]) -> None:
    assert hybrid[0].longest_tree == 0


def test_a_cache_without_states_goes_back_to_anywhere(tmp_path: Path) -> None:
    save_model(tmp_path, *CASES["llama"])
    cache = load_target(tmp_path, CPU, FLOAT).new_cache(8)
    assert isinstance(cache, DecoderCache)
    assert reachable(cache, 5) == 5
    assert reachable(object(), 5) == 5


def test_a_state_that_is_not_known_is_a_defect_of_the_caller() -> None:
    states = LayerStates(State(torch.zeros(1, 1)))
    with pytest.raises(ValueError, match="no state is known at position 3"):
        states.at(3, lambda state, _: state)
