"""Models with recurrent layers write transformers' greedy text in every mode, and from turn to turn."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers.decoder_cases import CASES, CPU, FLOAT, save_model
from helpers.quantized_decoder import quantize_layers
from helpers.tiny_models import make_pair
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject

from quasar_core.config import GenerationConfig
from quasar_core.decode.answering import Answering, Stopped
from quasar_core.decode.engine import PREFILL_CHUNK
from quasar_core.decode.generator import Generator
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.pair import Pair
from quasar_core.models.weights.lean_weights import attach_verifier, load_target

HYBRIDS = ["qwen3.5", "lfm2", "granite 4", "lfm2 moe", "granite 4, experts"]
CLEAR = 1e-3  # nats between the two best logits, where rounding decides nothing
Models = tuple[Any, Pair]


@pytest.fixture(scope="module", params=HYBRIDS)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """transformers' model, and a pair of our decoders of it."""
    folder = tmp_path_factory.mktemp("hybrid")
    theirs = save_model(folder / "target", *CASES[request.param])
    codes = quantize_layers(folder / "target", folder / "codes", lambda name: 16 if name == "lm_head.weight" else 4)
    target = load_target(folder / "target", CPU, FLOAT)
    return theirs, make_pair(target, attach_verifier(target, codes, "reference"))


@torch.inference_mode()
def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """By whole texts, without a cache; of no use where two tokens are about equally good."""
    tokens = list(prompt)
    for _ in range(count):
        best = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].topk(2)
        assume(float(best.values[0] - best.values[1]) > CLEAR)
        tokens.append(int(best.indices[0]))
    return tokens[len(prompt) :]


def check_texts(models: Models, data: DataObject) -> None:
    theirs, pair = models
    prompt = data.draw(st.lists(st.integers(3, 95), min_size=1, max_size=30))
    prompt = prompt * data.draw(st.integers(1, 2))  # so that something is found to draft
    count = data.draw(st.integers(1, 14))
    expected = greedy(theirs, prompt, count)
    config: dict[str, Any] = {
        "draft": data.draw(st.sampled_from(["none", "ngram", "auto", "recycle"])),
        "num_draft_tokens": data.draw(st.integers(1, 6)),
        "window": data.draw(st.integers(1, 9)),
        "ignore_eos": True,
    }
    turn = [*prompt, *expected, 5, 6, 7]
    follows = greedy(theirs, turn, 4)
    for verify in ("full", "exact"):
        generator = Generator(pair, GenerationConfig(count, verify, **config))  # type: ignore[arg-type]
        assert list(generator.generate(prompt).token_ids) == expected
        assert list(generator.generate(turn).token_ids)[:4] == follows[:count]


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_mode_writes_the_targets_text_and_the_next_turn_goes_on(models: Models, data: DataObject) -> None:
    check_texts(models, data)


@pytest.mark.slow
@settings(max_examples=350, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_thousand_texts(models: Models, data: DataObject) -> None:
    check_texts(models, data)


@pytest.mark.parametrize("streamed", [None, "some blocks"])
@pytest.mark.parametrize("kind", [Stopped, KeyboardInterrupt])
def test_after_an_interrupted_prompt_the_text_is_what_it_would_have_been(
    models: Models, kind: type[BaseException], streamed: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two passes of a prompt, or in the middle of one; streamed weights serve all passes at once."""
    _, pair = models
    assert isinstance(pair.target, LeanDecoder)
    monkeypatch.setitem(PREFILL_CHUNK, "cpu", 16)
    monkeypatch.setattr(pair.target, "source", Source(streamed))
    config = GenerationConfig(4, "full", "none", ignore_eos=True)
    first, further = list(range(3, 40)), list(range(90, 10, -1))
    for count in (1, 2, 5):
        generator = Generator(pair, config)
        prompt = [*first, *generator.generate(first).token_ids, *further]
        stop = Countdown(count, kind)
        answering = Answering(before_pass=stop) if kind is Stopped else Answering()
        with monkeypatch.context() as patch:
            if kind is KeyboardInterrupt:
                patch.setattr(pair.target, "_mlp", stop.before(pair.target._mlp))
            with pytest.raises(kind):
                generator.generate(prompt, answering=answering)
        assert generator.generate(prompt).token_ids == Generator(pair, config).generate(prompt).token_ids


class Countdown:
    """Raises when it is called once more than `count` times."""

    def __init__(self, count: int, kind: type[BaseException]) -> None:
        self.left, self.kind = count, kind

    def __call__(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.kind

    def before(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any) -> Any:
            self()
            return work(*given)

        return counted


@dataclass
class Source:
    """All blocks, one by one."""

    streamed: str | None

    def stretches(self) -> Iterator[range]:
        return (range(i, i + 1) for i in range(4))


def test_drafts_are_chains_and_a_note_says_so(models: Models) -> None:
    _, pair = models
    Generator(pair, GenerationConfig(4, "full", "ngram"))
    assert "trees: none, drafts are chains: the states of recurrent layers follow one text" in pair.notes


def test_quantized_writes_the_same_with_drafts_and_without(models: Models) -> None:
    _, pair = models
    prompt, texts = [5, 17, 42, 8, 5, 17, 42, 9, 61, 5, 17], []
    for draft, length in (("none", 1), ("ngram", 3), ("recycle", 5)):
        config = GenerationConfig(24, "quantized", draft, num_draft_tokens=length, ignore_eos=True)  # type: ignore[arg-type]
        texts.append(list(Generator(pair, config).generate(prompt).token_ids))
    assert texts[0] == texts[1] == texts[2]


def test_a_prompt_that_begins_as_the_last_text_passes_its_rest_alone(models: Models) -> None:
    _, pair = models
    generator = Generator(pair, GenerationConfig(6, "exact", "none", window=3, ignore_eos=True))
    prompt = list(range(3, 83))
    answer = generator.generate(prompt)
    whole = [*prompt, *answer.token_ids]
    assert generator.generate([*whole, 4, 5]).stats.cached_tokens == len(whole) - 1
    begins_alike = [*whole[: len(prompt) - 4], 90, 91]
    kept = generator.generate(begins_alike).stats.cached_tokens
    assert kept in (0, len(prompt) - 64)
