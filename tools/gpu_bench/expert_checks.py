"""Check the kernels of mixtures of experts: the choice exactly, products and sums against float64."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from quasar_core.kernels.triton.routed import RoutedWeight, multiply_routed, routed_weight
from quasar_core.kernels.triton.routing import NOBODY, add_experts, choose_experts
from quasar_core.kernels.triton.weights import prepare_packed
from tools.gpu_bench.cases import TOLERANCE, Case, name_of, poisoned, randn, random_codes, relative_error

TOKENS = (40, 17, 16, 3, 1)  # of passes that must agree in every bit where they have the same tokens
SHARES = 1e-5  # how far shares may be off, of exponentials and sums in float32


@dataclass(frozen=True)
class MixtureShape:
    """Sizes of a mixture, and experts of a token."""

    hidden: int
    inner: int
    experts: int
    chosen: int

    def __str__(self) -> str:
        return f"{self.chosen} of {self.experts} experts {self.inner}×{self.hidden}"


SMALL = (MixtureShape(160, 64, 6, 3),)
LARGE = (MixtureShape(2048, 768, 128, 8), MixtureShape(4096, 3584, 8, 2))  # Qwen3-30B-A3B; a quarter of Mixtral 8x7B


def expert_cases(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """Mixtures of experts in 16 bits and on codes."""
    for shape in SMALL if small else (*SMALL, *LARGE):
        for bits, symmetric in ((16, True), (4, True), (4, False), (8, True)):
            codes = f"{bits} bits{'' if symmetric else ' asymmetric'}"
            yield f"{codes}, {shape} {name_of(dtype)}", partial(_mixture, shape, bits, symmetric, device, dtype)


def choice_of_experts_cases(device: torch.device) -> Iterator[Case]:
    """Choices of experts, which are exact, and their shares."""
    for kind in ("softmax", "chosen", "sigmoid"):
        for tied in (False, True):
            name = f"experts by {kind}{', ties' if tied else ''}"
            yield name, partial(_choice, kind, tied, device)


def _choice(kind: str, tied: bool, device: torch.device) -> tuple[float, float]:
    tokens, experts, count, scale, last = 5, 100, 6, 1.5, 3
    scores = randn(tokens, experts, device=device)
    if tied:
        scores = (4 * scores).round() / 4
    x, gate = randn(tokens, 96, device=device), randn(1, 96, device=device)
    correction = (8 * randn(experts, device=device)).round() / 64 if kind == "sigmoid" else None
    chosen = torch.full((tokens, count), -7, dtype=torch.int32, device=device)
    shares = poisoned(tokens, count + 1, device=device, dtype=torch.float32)
    more: dict[str, Any] = {"correction": correction, "x": x, "gate": gate}
    end = torch.tensor([last], device=device)
    choose_experts(scores, kind, chosen, shares, end, normalised=kind == "sigmoid", scale=scale, **more)
    exact = scores.double()
    odds = {"softmax": exact.softmax(-1), "chosen": exact, "sigmoid": exact.sigmoid()}[kind]
    rank = odds if correction is None else odds + correction.double()
    best = rank.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    own = odds.gather(1, best)
    own = own.softmax(-1) if kind == "chosen" else own / own.sum(-1, keepdim=True) if kind == "sigmoid" else own
    always = (x.double() @ gate.double().t()).sigmoid()
    expected = torch.where(torch.arange(tokens, device=device)[:, None] <= last, best, NOBODY)
    error = relative_error(shares, torch.cat((scale * own, always), -1))
    return error if torch.equal(chosen.long(), expected) else math.nan, SHARES


def _mixture(
    shape: MixtureShape, bits: int, symmetric: bool, device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Gates, down and sum of passes of several lengths, whose last token chooses nobody; NaN where they disagree."""
    gate_up, exact_up = _experts(shape, bits, symmetric, (shape.hidden, 2 * shape.inner), device, dtype)
    down, exact_down = _experts(shape, bits, symmetric, (shape.inner, shape.hidden), device, dtype)
    most = TOKENS[0]
    x, always = (randn(most, shape.hidden, device=device, dtype=dtype) for _ in range(2))
    chosen = _some_experts(shape, most, device)
    shares = randn(most, shape.chosen + 1, device=device)
    exact = _exact(x, chosen, shares, exact_up, exact_down) + shares[:, -1:].double() * always.double()
    worst, of_all, depends = 0.0, None, False  # whether a row depends on the tokens beside it
    for count in TOKENS:
        rows = slice(most - count, most)
        own, places = chosen[rows].contiguous(), count * shape.chosen
        gated = poisoned(places, shape.inner, device=device, dtype=dtype)
        results = poisoned(places, shape.hidden, device=device, dtype=torch.float32)
        out = poisoned(count, shape.hidden, device=device, dtype=dtype)
        multiply_routed(x[rows].contiguous(), gate_up, own, gated, gated=True)
        multiply_routed(gated, down, own, results)
        add_experts(results, own, shares[rows].contiguous(), out, always[rows].contiguous())
        of_all = out if of_all is None else of_all
        depends |= not torch.equal(out, of_all[rows])
        worst = max(worst, relative_error(out, exact[rows]))
    return math.nan if depends else worst, 2 * TOLERANCE[dtype]


def _some_experts(shape: MixtureShape, tokens: int, device: torch.device) -> torch.Tensor:
    """Different ones for each token, but one that most tokens choose, some that none does, and a token of nobody's."""
    chosen = randn(tokens, shape.experts, device=device)[:, : shape.experts - 1].topk(shape.chosen).indices
    favourite = shape.experts - 2
    chosen[: tokens - 10, -1] = torch.where((chosen == favourite).any(-1), chosen[:, -1], favourite)[: tokens - 10]
    chosen[-2] = NOBODY
    return chosen.to(torch.int32)


def _experts(
    shape: MixtureShape,
    bits: int,
    symmetric: bool,
    sizes: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[RoutedWeight, Sequence[Any]]:
    """One product of all experts as the kernels take it, and what gives each expert's exact weight [out, in]."""
    inputs, outputs = sizes
    if bits == 16:
        whole = randn(shape.experts, outputs, inputs, device=device, dtype=dtype) / math.sqrt(inputs)
        weights = list(whole.to(dtype))
        return routed_weight(weights, shape.chosen), [weight.double for weight in weights]
    codes = random_codes(bits, inputs, outputs, 32 if inputs % 128 else 128, symmetric, device)
    codes = replace(codes, scales=codes.scales / (2 ** (bits - 2) * math.sqrt(inputs)))
    own = [replace(codes, codes=codes.codes.roll(expert, 1).contiguous()) for expert in range(shape.experts)]
    packed = [prepare_packed(code, device, tight=True) for code in own]
    return routed_weight(packed, shape.chosen), [lambda code=code: code.dequantize().double() for code in own]


def _exact(
    x: torch.Tensor,
    chosen: torch.Tensor,
    shares: torch.Tensor,
    gate_up: Sequence[Any],
    down: Sequence[Any],
) -> torch.Tensor:
    """The sum of what each token's experts give, expert by expert, in float64."""
    total = torch.zeros_like(x, dtype=torch.float64)
    for expert in range(len(gate_up)):
        tokens, places = torch.where(chosen == expert)
        if len(tokens):
            gate, up = (x[tokens].double() @ gate_up[expert]().t()).chunk(2, -1)
            y = (torch.nn.functional.silu(gate) * up) @ down[expert]().t()
            total.index_add_(0, tokens, y * shares[tokens, places].double()[:, None])
    return total
