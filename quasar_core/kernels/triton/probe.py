"""One small kernel that decides whether Triton's kernels run on a device: built, launched and checked once a process.

A wheel of Triton comes with PyTorch; what it builds at run time needs a C compiler, Python's headers and a driver that
knows its code, and a machine may lack each of these.
"""

import torch
import triton
import triton.language as tl

from quasar_core.kernels.triton.language import matrix_product, subtract_pairs

_SIZE = 16


@triton.jit
def _probe_kernel(a_ptr, pairs_ptr, out_ptr, differences_ptr, SIZE: tl.constexpr):
    """A product on the tensor cores, and the assembly that unpacks codes."""
    line = tl.arange(0, SIZE)
    places = line[:, None] * SIZE + line[None, :]
    a = tl.load(a_ptr + places)
    tl.store(out_ptr + places, matrix_product(a, a, tl.zeros((SIZE, SIZE), tl.float32)))
    pairs = tl.load(pairs_ptr + line)
    tl.store(differences_ptr + line, subtract_pairs(pairs, pairs, a.dtype))


def why_not_built(device: torch.device) -> str | None:
    """Run it; what it gave wrongly, or None. Raises whatever building or launching raises."""
    a = (torch.arange(_SIZE * _SIZE, device=device) % 7 - 3).view(_SIZE, _SIZE).to(torch.bfloat16)
    pairs = torch.full((_SIZE,), 0x43054307, dtype=torch.int32, device=device)  # 133 and 135
    out = torch.empty(_SIZE, _SIZE, device=device)
    differences = torch.full_like(pairs, -1)
    _probe_kernel[(1,)](a, pairs, out, differences, SIZE=_SIZE)
    if torch.equal(out, (a.double() @ a.double()).float()) and not bool(differences.any()):
        return None
    return "a kernel of it computes wrongly here"
