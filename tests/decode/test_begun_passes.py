"""A pass that a device runs begins before the text of the one before it is told, and changes no token."""

import gc
from collections.abc import Sequence
from typing import Any
from weakref import ref

import pytest
from helpers.decoder_cases import CPU, FLOAT, LENGTH, random_tokens, save_model
from helpers.quantized_decoder import mixed_bits, quantize_layers
from helpers.tiny_models import PROMPT, generate, make_pair

from quasar_core.config import GenerationConfig
from quasar_core.decode.generator import Generator
from quasar_core.decode.passes import Passes
from quasar_core.models.base import Choices
from quasar_core.models.cuda.graph_pass import BegunPass, CudaPass
from quasar_core.models.cuda.torch_steps import TorchSteps
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.pair import Pair
from quasar_core.models.weights.lean_weights import attach_verifier, load_target


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A target and its codes, whose passes are those of CUDA, launched plainly; trees pass too."""
    tmp_path = tmp_path_factory.mktemp("pair")
    save_model(tmp_path / "source", "Qwen2", {})
    checkpoint = quantize_layers(tmp_path / "source", tmp_path / "codes", mixed_bits)
    target = load_target(tmp_path / "source", CPU, FLOAT)
    verifier = attach_verifier(target, checkpoint, "dense")
    for model in (target, verifier):
        model.fast = CudaPass(model, TorchSteps(), fast=True)
    return make_pair(target, verifier)


def make_generator(pair: Pair, verify: Any) -> Generator:
    return Generator(pair, GenerationConfig(24, verify, num_draft_tokens=3, window=4))


MODES = ("full", "exact", "quantized")


@pytest.mark.parametrize("verify", MODES)
def test_texts_are_those_of_passes_that_begin_when_they_are_asked_for(
    pair: Pair, verify: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = list[BegunPass]()
    fetch = BegunPass.fetch
    monkeypatch.setattr(BegunPass, "fetch", lambda self: begun.append(self) or fetch(self))
    found = generate(pair, verify, 3, 4)
    count = len(begun)
    monkeypatch.setattr(Passes, "start_early", False)
    assert generate(pair, verify, 3, 4).token_ids == found.token_ids
    assert len(begun) == 2 * count  # the same passes, and each is fetched once
    steps = found.stats
    assert steps.decode_s >= steps.verify_s + steps.confirm_s
    assert all(step.seconds > 0 for step in steps.step_log if verify == "full" or not step.by_target)


@pytest.mark.parametrize("verify", MODES)
def test_a_pass_runs_while_the_text_before_it_is_read(pair: Pair, verify: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every piece but the first, and the last, behind which there is nothing."""
    events = list[str]()
    begin, fetch = CudaPass.begin, BegunPass.fetch

    def note_begin(self: CudaPass, *given: Any, **named: Any) -> BegunPass:
        events.append("begins")
        return begin(self, *given, **named)

    def note_fetch(self: BegunPass) -> Choices:
        events.append("is fetched")
        return fetch(self)

    monkeypatch.setattr(CudaPass, "begin", note_begin)
    monkeypatch.setattr(BegunPass, "fetch", note_fetch)
    generator = make_generator(pair, verify)
    for _ in generator.stream(PROMPT):
        events.append("text")
    texts = [place for place, event in enumerate(events) if event == "text"]
    assert len(texts) > 3
    before = [next(event for event in reversed(events[:place]) if event != "text") for place in texts[1:-1]]
    assert before.count("begins") >= len(before) - 2, events
    assert events[-2] != "begins" or events[-1] == "text"


def test_what_ends_meanwhile_leaves_the_conversation_as_it_was(pair: Pair) -> None:
    """A reader that goes away while a pass runs: what the next prompt begins with is still of use, and right."""
    expected = generate(pair, "exact", 3, 4).token_ids
    generator = make_generator(pair, "exact")
    pieces = generator.stream(PROMPT)
    for _ in range(2):
        next(pieces)
    pieces.close()
    again = generator.generate(PROMPT)
    assert again.token_ids == expected
    assert again.stats.cached_tokens > 0


def begin_two(decoder: LeanDecoder, tokens: Sequence[int]) -> tuple[Choices, Choices]:
    """A pass of one text, another text's before the first is fetched; the choices of both."""
    fast = decoder.fast
    assert isinstance(fast, CudaPass)
    caches = [decoder.new_cache(LENGTH) for _ in range(2)]
    first = fast.begin(tokens[:3], caches[0], 2)
    other = fast.begin(tokens[3:8], caches[1])
    assert [cache.length for cache in caches] == [0, 0]
    found = other.fetch(), first.fetch()
    assert [cache.length for cache in caches] == [3, 5]
    return found[1], found[0]


def test_another_texts_pass_may_come_between(pair: Pair) -> None:
    decoder, tokens = pair.primary, random_tokens(8)
    assert isinstance(decoder, LeanDecoder)
    found = begin_two(decoder, tokens)
    expected = [
        decoder.choose(part, decoder.new_cache(LENGTH), best) for part, best in ((tokens[:3], 2), (tokens[3:], 0))
    ]
    assert list(found) == expected


def test_a_pass_that_nobody_fetches_keeps_no_cache(pair: Pair) -> None:
    decoder = pair.primary
    assert isinstance(decoder, LeanDecoder)
    assert isinstance(decoder.fast, CudaPass)
    cache = decoder.new_cache(LENGTH)
    begun, gone = decoder.fast.begin([3, 4], cache), ref(cache)
    assert begun.seconds == 0  # nobody measures the CPU
    del cache, begun
    gc.collect()
    assert gone() is None


def test_a_slow_reader_does_not_make_passes_cheap_or_dear(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device was done before anybody waited: a pass takes what the device took, and no time of the reader's."""
    monkeypatch.setattr(BegunPass, "seconds", 1e6)
    stats = make_generator(pair, "full").generate(PROMPT).stats
    begun = [step.seconds for step in stats.step_log if step.seconds > 1e5]
    assert begun == pytest.approx([1e6] * len(begun), rel=1e-3)
    assert len(begun) >= len(stats.step_log) - 1
    assert stats.verify_s == pytest.approx(sum(step.seconds for step in stats.step_log), rel=1e-3)
    assert stats.decode_s == pytest.approx(stats.verify_s, rel=1e-3)
