"""`gated`: what goes through without a confirm, how much of a text then agrees, and that confirms correct the rest."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.decoder_cases import CASES, CPU, random_tokens, save_model
from helpers.fast_pass import fast
from helpers.quantized_decoder import quantize_layers
from helpers.tiny_models import TableModel, make_pair
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_core.bench.gated import count_agreed
from quasar_core.config import GenerationConfig, SamplingConfig
from quasar_core.decode.costs.cost_records import CostRecord
from quasar_core.decode.costs.pass_costs import PassCost
from quasar_core.decode.generator import Generator
from quasar_core.decode.policy.agreement import AgreementCurve, Estimate, Kind, RunningAgreement
from quasar_core.decode.policy.gate import HEAD_START, NEVER, Gate, least_chance
from quasar_core.decode.policy.window_values import Agreements
from quasar_core.decode.prefixes import Prefixes
from quasar_core.errors import QuasarError, UsageError
from quasar_core.models.pair import Pair
from quasar_core.models.weights.lean_weights import attach_verifier, load_target
from quasar_core.quantize.fidelity import margin_table
from quasar_core.records import FidelityReport, GenerationResult, MarginTable
from quasar_core.trace import origins

SIZE = 24


@given(
    chances=st.lists(st.floats(0.5, 1.0), min_size=1, max_size=8),
    weights=st.lists(st.floats(0.01, 1.0), min_size=8, max_size=8),
    fidelity=st.sampled_from([0.9, 0.99, 0.999]),
)
@settings(deadline=None, derandomize=True, max_examples=200)
def test_no_lower_chance_would_do(chances: list[float], weights: list[float], fidelity: float) -> None:
    """Against every threshold that a bin may set."""
    share = np.array(weights[: len(chances)]) / sum(weights[: len(chances)])
    values = np.array(chances)

    def lost(least: float) -> float:
        through = values >= least
        return float((share[through] * (1 - values[through])).sum())

    least = least_chance(Agreements(values, share), fidelity)
    allowed = [one for one in sorted(values) if lost(one) <= 1 - fidelity + 1e-12]
    assert least == NEVER or lost(least) <= 1 - fidelity + 1e-9 or list(values).count(least) > 1
    assert least == (min(allowed) if allowed else NEVER) or list(values).count(least) > 1


def table_pair(noise: float, seed: int = 0) -> Pair:
    """A target, a verifier near it, and its margin table, measured on other text than the tests' prompts begin."""
    target = TableModel(SIZE, seed)
    verifier = target.disturbed(noise)
    rows, others = target.table.view(-1, SIZE), verifier.table.view(-1, SIZE)
    best = others.topk(2).values
    table = margin_table(best[:, 0] - best[:, 1], rows.argmax(-1) == others.argmax(-1))
    agreement = float((rows.argmax(-1) == others.argmax(-1)).float().mean())
    report = FidelityReport("t", len(rows), agreement, agreement, agreement, 0.1, 0.2, 5.0, 5.1, table)
    pair = make_pair(target, verifier, max_context=4096, fidelity=report)
    for role, seconds in (("target", 3.0), ("verifier", 1.0)):
        pair.measured[role] = CostRecord(PassCost((1, 33), (seconds, 1.5 * seconds)), {"role": role}, 0.0)
    return pair


def answers(pair: Pair, **options: Any) -> list[tuple[list[int], GenerationResult]]:
    """Several answers, of tables whose texts soon go in circles, so from many prompts."""
    config = GenerationConfig(40, draft="none", **options)
    generator = Generator(pair, config, now=lambda: 0.0)
    return [
        (prompt, generator.generate(prompt))
        for prompt in ([i, j] for i in range(0, SIZE, 2) for j in range(0, SIZE, 6))
    ]


@pytest.mark.parametrize(("fidelity", "least", "share"), [(0.9, 0.6, 0.7), (0.97, 0.3, 1.0), (0.995, 0.09, 1.0)])
def test_what_was_asked_for_is_reached_and_passes_are_saved(fidelity: float, least: float, share: float) -> None:
    """At least so many tokens go through; the next confirm passes them too, so a high fidelity saves few passes."""
    pair = table_pair(0.35)
    found = answers(pair, verify="gated", fidelity=fidelity)
    exact = answers(pair, verify="exact")
    agreed = sum(count_agreed(pair, prompt, result.token_ids) for prompt, result in found)
    tokens = sum(len(result.token_ids) - 1 for _, result in found)
    assert agreed / tokens >= fidelity - 0.015  # of 1,872 tokens
    assert sum(step.let_through for _, result in found for step in result.stats.step_log) >= least * tokens
    assert count(found) < share * count(exact)
    assert all(count_agreed(pair, p, r.token_ids) == len(r.token_ids) - 1 for p, r in exact)


@given(
    promised=st.lists(st.floats(0.99, 1.0), min_size=1, max_size=6),
    true=st.floats(0.9, 1.0),
    fidelity=st.sampled_from([0.9, 0.99, 0.999]),
    seed=st.integers(0, 9),
)
@settings(deadline=None, derandomize=True, max_examples=60)
def test_what_was_lost_is_made_up_for(promised: list[float], true: float, fidelity: float, seed: int) -> None:
    """Whatever the curve promises: no more than was asked, and what one window had lost before a confirm told."""
    draw = np.random.default_rng(seed)
    gate = Gate(RunningAgreement(AgreementCurve(MarginTable([1.0], [10, 9999], [10, 9999]))), fidelity)
    tokens = lost = most = 0
    for _ in range(300):
        window = [Estimate(Kind.ANY, chance, chance) for chance in draw.choice(promised, draw.integers(1, 9))]
        through = gate.let_through(window)
        own = [bool(draw.random() < true) for _ in window[:through]]
        tokens, lost, most = tokens + through, lost + own.count(False), max(most, own.count(False))
        assert lost <= (1 - fidelity) * (HEAD_START + tokens) + most + 1e-9
        gate.passed(own)
        gate.confirmed(1)
        tokens += 1


def test_where_the_verifier_is_surely_wrong_no_more_is_lost_than_was_asked() -> None:
    """One choice in thirty is another than the target's by a large margin, which the table does not know of."""
    pair = table_pair(0.1)
    verifier: Any = pair.verifier
    rows = verifier.table.view(-1, SIZE)
    wrong = torch.rand(len(rows), generator=torch.Generator().manual_seed(2)) < 1 / 30
    rows[wrong, rows[wrong].argmin(-1)] += 30
    found = answers(pair, verify="gated", fidelity=0.97)
    agreed = sum(count_agreed(pair, prompt, result.token_ids) for prompt, result in found)
    tokens = sum(len(result.token_ids) - 1 for _, result in found)
    assert sum(step.let_through for _, result in found for step in result.stats.step_log) > tokens / 10
    assert tokens - agreed <= 0.03 * (tokens + HEAD_START)


def count(found: Sequence[tuple[list[int], GenerationResult]]) -> int:
    """Passes of the target."""
    return sum(result.stats.confirms + sum(step.by_target for step in result.stats.step_log) for _, result in found)


def test_who_made_each_token_is_told() -> None:
    pair = table_pair(0.35)
    for _, result in answers(pair, verify="gated", fidelity=0.97)[:20]:
        made = origins(result.stats, len(result.token_ids))
        assert made is not None
        assert len(made) == len(result.token_ids)
    assert any(step.let_through for step in result.stats.step_log)


def test_what_is_confirmed_is_the_targets_choice_behind_that_text(tmp_path: Path) -> None:
    """Also behind tokens that went through: a confirm makes their keys and values the target's. A decoder of 2 bits."""
    save_model(tmp_path, *CASES["qwen3"])
    target = load_target(tmp_path, CPU, torch.float32)
    verifier = attach_verifier(target, quantize_layers(tmp_path, tmp_path / "verifier", lambda name: 2), "dense")
    table = MarginTable([0.05, 0.1], [400, 400, 9999], [200, 300, 9999])
    pair = make_pair(target, verifier, fidelity=FidelityReport("t", 9, 0.9, 0.9, 0.9, 0.1, 0.2, 5.0, 5.1, table))
    for role, seconds in (("target", 3.0), ("verifier", 1.0)):
        pair.measured[role] = CostRecord(PassCost((1, 33), (seconds, 1.5 * seconds)), {"role": role}, 0.0)
    generator = Generator(
        pair, GenerationConfig(60, "gated", "ngram", num_draft_tokens=2, fidelity=0.9), now=lambda: 0.0
    )
    through = confirmed = 0
    for length in (5, 9, 13, 17):
        prompt = random_tokens(length)
        result = generator.generate(prompt)
        generator.reset()
        text = [*prompt, *result.token_ids]
        best = target.forward(text, target.new_cache(len(text))).topk(2)
        made = origins(result.stats, len(result.token_ids))
        assert made is not None
        for place, origin in enumerate(made, start=length):
            unseen = origin.by in ("draft", "bonus") and origin.confirmed is None and origin.target_margin is None
            through += unseen
            if not unseen and best.values[place - 1].diff().abs() > 1e-3:
                confirmed += 1
                assert best.indices[place - 1, 0] == text[place]
    assert through > 20
    assert confirmed > 20


@pytest.mark.usefixtures("cpp_pass")
@pytest.mark.parametrize("case", ["qwen3", "lfm2"])
def test_in_16_bits_all_of_exact_is_found_to_be_the_targets_own(tmp_path: Path, case: str) -> None:
    """Prompts and answers in passes that round as decoding's do, behind what is kept of the turns before."""
    save_model(tmp_path, *CASES[case])
    target = fast(load_target(tmp_path, CPU, torch.bfloat16))
    codes = quantize_layers(tmp_path, tmp_path / "verifier", lambda name: 4)
    pair = make_pair(target, fast(attach_verifier(target, codes, "dense")))
    generator = Generator(pair, GenerationConfig(25, num_draft_tokens=4, window=6, ignore_eos=True))
    for seed in range(12):
        prefixes, prompt = Prefixes(pair), torch.randint(3, 90, (20,), generator=seeded(seed)).tolist()
        generator.reset()
        for _ in range(3):
            answer = generator.generate(prompt).token_ids
            assert count_agreed(pair, prompt, answer, prefixes) == len(answer) - 1
            prompt = [*prompt, *answer, 5, 6, 7]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_verifier_that_is_never_sure_is_confirmed_throughout() -> None:
    pair = table_pair(0.35)
    pair.fidelity = FidelityReport("t", 9, 0.5, 0.5, 0.5, 0.1, 0.2, 5.0, 5.1, MarginTable([1.0], [50, 50], [20, 30]))
    found = answers(pair, verify="gated")
    assert [r.token_ids for _, r in found] == [r.token_ids for _, r in answers(pair, verify="exact")]
    assert any("even the surest differ too often" in note for note in pair.notes)


def test_confirms_move_the_gate() -> None:
    agreement = RunningAgreement(AgreementCurve(MarginTable([1.0, 2.0], [100, 300, 9000], [60, 290, 8999])))
    gate = Gate(agreement, 0.999)
    before = gate.least
    estimates = agreement.estimates([0.5] * 30, 0, False)
    for _ in range(20):
        agreement.learn(estimates, 0)
    gate.learn()
    gate.confirmed(10_000)
    assert gate.let_through(agreement.estimates([3.0], 0, False)) == (gate.least <= agreement(3.0))
    assert gate.least != before


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(UsageError, match="--temperature"):
        GenerationConfig(verify="gated", sampling=SamplingConfig(1.0))
    with pytest.raises(UsageError, match="--window"):
        GenerationConfig(verify="gated", window=4)
    with pytest.raises(UsageError, match="--fidelity must be at least"):
        GenerationConfig(verify="gated", fidelity=1.0)
    pair = make_pair(TableModel(8, 0), TableModel(8, 1))
    for role in ("target", "verifier"):
        pair.measured[role] = CostRecord(PassCost((1, 33), (1.0, 2.0)), {"role": role}, 0.0)
    with pytest.raises(QuasarError, match="margin table"):
        Generator(pair, GenerationConfig(verify="gated"))
