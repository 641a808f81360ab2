"""A verifier whose head knows some tokens: their logits as they were, and no confirmed text changes."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_cases import CPU, random_tokens, save_model
from helpers.quantized_decoder import quantize_layers
from helpers.tiny_models import TableModel, make_pair
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_core.config import GenerationConfig, SamplingConfig
from quasar_core.decode.answering import Answering
from quasar_core.decode.generator import Generator
from quasar_core.decode.policy import verifier_vocabulary
from quasar_core.decode.policy.verifier_vocabulary import MOST_MET, VerifierVocabulary, frequent_tokens
from quasar_core.draft.successors import KnownSuccessors, count_successors
from quasar_core.kernels.cpu.vnni import VnniKernel, picked_rows
from quasar_core.models import loading
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.pair import Pair
from quasar_core.models.verifier import short_head
from quasar_core.models.verifier.short_head import also_knowing, short_headed, why_not_short
from quasar_core.models.weights import verifier_head
from quasar_core.models.weights.lean_weights import attach_verifier, load_target
from quasar_core.models.weights.verifier_head import round_head, rounded


@given(outputs=st.integers(1, 130), group=st.sampled_from([16, 64]), dice=st.randoms(use_true_random=False))
@settings(deadline=None, derandomize=True, max_examples=40)
@pytest.mark.usefixtures("cpp_pass")
def test_picked_rows_multiply_as_in_the_whole(outputs: int, group: int, dice: random.Random) -> None:
    generator = torch.Generator().manual_seed(dice.randrange(1000))
    whole = VnniKernel().prepare(rounded(torch.randn(outputs, 64, generator=generator), group), CPU, torch.float32)
    rows = torch.tensor(sorted(dice.sample(range(outputs), dice.randint(1, outputs))))
    x = torch.randn(3, 64, generator=generator)
    found = VnniKernel().multiply(x, picked_rows(whole, rows))
    assert torch.equal(found, VnniKernel().multiply(x, whole)[:, rows])


def load(folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32) -> Pair:
    """A pair whose verifier has a rounded head, which the least of savings would shorten."""
    monkeypatch.setattr(verifier_head, "SMALLEST", 1)
    monkeypatch.setattr(short_head, "LEAST_SHARE", 0.0)
    save_model(folder, "Llama", {})
    target = load_target(folder, CPU, dtype)
    verifier = attach_verifier(target, quantize_layers(folder, folder / "verifier", lambda name: 4), "vnni")
    assert round_head(verifier) is None
    loading.attach(target), loading.attach(verifier)
    return make_pair(target, verifier, dtype=dtype, max_context=256)


def tokens_of(decoder: LeanDecoder, count: int, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(decoder.vocab_size, generator=generator)[:count].sort()[0]


@pytest.mark.parametrize("further", [0, 1, 7])
@pytest.mark.usefixtures("cpp_pass")
def test_logits_of_known_tokens_stay_and_others_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, further: int
) -> None:
    """To the last bit, in C++ and in PyTorch's operations, in chains and trees; choices are among them."""
    verifier = load(tmp_path, monkeypatch).verifier
    assert isinstance(verifier, LeanDecoder)
    drawn = tokens_of(verifier, 40 + further)
    own, more = drawn[further:].sort()[0], drawn[:further].sort()[0]
    short = short_headed(verifier, own)
    if further:
        short = also_knowing(short, verifier, more)
    text, nodes, parents = random_tokens(20), random_tokens(24)[20:], [-1, 0, 0, 1]
    for run in (
        lambda model, cache: model.forward(text, cache),
        lambda model, cache: model.plain_logits(text, cache),
        lambda model, cache: model.forward_tree(nodes, parents, cache),
    ):
        whole, found = (run(model, model.new_cache(32)) for model in (verifier, short))
        assert torch.equal(found[:, drawn], whole[:, drawn])
        others = torch.ones(verifier.vocab_size, dtype=torch.bool).index_fill(0, drawn, False)
        assert (found[:, others] == -math.inf).all()
    choices = short.choose(text, short.new_cache(32), 3)
    best = short.forward(text, short.new_cache(32)).topk(3)
    assert choices.likeliest == best.indices.tolist()
    assert choices.tokens == best.indices[:, 0].tolist()
    torch.testing.assert_close(torch.tensor(choices.margins), best.values[:, 0] - best.values[:, 1])


def shortened(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(verifier_vocabulary, "LEAST_ROWS", rows)
    monkeypatch.setattr(verifier_vocabulary, "SHARE", 1 << 20)


@pytest.mark.usefixtures("cpp_pass")
def test_confirmed_text_is_that_of_plain_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few tokens the head knows: where too many are missed the whole head takes over."""
    pair, dice, whole = load(tmp_path, monkeypatch, torch.bfloat16), random.Random(5), 0
    assert isinstance(pair.verifier, LeanDecoder)
    passes = pair.verifier.fast
    assert passes is not None
    for number in range(6):
        pair.short = None
        shortened(monkeypatch, dice.choice([1, 20, pair.verifier.vocab_size - 1]))
        text = random_tokens(dice.randint(4, 60))
        plain = Generator(pair, GenerationConfig(60, "full", "none")).generate(text).token_ids
        config = GenerationConfig(60, "exact", window=dice.choice(["auto", 3]))
        generator = Generator(pair, config)
        assert generator.generate(text).token_ids == plain, number
        whole += sum(token not in generator.pair.short.verifier.head_tokens for token in plain)  # type: ignore[union-attr]
    assert whole > 20
    assert any("its head knows" in note for note in pair.notes)


@pytest.mark.usefixtures("cpp_pass")
def test_what_a_text_has_is_known_and_too_much_missed_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = load(tmp_path, monkeypatch)
    shortened(monkeypatch, 10)
    vocabulary = VerifierVocabulary(pair, GenerationConfig(9, "exact"), pair.notes.append)
    usual = vocabulary.usual
    assert usual is pair.short
    assert vocabulary.pair_for(usual, [1, 2, 3], Answering()) is usual  # the lowest ids, where nothing is known
    met = vocabulary.pair_for(usual, [30, 2, 20, 30], Answering()).verifier
    assert isinstance(met, LeanDecoder)
    assert met.head_tokens is not None
    assert met.head_tokens.tolist() == [*range(10), 20, 30]
    rules: Any = [object()]
    assert vocabulary.pair_for(usual, [1], Answering(rules=rules)) is pair
    assert vocabulary.pair_for(usual, [1], Answering(), greedy=False) is pair
    known = [vocabulary.enough(token) for token in (1, 20, 30, 9)]
    missed = [vocabulary.enough(token) for token in (40, 41, 42, 43, 44)]
    assert known == [None] * 4
    assert missed == [None] * 5
    assert vocabulary.enough(45) is pair.verifier
    assert "its whole head took over" in pair.notes[-1]
    assert vocabulary.enough(46) is None  # counted anew
    again = VerifierVocabulary(pair, GenerationConfig(9, "exact"), pair.notes.append)
    assert again.usual is usual


@pytest.mark.usefixtures("cpp_pass")
def test_passes_of_the_whole_head_tell_nothing_of_the_short_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an answer's passes took corrects the costs of the next, but for those that the whole head verified."""
    pair = load(tmp_path, monkeypatch)
    for rows, kept in ((pair.verifier.vocab_size - 1, True), (1, False)):  # type: ignore[union-attr]
        pair.short = None
        shortened(monkeypatch, rows)
        generator = Generator(pair, GenerationConfig(100, "exact", "ngram", window=3))
        generator.generate(random_tokens(9))
        live = generator._costs.live["verifier"]
        assert bool(live.seen(1)) is kept
        assert live.passes > 10


def test_what_is_met_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = VerifierVocabulary(make_pair(TableModel(8, 0)), GenerationConfig(5, "full"), list[str]().append)
    vocabulary._meet(range(MOST_MET + 5))
    vocabulary._meet([5])
    assert list(vocabulary._met) == [*range(6, MOST_MET + 5), 5]


def test_frequent_tokens_are_those_of_the_successors_then_the_lowest() -> None:
    texts = torch.tensor([[5, 7, 5, 9]]).numpy()
    best = torch.tensor([[[7, 8], [5, 8], [9, 8], [5, 8]]]).numpy()
    odds = torch.tensor([[[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.5, 0.5]]]).numpy()
    known = count_successors(texts, best, odds)
    assert isinstance(known, KnownSuccessors)
    assert frequent_tokens(12, 4, known).tolist() == [5, 7, 8, 9]
    assert frequent_tokens(12, 6, known).tolist() == [0, 1, 5, 7, 8, 9]
    assert frequent_tokens(12, 3, None).tolist() == [0, 1, 2]


@pytest.mark.parametrize(("verify", "temperature"), [("full", 0.0), ("quantized", 0.0), ("exact", 1.0)])
@pytest.mark.usefixtures("cpp_pass")
def test_other_modes_and_sampling_keep_the_whole_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: Any, temperature: float
) -> None:
    pair = load(tmp_path, monkeypatch)
    shortened(monkeypatch, 10)
    config = GenerationConfig(9, verify, sampling=SamplingConfig(temperature))
    assert VerifierVocabulary(pair, config, pair.notes.append).usual is pair
    assert pair.short is None


@pytest.mark.usefixtures("cpp_pass")
def test_it_stays_whole_where_little_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = load(tmp_path, monkeypatch).verifier
    assert isinstance(verifier, LeanDecoder)
    assert why_not_short(verifier, verifier.vocab_size // 2) is None
    monkeypatch.setattr(short_head, "LEAST_SHARE", 0.99)
    assert "and must save 99%" in str(why_not_short(verifier, verifier.vocab_size // 2))
    verifier.fast = None
    assert why_not_short(verifier, 10) == "its passes do not run in C++"
    assert why_not_short(TableModel(8, 0), 1) == "its passes do not run in C++"
