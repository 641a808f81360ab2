"""Drafts that a model writes, against plain greedy text of that model; vocabularies; blocks that are left out."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers.decoder_cases import CPU, random_tokens, save_model
from helpers.quantized_decoder import quantize_layers
from helpers.tiny_models import TableModel, make_pair
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_core.config import GenerationConfig
from quasar_core.decode.drafts import guessers
from quasar_core.decode.generator import Generator
from quasar_core.draft.assistant import Assistant
from quasar_core.draft.by_model import ModelDrafter
from quasar_core.draft.layer_skip import LayerSkip
from quasar_core.errors import QuasarError, UsageError
from quasar_core.kernels.cpu import library
from quasar_core.models import loading
from quasar_core.models.decoder.cache import DecoderCache
from quasar_core.models.decoder.layer_source import AllThere
from quasar_core.models.drafting import skipping
from quasar_core.models.drafting.assistant import check_vocabulary
from quasar_core.models.drafting.skipping import (
    choose_layers,
    expected_speed,
    remembered_layers,
    share_of_weights,
    skip_layers,
)
from quasar_core.models.weights.lean_weights import attach_verifier, load_target

TOKENS = st.lists(st.integers(0, 12), min_size=1, max_size=5)
MODEL = TableModel(13, seed=3)


def greedy(text: Sequence[int], count: int) -> list[int]:
    found = list(text)
    for _ in range(count):
        found.append(int(MODEL.table[found[-2] if len(found) > 1 else 0, found[-1]].argmax()))
    return found[len(text) :]


@given(steps=st.lists(st.tuples(TOKENS, st.integers(0, 4), st.integers(1, 5), TOKENS | st.just([])), min_size=1))
@settings(deadline=None, derandomize=True, max_examples=80)
def test_an_assistants_draft_is_its_own_greedy_text(steps: list[tuple[list[int], int, int, list[int]]]) -> None:
    """Whatever joins the text and is taken back; its cache then holds that text and no other."""
    assistant = Assistant(MODEL, 0.0, 13, context=1000)
    drafter, text = ModelDrafter("assistant", assistant), list[int]()
    for new, taken, limit, after in steps:
        drafter.observe(new)
        text += new
        taken = min(taken, len(text) - 1)
        drafter.forget(taken)
        del text[len(text) - taken :]
        assert list(drafter.propose(limit, after).tokens) == greedy([*text, *after], limit)
        assert assistant._cache.tokens == [*text, *after, *greedy([*text, *after], limit)][: assistant._cache.length]


def test_a_prompt_passes_once_and_what_is_new_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    assistant, lengths = Assistant(MODEL, 0.0, 13, context=4000), list[int]()
    forward = MODEL.forward

    def note(tokens: Sequence[int], cache: object, last_only: bool = False) -> torch.Tensor:
        lengths.append(len(tokens))
        return forward(tokens, cache, last_only)  # type: ignore[arg-type]

    monkeypatch.setattr(MODEL, "forward", note)
    text = [1, 2, 3] * 400
    assistant.follow(text, 0)
    assert lengths == [512, 512, 175, 1]
    lengths.clear()
    assistant.follow([*text, 4, 5], len(text))
    assert lengths == [2]
    lengths.clear()
    assistant.follow(text[:7], 3)
    assert lengths == [1]
    lengths.clear()
    assistant.follow([*text, *text], 7)  # beyond the cache, which is filled anew
    assert sum(lengths) == 2 * len(text)


def test_drafting_ends_where_a_token_is_not_worth_its_pass() -> None:
    """The table's margins are what they are: the surer the model, the further it drafts; a dear one drafts nothing."""
    lengths = {}
    for ratio in (0.0, 0.3, 0.7, 1.1):
        drafter = ModelDrafter("assistant", Assistant(MODEL, ratio, 13, 1000))
        drafter.observe([1, 2])
        lengths[ratio] = len(drafter.propose(12).tokens)
    assert lengths[0.0] == 12
    assert 12 > lengths[0.3] >= lengths[0.7] >= 1
    assert lengths[1.1] == 0


def test_a_dear_assistant_that_errs_is_left_in_peace_and_tried_again() -> None:
    drafter = ModelDrafter("assistant", Assistant(MODEL, 0.5, 13, 1000))
    drafter.observe([1, 2])
    asked = list[int]()
    for _ in range(120):
        drafted = drafter.propose(8).tokens
        asked.append(len(drafted))
        drafter.observe([(drafted[0] + 1) % 13] if drafted else [3])
    silent = asked.index(0)
    assert silent < 15
    assert 0 < sum(map(bool, asked[silent:])) < 20


def test_what_was_wrong_makes_later_drafts_shorter_and_what_was_right_longer() -> None:
    lengths = {}
    for right in (True, False):
        drafter = ModelDrafter("assistant", Assistant(MODEL, 0.3, 13, 1000))
        drafter.observe([1, 2])
        for _ in range(30):
            drafted = drafter.propose(8).tokens
            wrong = [(drafted[0] + 1) % 13] if drafted else [3]
            drafter.observe(drafted if right else wrong)
        lengths[right] = len(drafter.propose(8).tokens)
    assert lengths[True] == 8
    assert lengths[False] <= 1


def test_beyond_its_context_and_its_targets_vocabulary_it_guesses_nothing() -> None:
    assert Assistant(MODEL, 0.1, 13, context=3).follow([1, 2, 3, 4], 0) == (-1, 0.0)
    token, margin = Assistant(MODEL, 0.1, 13, context=3).follow([1, 2], 0)
    assert Assistant(MODEL, 0.1, token, context=3).follow([1, 2], 0) == (-1, margin)
    drafter = ModelDrafter("assistant", Assistant(MODEL, 0.1, 13, context=3))
    drafter.observe([1, 2, 3, 4])
    assert drafter.propose(4).tokens == ()


def test_another_vocabulary_is_refused() -> None:
    check_vocabulary("small", {"a": 0, "b": 1}, {"b": 1, "a": 0})
    with pytest.raises(UsageError, match=r"--assistant small has another vocabulary .*: 2 tokens differ, such as 'b'"):
        check_vocabulary("small", {"a": 0, "b": 1}, {"a": 0, "c": 1})


@pytest.mark.parametrize("verify", ["full", "exact"])
@given(noise=st.sampled_from([0.0, 0.5, 3.0]), drafts=st.integers(1, 8), window=st.integers(1, 9))
@settings(deadline=None, derandomize=True, max_examples=8)
def test_an_assistant_changes_no_text(verify: str, noise: float, drafts: int, window: int) -> None:
    pair = make_pair(MODEL, MODEL.disturbed(0.4), assistant=MODEL.disturbed(noise, seed=4), assistant_context=100)
    pair.measured = {role: Known() for role in ("target", "verifier", "assistant")}
    config = GenerationConfig(30, verify, "assistant", num_draft_tokens=drafts, window=window)  # type: ignore[arg-type]
    generator = Generator(pair, config)
    for prompt in ([1, 2, 3], [1, 2, 3, 4, 5, 6], [7]):
        expected = Generator(pair, GenerationConfig(30, "full", "none")).generate(prompt).token_ids
        assert generator.generate(prompt).token_ids == expected


class Known:
    """In the place of measured costs."""

    remembered = False

    @staticmethod
    def cost(tokens: int) -> float:
        return 1.0


def test_an_assistant_must_be_named() -> None:
    with pytest.raises(UsageError, match="--draft assistant needs --assistant MODEL"):
        Generator(make_pair(MODEL), GenerationConfig(5, "full", "assistant", num_draft_tokens=3))


# Layers left out


def test_all_blocks_but_the_skipped_ones_are_passed(tmp_path: Path) -> None:
    """Against a model that was built without them."""
    save_model(tmp_path, "Llama", {})
    decoder = load_target(tmp_path, CPU, torch.float32)
    tokens = random_tokens(20)
    some = skip_layers(decoder, (0, 3))
    whole = load_target(tmp_path, CPU, torch.float32)
    whole.layers, whole.source = (whole.layers[0], whole.layers[3]), AllThere(2)
    cache = decoder.new_cache(32)
    expected = whole.forward(tokens, DecoderCache(some.config.blocks, 32, CPU, torch.float32))
    assert torch.equal(some.forward(tokens, skipping.CacheView(cache, (0, 3))), expected)
    assert 0 < share_of_weights(decoder, (0, 3)) < share_of_weights(decoder, range(len(decoder.layers))) == 1


def test_blocks_that_do_nothing_are_left_out(tmp_path: Path) -> None:
    save_model(tmp_path, "Llama", {})
    decoder = load_target(tmp_path, CPU, torch.float32)
    idle = (1, 2)
    for i in idle:
        decoder.layers[i].down.weight.zero_()  # type: ignore[attr-defined]
        decoder.layers[i].out.weight.zero_()  # type: ignore[attr-defined]
    kept = choose_layers(decoder, random_tokens(40))
    assert not set(idle) & set(kept)


def test_the_choice_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path, "Llama", {})
    decoder = load_target(tmp_path, CPU, torch.float32)
    chosen, how = remembered_layers(decoder, "some files", "target")
    assert how == "chosen now"
    monkeypatch.setattr(skipping, "choose_layers", None)
    assert remembered_layers(decoder, "some files", "target") == (chosen, "remembered")


def test_where_no_set_pays_nothing_is_drafted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path, "Llama", {})
    target = load_target(tmp_path, CPU, torch.float32)
    monkeypatch.setattr(skipping, "WORTH", 100.0)
    assert choose_layers(target, random_tokens(20)) == ()
    pair = make_pair(target, target_fingerprint="some files")
    for _ in range(2):  # chosen, then remembered
        found = Generator(pair, GenerationConfig(10, "full", "layer-skip", num_draft_tokens=3)).generate([1, 2, 3])
        assert found.stats.drafted == 0
    assert [note.partition(",")[0] for note in pair.notes] == ["layer-skip: no drafts"] * 2


def test_speed_that_is_expected() -> None:
    assert expected_speed(0.0, 0.5) == 1.0
    assert expected_speed(1.0, 0.5) == 16 / 8.5
    assert expected_speed(0.5, 0.1) == pytest.approx(max(1, 1.5 / 1.1, 1.75 / 1.2, 1.875 / 1.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("verify", ["full", "exact"])
def test_layer_skip_changes_no_text(
    tmp_path: Path, verify: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guessers, "remembered_layers", lambda *_: ((0, 2), "by hand"))
    monkeypatch.setattr(guessers, "share_of_weights", lambda *_: 0.1)
    save_model(tmp_path, "Qwen3", {})
    target = load_target(tmp_path, CPU, dtype)
    verifier = attach_verifier(target, quantize_layers(tmp_path, tmp_path / "v", lambda name: 4), "auto")
    if library.why_not_here() is None:
        loading.attach(target), loading.attach(verifier)
    pair = make_pair(target, verifier)
    for drafts, window in ((1, 1), (4, 3), (8, 12)):
        config = GenerationConfig(40, verify, "layer-skip", num_draft_tokens=drafts, window=window)  # type: ignore[arg-type]
        generator = Generator(pair, config)
        for prompt in (random_tokens(20), random_tokens(25)):
            found = generator.generate(prompt)
            assert found.token_ids == Generator(pair, GenerationConfig(40, "full", "none")).generate(prompt).token_ids
            assert found.stats.drafted > 0


def test_layer_skip_needs_our_own_decoder() -> None:
    with pytest.raises(QuasarError, match="--draft layer-skip needs our own decoder"):
        Generator(make_pair(MODEL), GenerationConfig(5, "full", "layer-skip", num_draft_tokens=3))


def test_drafts_of_some_blocks_are_those_of_these_blocks_over_the_whole_models_keys(tmp_path: Path) -> None:
    save_model(tmp_path, "Llama", {})
    decoder = load_target(tmp_path, CPU, torch.float32)
    cache, tokens = decoder.new_cache(64), random_tokens(12)
    decoder.forward(tokens[:-1], cache)
    kept = (0, 2, 3)
    drafter = ModelDrafter("layer-skip", LayerSkip(skip_layers(decoder, kept), kept, 0.0, lambda: cache))
    drafter.observe(tokens)
    found = drafter.propose(5).tokens
    view, expected = skipping.CacheView(cache, kept), list[int]()
    for _ in range(5):
        logits = skip_layers(decoder, kept).forward([*tokens[-1:], *expected][-1:], view)
        expected.append(int(logits[-1].argmax()))
    assert list(found) == expected
    assert cache.length == 11
