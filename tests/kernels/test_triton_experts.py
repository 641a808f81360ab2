"""Kernels of mixtures of experts, interpreted, against slow definitions: which experts, and what each place gives."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import interpreted  # noqa: F401  # first: it decides how kernels are compiled
from hypothesis import example, given, settings
from hypothesis import strategies as st
from triton import jit
from triton import language as tl

from quasar_core.kernels.triton.routed import MOST_TOKENS, multiply_routed, places_of, routed_blocks, routed_weight
from quasar_core.kernels.triton.routing import NOBODY, add_experts, choose_experts
from quasar_core.kernels.triton.weights import prepare_packed
from quasar_core.models.architectures import ARCHITECTURES
from quasar_core.models.config.mixture import MixtureConfig
from quasar_core.models.decoder.experts import route
from tools.gpu_bench.cases import random_codes, relative_error

CPU = torch.device("cpu")
KINDS = ("softmax", "chosen", "sigmoid")


def choose(scores: torch.Tensor, kind: str, count: int, last: int, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = torch.full((len(scores), count), -7, dtype=torch.int32)
    shares = torch.full((len(scores), count), torch.nan)
    choose_experts(scores, kind, chosen, shares, torch.tensor([last]), **more)
    return chosen, shares


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from(KINDS), st.integers(1, 40), st.booleans(), st.booleans())
def test_the_first_of_equal_experts_is_chosen_first(
    seed: int, kind: str, experts: int, normalised: bool, corrected: bool
) -> None:
    """Scores of few values, so that most are equal to others: a stable sort in float64."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, min(experts, 9) + 1, (), generator=generator))
    scores = torch.randint(-3, 4, (4, experts), generator=generator) / 2
    correction = torch.randint(0, 3, (experts,), generator=generator) / 4 if corrected else None
    chosen, shares = choose(scores, kind, count, 2, normalised=normalised, scale=1.5, correction=correction)
    odds = {"softmax": scores.softmax(-1), "chosen": scores, "sigmoid": scores.sigmoid()}[kind].double()
    rank = odds if correction is None else odds + correction
    best = rank.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    own = odds.gather(1, best)
    if kind == "chosen":
        own = own.softmax(-1)
    elif normalised:
        own = own / own.sum(-1, keepdim=True)
    assert chosen[:3].tolist() == best[:3].tolist()
    assert chosen[3].tolist() == [NOBODY] * count
    torch.testing.assert_close(shares.double(), 1.5 * own, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_choices_are_those_of_the_plain_decoder(kind: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    scores, correction = torch.randn(9, 60, generator=generator), torch.randn(60, generator=generator)
    corrected = correction if kind == "sigmoid" else None
    row = ARCHITECTURES["Glm4MoeForCausalLM"].mixture
    assert row is not None
    for normalised, added in ((False, 0.25), (True, 1e-20), (True, 0.25)):
        config = MixtureConfig(replace(row, added=added), 60, 4, 64, kind, normalised, 2.5, 0, "")
        expected = route(config, scores, corrected)
        found = choose(scores, kind, 4, 8, normalised=normalised, scale=2.5, added=added, correction=corrected)
        assert torch.equal(found[0].long(), expected[0])
        torch.testing.assert_close(found[1], expected[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_that_are_no_numbers_choose_experts_that_there_are(kind: str) -> None:
    """Their token is lost, but nothing is read that lies elsewhere."""
    scores = torch.full((3, 5), torch.nan)
    scores[1, 2], scores[2] = 1.0, -torch.inf
    chosen, _ = choose(scores, kind, 4, 2)
    assert all(len(set(line)) == 4 and set(line) <= set(range(5)) for line in chosen.tolist())


def test_a_token_chooses_alike_whatever_tokens_are_beside_it() -> None:
    scores = torch.randn(40, 100, generator=torch.Generator().manual_seed(0))
    whole = choose(scores, "softmax", 8, 39)
    for t in (0, 7, 39):
        alone = choose(scores[t : t + 1], "softmax", 8, 0)
        assert all(torch.equal(one[0], all_[t]) for one, all_ in zip(alone, whole, strict=True))


@jit
def _slots_kernel(chosen_ptr, found_ptr, counts_ptr, places, by_expert, PLACES: tl.constexpr):
    slot = tl.program_id(0)
    expert, _, count = places_of(slot, chosen_ptr, places, by_expert, PLACES)
    tl.store(found_ptr + slot, expert)
    tl.store(counts_ptr + slot, count)


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 12), st.booleans())
def test_an_expert_has_one_program_of_a_block_and_that_has_all_of_its_rows(
    seed: int, tokens: int, experts: int, by_expert: bool
) -> None:
    """So each is read once, whether programs stand for experts or for places."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(-1, experts, (tokens,), generator=generator, dtype=torch.int32)
    slots = experts if by_expert else tokens
    found, counts = (torch.full((slots,), -7, dtype=torch.int32) for _ in range(2))
    _slots_kernel[(slots,)](chosen, found, counts, tokens, int(by_expert), PLACES=64)
    reads = [(expert, count) for expert, count in zip(found.tolist(), counts.tolist(), strict=True) if count]
    expected = Counter(expert for expert in chosen.tolist() if expert != NOBODY)
    assert len(reads) == len(expected)
    assert dict(reads) == expected


def random_experts(
    bits: int, count: int, inputs: int, outputs: int, group: int
) -> tuple[list[Any], list[torch.Tensor]]:
    """Weights as the kernel takes them, and as they are in float64."""
    if bits == 16:
        generator = torch.Generator().manual_seed(inputs)
        plain = [torch.randn(outputs, inputs, generator=generator).half() for _ in range(count)]
        return list(plain), [weight.double() for weight in plain]
    weights = []
    for expert in range(count):
        codes = random_codes(bits, inputs, outputs, group, symmetric=bits == 8)
        codes.codes.copy_(codes.codes.roll(expert, 1))
        codes.scales.mul_(2**-bits * (1 + expert))
        weights.append(codes)
    return [prepare_packed(codes, CPU, tight=True) for codes in weights], [
        codes.dequantize().double() for codes in weights
    ]


SHAPES = {  # bits; inputs and outputs, of which halves are gates; group
    "16": (16, 168, 128, -1),
    "4, groups of 32": (4, 160, 128, 32),
    "4, one group": (4, 96, 256, -1),
    "8, groups of 64": (8, 192, 128, 64),
    "3, groups of 16": (3, 64, 128, 16),
}


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    name=st.sampled_from(list(SHAPES)),
    tokens=st.one_of(st.integers(1, 18), st.integers(17, MOST_TOKENS)),
    experts=st.integers(1, 7),
    choice=st.sampled_from(["any", "all alike", "mostly nobody"]),
    gated=st.booleans(),
    apart=st.booleans(),
)
@example(seed=0, name="16", tokens=40, experts=3, choice="all alike", gated=True, apart=False)
@example(seed=0, name="4, groups of 32", tokens=40, experts=7, choice="any", gated=False, apart=True)
def test_each_place_is_its_experts_product(
    seed: int, name: str, tokens: int, experts: int, choice: str, gated: bool, apart: bool
) -> None:
    """And the same to the last bit where its token is alone; places of nobody are left as they were."""
    generator = torch.Generator().manual_seed(seed)
    bits, inputs, outputs, group = SHAPES[name]
    count = min(experts, 1 + seed % 3)
    weights, exact = random_experts(bits, experts, inputs, outputs, group)
    weight = routed_weight(weights, count)
    chosen = torch.stack([torch.randperm(experts, generator=generator)[:count] for _ in range(tokens)]).int()
    if choice == "all alike":
        chosen[:] = chosen[0].clone()
    elif choice == "mostly nobody":
        chosen[1:][torch.rand(tokens - 1, generator=generator) < 0.8] = NOBODY
    x = torch.randn(tokens * count if apart else tokens, inputs, generator=generator).half() / inputs**0.5
    width = outputs // 2 if gated else outputs

    def product(rows: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        out = torch.full((own.numel(), width), torch.nan, dtype=torch.float16)
        multiply_routed(rows, weight, own, out, gated)
        return out

    whole = product(x, chosen)
    for place, expert in enumerate(chosen.flatten().tolist()):
        if expert == NOBODY:
            assert whole[place].isnan().all()
            continue
        y = exact[expert] @ x[place if apart else place // count].double()
        gate, up = y.chunk(2)
        assert relative_error(whole[place], torch.nn.functional.silu(gate) * up if gated else y) < 1e-3
    token = seed % tokens
    rows = x[token * count : (token + 1) * count] if apart else x[token : token + 1]
    alone = product(rows.contiguous(), chosen[token : token + 1].contiguous())
    torch.testing.assert_close(alone, whole[token * count : (token + 1) * count], atol=0, rtol=0, equal_nan=True)


def test_places_are_added_in_order_and_those_of_nobody_count_for_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, shares = torch.randn(3 * 4, 1100, generator=generator), torch.randn(3, 5, generator=generator)
    always = torch.randn(3, 1100, generator=generator).half()
    chosen = torch.tensor([[1, 0, 2, 5], [NOBODY] * 4, [3, 1, 4, 0]], dtype=torch.int32)
    rows[4:8] = torch.nan
    for last in (None, always):
        out = torch.full((3, 1100), torch.nan, dtype=torch.float16)
        add_experts(rows, chosen, shares if last is not None else shares[:, :4].contiguous(), out, last)
        for t in range(3):
            total = torch.zeros(1100)
            for j in range(4) if t != 1 else ():
                total += shares[t, j] * rows[4 * t + j]
            if last is not None:
                total += shares[t, 4] * last[t].float()
            assert torch.equal(out[t], total.half())


def test_block_shapes_do_not_depend_on_the_tokens() -> None:
    """They are of a weight alone, and split the inputs so that one token's experts fill the device."""
    weights, _ = random_experts(16, 8, 512, 256, -1)
    weight = routed_weight(weights, 2)
    assert routed_blocks(weight, CPU, gated=False).splits > 1
    many, _ = random_experts(16, 8, 512, 4096, -1)
    assert routed_blocks(routed_weight(many, 8), CPU, gated=False).splits == 1


def test_experts_that_are_not_alike_are_refused() -> None:
    weights, _ = random_experts(16, 2, 64, 64, -1)
    codes, _ = random_experts(4, 2, 64, 64, 32)
    others, _ = random_experts(8, 2, 64, 64, 32)
    for some in ([weights[0], codes[1]], [codes[0], others[1]], [weights[0], weights[1][:32]]):
        with pytest.raises(ValueError, match="not alike"):
            routed_weight(some, 1)
    shifted = torch.zeros(64 * 64 + 1).half()[1:].view(64, 64)
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        routed_weight([shifted, shifted], 1)
