"""Passes whose norms have no launches of their own: the products around them apply them (`kernels/triton/stream.py`).

Seven launches a layer instead of nine. Letters: T tokens of a pass, H hidden size.
"""

from collections.abc import Callable

import torch

from quasar_core.kernels.linear import PackedLinear
from quasar_core.kernels.triton.blocks import Blocks, dense_blocks, packed_blocks
from quasar_core.kernels.triton.packed import LONGEST, multiply_packed
from quasar_core.kernels.triton.products import LONGEST_DENSE, multiply_dense
from quasar_core.kernels.triton.stream import NextNorm, Stream, begin_stream
from quasar_core.kernels.triton.weights import TritonWeight
from quasar_core.models.cuda.products import all_products
from quasar_core.models.cuda.triton_steps import gated_part
from quasar_core.models.decoder.layer import DecoderLayer, DenseLinear, Linear
from quasar_core.models.decoder.lean_decoder import LeanDecoder

Attention = Callable[[int, torch.Tensor], torch.Tensor]  # of a block: its product of queries, keys and values → mixed


def why_not_joined(decoder: LeanDecoder) -> str | None:
    """Why the products of a decoder cannot apply its norms, or None where they can."""
    if decoder.dtype != torch.bfloat16:
        return "rows that are not normed yet may be too large for float16"
    if not all(_is_plain(decoder, layer) for layer in decoder.layers):
        return "its blocks have more than a norm before attention and one before a gated MLP"
    if not all(map(_runs_in_triton, [*all_products(decoder.layers), decoder.head])):
        return "not all of its products are Triton's"
    return None


def _is_plain(decoder: LeanDecoder, layer: DecoderLayer) -> bool:
    """Whether a block is a norm and attention, a norm and a gated MLP, each added to the stream as it is."""
    config, norms = decoder.config, (layer.input_norm, layer.mlp_norm, decoder.norm)
    others = (layer.out_norm, layer.down_norm, layer.input_gate, layer.scalar, layer.experts, layer.recurrence)
    return (
        all(norm is not None and norm.dtype == decoder.dtype for norm in norms)
        and all(other is None for other in others)
        and (config.residual_scale, config.gated, config.activation) == (1, True, "silu")
        and gated_part(layer.mlp[0]) is not None
    )


def _runs_in_triton(product: Linear) -> bool:
    if isinstance(product, PackedLinear):
        return isinstance(product.prepared, TritonWeight)
    return isinstance(product, DenseLinear)


def run_joined(decoder: LeanDecoder, hidden: torch.Tensor, attention: Attention) -> torch.Tensor:
    """All blocks over embeddings [T, H], which become the residual stream, and the head → its product [T, V]."""
    norms = [*(layer.input_norm for layer in decoder.layers), decoder.norm]
    stream = begin_stream(hidden, _there(norms[0]), decoder.config.eps)
    for index, layer in enumerate(decoder.layers):
        mixed = attention(index, _multiply(layer.qkv, stream))
        stream = _add(layer.out, mixed, stream, _there(layer.mlp_norm))
        gate_up, down = layer.mlp
        stream = _add(down, _multiply(gate_up, stream, gated=True), stream, _there(norms[index + 1]))
    return _multiply(decoder.head, stream)


def _there(norm: torch.Tensor | None) -> torch.Tensor:
    assert norm is not None  # as `why_not_joined` has seen
    return norm


def _multiply(product: Linear, stream: Stream, gated: bool = False) -> torch.Tensor:
    """The product of the normed stream [T, H] → [T, out], or where it ends with a gate [T, out ÷ 2]."""
    multiply, weight, bias, outputs, most, blocks = _kernel(product, stream.hidden.device, gated)
    out = stream.hidden.new_empty(len(stream.hidden), outputs // 2 if gated else outputs)
    for begin in range(0, len(out), most):
        part = stream.rows(begin, begin + most)
        multiply(part.scaled, weight, out[begin : begin + most], bias, blocks=blocks, gated=gated, behind=part)
    return out


def _add(product: Linear, x: torch.Tensor, stream: Stream, norm: torch.Tensor) -> Stream:
    """The stream with the product of x [T, in] added to it, in place, before the next norm."""
    multiply, weight, bias, outputs, most, blocks = _kernel(product, x.device, gated=False)
    hidden = stream.hidden
    squares = x.new_empty(len(x), -(-outputs // blocks.outputs), dtype=torch.float32)
    found = Stream(hidden, torch.empty_like(hidden), squares, stream.eps)
    for begin in range(0, len(x), most):
        part = found.rows(begin, begin + most)
        before = NextNorm(norm, part.scaled, part.squares)
        rows = x[begin : begin + most]
        multiply(rows, weight, part.hidden, bias, part.hidden, blocks=blocks, before=before)
    return found


def _kernel(
    product: Linear, device: torch.device, gated: bool
) -> tuple[Callable[..., None], TritonWeight | torch.Tensor, torch.Tensor | None, int, int, Blocks]:
    """The kernel, weight, bias, outputs, rows of a launch, and block shapes."""
    if isinstance(product, PackedLinear):
        weight: TritonWeight = product.prepared
        blocks = packed_blocks(weight, device, gated)
        return multiply_packed, weight, product.bias, weight.out_features, LONGEST, blocks
    assert isinstance(product, DenseLinear)
    plain = product.weight
    return multiply_dense, plain, product.bias, len(plain), LONGEST_DENSE, dense_blocks(plain, device, gated)
