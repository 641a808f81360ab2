"""What the kernels share of Triton's language, and the two places where its interpreter computes otherwise.

The interpreter holds bfloat16 as bare bits, so products are taken in float32 there (the same sums, as a product of two
16-bit numbers is exact in float32), and it knows no inline assembly.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
ROWS = tl.constexpr(
    16
)  # rows of a pass as tensor cores take them: the tile of every product, so that T changes nothing


@triton.jit
def matrix_product(a, b, acc):
    """acc + a·b: 16-bit operands, float32 accumulator."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Float32 x as it would be after a store in `dtype`."""
    return x.to(dtype).to(tl.float32)


@triton.jit
def subtract_pairs(pairs, offsets, dtype: tl.constexpr):
    """Two 16-bit floats in each int32, minus two others; both are small whole numbers, so nothing is rounded."""
    negative = offsets ^ -2147450880  # 0x80008000, the signs
    if dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [pairs, 0x3F803F80, negative], tl.int32, True, 1
        )
    return tl.inline_asm_elementwise(
        "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [pairs, 0x3C003C00, negative], tl.int32, True, 1
    )
