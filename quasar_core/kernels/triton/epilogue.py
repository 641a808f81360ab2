"""The end of every product: the parts of a split sum added in order, then bias and residual, then one rounding.

A gated product's block holds as many gates as outputs that they gate: silu(gate) · up is what it stores.
"""

import triton
import triton.language as tl


@triton.jit
def finish(
    acc,  # [BLOCK, ROWS] float32
    block,
    split,
    outputs,  # [BLOCK]
    rows,  # [ROWS]
    out_ptr,
    bias_ptr,
    residual_ptr,
    partials_ptr,
    counters_ptr,
    count,
    out_features,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
):
    """Each program leaves its part; the last to arrive at a block adds all parts, in order, whoever it is.

    So sums do not depend on which program is last, and the counter is zero again for the next call.
    """
    places = rows[None, :] * out_features + outputs[:, None]
    inside = (rows[None, :] < count) & (outputs[:, None] < out_features)
    if SPLITS == 1:
        store(
            acc, places, inside, block, outputs, rows, out_ptr, bias_ptr, residual_ptr, count, out_features, HAS_BIAS,
            HAS_RESIDUAL, GATED,
        )  # fmt: skip
    else:
        part = count * out_features
        tl.store(partials_ptr + split * part + places, acc, mask=inside)
        tl.debug_barrier()  # all threads have stored before one of them says so
        arrived = tl.atomic_add(counters_ptr + block, 1, sem="acq_rel")
        if arrived == SPLITS - 1:
            total = tl.zeros_like(acc)
            for i in range(SPLITS):
                total += tl.load(partials_ptr + i * part + places, mask=inside, other=0.0, cache_modifier=".cg")
            store(
                total, places, inside, block, outputs, rows, out_ptr, bias_ptr, residual_ptr, count, out_features,
                HAS_BIAS, HAS_RESIDUAL, GATED,
            )  # fmt: skip
            tl.store(counters_ptr + block, 0)


@triton.jit
def store(
    total,
    places,
    inside,
    block,
    outputs,
    rows,
    out_ptr,
    bias_ptr,
    residual_ptr,
    count,
    out_features,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
):
    """Bias and residual added in float32, and the gate in float32 too."""
    if HAS_BIAS:
        bias = tl.load(bias_ptr + outputs, mask=outputs < out_features, other=0.0)
        total += bias.to(tl.float32)[:, None]
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + places, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        half: tl.constexpr = total.shape[0] // 2
        gate, up = tl.split(tl.permute(tl.reshape(total, (2, half, total.shape[1])), (1, 2, 0)))
        columns = block * half + tl.arange(0, half)
        places = rows[None, :] * (out_features // 2) + columns[:, None]
        inside = (rows[None, :] < count) & (columns[:, None] < out_features // 2)
        total = gate / (1 + tl.exp(-gate)) * up
    tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def outputs_of(block, out_features, SIZE: tl.constexpr, GATED: tl.constexpr):
    """Which outputs a program has: SIZE neighbours; or half as many gates, then the outputs that these gate."""
    line = tl.arange(0, SIZE)
    if GATED:
        half: tl.constexpr = SIZE // 2
        return block * half + line % half + line // half * (out_features // 2)
    return block * SIZE + line
