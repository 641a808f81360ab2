"""The gate of an MLP: silu(gate) · up."""

import torch
import triton
import triton.language as tl

_BLOCK = 1024


def silu_multiply(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """gate_up [T, 2·I], gates first → out [T, I]; in float32, rounded once."""
    inner = out.shape[1]
    _silu_kernel[(out.shape[0], triton.cdiv(inner, _BLOCK))](gate_up, out, inner, BLOCK=_BLOCK, num_warps=4)


@triton.jit
def _silu_kernel(gate_up_ptr, out_ptr, inner, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = columns < inner
    gates = gate_up_ptr + row * 2 * inner + columns
    gate = tl.load(gates, mask=known, other=0.0).to(tl.float32)
    up = tl.load(gates + inner, mask=known, other=0.0).to(tl.float32)
    product = gate / (1 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * inner + columns, product.to(out_ptr.dtype.element_ty), mask=known)
