"""Choose each token's experts from the router's scores, and add up what the chosen ones give.

Which experts run is written to device memory and read by the products of `routed.py`, so that a recorded pass serves
any choice. A token has k places, its chosen experts, best first; each place has a row of its own, and a token's rows
are added in the order of its places: so its sum does not depend on the tokens beside it. Letters: T tokens of a pass,
E experts, H hidden size, k experts of a token, S their shares: k, and one more where there is an expert of every token.
"""

import torch
import triton
import triton.language as tl

from quasar_core.kernels.triton.language import overlap, wait

NOBODY = -1  # the expert of tokens that only fill up a pass


def choose_experts(
    scores: torch.Tensor,
    kind: str,
    chosen: torch.Tensor,
    shares: torch.Tensor,
    last: torch.Tensor,
    *,
    normalised: bool = False,
    scale: float = 1.0,
    added: float = 1e-20,
    correction: torch.Tensor | None = None,
    x: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
) -> None:
    """Scores [T, E] float32 → the best experts of each token in chosen [T, k] int32, and shares [T, S] float32.

    Of equal ones the first is better. `kind` is of `models/architectures/row.py`: shares are of a "softmax" over all
    experts, over the "chosen" ones, or a "sigmoid" of the score; `normalised` divides those of a token by their sum, to
    which `added` comes, before `scale`. A `correction` [E] float32 counts where experts are chosen, not in their
    shares. The share of the expert of every token is 1, or the sigmoid of x [T, H] · gate [1, H]. Tokens behind `last`
    [1] int64 choose nobody.
    """
    (tokens, experts), count = scores.shape, chosen.shape[1]
    size = 1 if x is None else x.shape[1]
    _choose_kernel[(tokens,)](
        scores,
        correction,
        x,
        gate,
        last,
        chosen,
        shares,
        experts,
        size,
        scale,
        added,
        KIND=kind,
        NORMALISED=normalised,
        CHOSEN=count,
        SHARES=shares.shape[1],
        LINE=triton.next_power_of_2(shares.shape[1]),
        EXPERTS=triton.next_power_of_2(experts),
        SIZE=triton.next_power_of_2(size),
        HAS_CORRECTION=correction is not None,
        HAS_GATE=gate is not None,
        num_warps=4,
        **overlap(),
    )


@triton.jit
def _choose_kernel(
    scores_ptr,
    correction_ptr,
    x_ptr,
    gate_ptr,
    last_ptr,
    chosen_ptr,
    shares_ptr,
    experts,
    size,
    scale,
    added,
    KIND: tl.constexpr,
    NORMALISED: tl.constexpr,
    CHOSEN: tl.constexpr,
    SHARES: tl.constexpr,
    LINE: tl.constexpr,
    EXPERTS: tl.constexpr,
    SIZE: tl.constexpr,
    HAS_CORRECTION: tl.constexpr,
    HAS_GATE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    token, expert, line = tl.program_id(0), tl.arange(0, EXPERTS), tl.arange(0, LINE)
    known = expert < experts
    wait(OVERLAPS)
    odds = tl.load(scores_ptr + token * experts + expert, mask=known, other=float("-inf"))
    if KIND == "softmax":
        odds = tl.exp(odds - tl.max(odds, axis=0))
        odds = odds / tl.sum(odds, axis=0)
    if KIND == "sigmoid":
        odds = 1 / (1 + tl.exp(-odds))
    rank = odds
    if HAS_CORRECTION:
        rank += tl.load(correction_ptr + expert, mask=known, other=0.0)
    rank = tl.where(rank == rank, rank, float("-inf"))  # what is no number is chosen last, and only once
    left, best = known, tl.full((LINE,), 0, tl.int32)
    share = tl.full((LINE,), float("-inf") if KIND == "chosen" else 0.0, tl.float32)
    for place in tl.static_range(CHOSEN):
        highest = tl.max(tl.where(left, rank, float("-inf")), axis=0)
        found = tl.min(tl.where(left & (rank == highest), expert, EXPERTS), axis=0)
        own = tl.sum(tl.where(expert == found, odds, 0.0), axis=0)
        best, share = tl.where(line == place, found, best), tl.where(line == place, own, share)
        left &= expert != found
    if KIND == "chosen":
        share = tl.exp(share - tl.max(share, axis=0))
        share = share / tl.sum(share, axis=0)
    elif NORMALISED:
        share = share / (tl.sum(share, axis=0) + added)
    share *= scale
    if SHARES > CHOSEN:
        always = 1.0
        if HAS_GATE:
            inputs = tl.arange(0, SIZE)
            x = tl.load(x_ptr + token * size + inputs, mask=inputs < size, other=0.0).to(tl.float32)
            gate = tl.load(gate_ptr + inputs, mask=inputs < size, other=0.0).to(tl.float32)
            always = 1 / (1 + tl.exp(-tl.sum(x * gate, axis=0)))
        share = tl.where(line == CHOSEN, always, share)
    best = tl.where(token <= tl.load(last_ptr), best, -1)
    tl.store(chosen_ptr + token * CHOSEN + line, best, mask=line < CHOSEN)
    tl.store(shares_ptr + token * SHARES + line, share, mask=line < SHARES)


_BLOCK = 1024


def add_experts(
    rows: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor, out: torch.Tensor, always: torch.Tensor | None
) -> None:
    """Rows [T·k, H] float32 of places, times their shares [T, S], in order → out [T, H], rounded once.

    `always` [T, H] is what the expert of every token gives, which comes last. Places of nobody count for nothing,
    whatever their rows hold. One launch.
    """
    size = out.shape[1]
    _add_kernel[(len(out), triton.cdiv(size, _BLOCK))](
        rows,
        chosen,
        shares,
        always,
        out,
        size,
        CHOSEN=chosen.shape[1],
        SHARES=shares.shape[1],
        BLOCK=_BLOCK,
        num_warps=4,
        **overlap(),
    )


@triton.jit
def _add_kernel(
    rows_ptr,
    chosen_ptr,
    shares_ptr,
    always_ptr,
    out_ptr,
    size,
    CHOSEN: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait(OVERLAPS)
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = columns < size
    total = tl.zeros((BLOCK,), tl.float32)
    for place in tl.static_range(CHOSEN):
        row = token * CHOSEN + place
        runs = tl.load(chosen_ptr + row) >= 0
        share = tl.load(shares_ptr + token * SHARES + place)
        total += share * tl.load(rows_ptr + row * size + columns, mask=known & runs, other=0.0)
    if SHARES > CHOSEN:
        share = tl.load(shares_ptr + token * SHARES + CHOSEN)
        total += share * tl.load(always_ptr + token * size + columns, mask=known, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * size + columns, total.to(out_ptr.dtype.element_ty), mask=known)
