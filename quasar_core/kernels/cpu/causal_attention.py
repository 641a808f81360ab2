"""Attention of a prompt's tokens in C++, in bfloat16 (`causal_attention.h`): four times as fast as PyTorch's.

Measured on a Zen 5 core, 512 tokens, 9 heads of 64 numbers over 3: 1.5 ms and 7.0. With AMX PyTorch has other code, so
it is left to it. Letters: B texts, T queries, L keys, H heads, D numbers of a head.
"""

import ctypes

import torch

from quasar_core.kernels.cpu.library import AttentionShape, library, why_not_here
from quasar_core.system import processor_flags

HEAD_SIZES = 32  # what a head's size is a multiple of


def attends(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Whether attention of heads of this kind is computed here: by a processor that multiplies bfloat16 in pairs."""
    if device.type != "cpu" or dtype != torch.bfloat16 or size % HEAD_SIZES or _pytorch_has_tiles():
        return False
    return why_not_here() is None and bool(library().quasar_multiplies_pairs())


def _pytorch_has_tiles() -> bool:
    return "amx_bf16" in processor_flags() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _leave_out_what_fails() -> None:
    """Have PyTorch attend by plain products where its fused kernel of bfloat16 fails."""
    if _fused_fails():
        torch.backends.cuda.enable_flash_sdp(False)  # that of CPUs too


def _fused_fails() -> bool:
    """Whether PyTorch's fused attention of bfloat16 refuses its own layout.

    With ATEN_CPU_CAPABILITY below AVX-512 on a processor with tiles it takes these all the same, and then refuses to
    lay out what they multiply (PyTorch 2.13: "pack_vnni2 is only supported when avx512 is supported").
    """
    return "amx_bf16" in processor_flags() and not _pytorch_has_tiles()


def describe_left_out() -> str | None:
    """A note where PyTorch's fused attention is switched off; None where it is not."""
    if not _fused_fails():
        return None
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"attention: not PyTorch's fused kernel, which fails at ATEN_CPU_CAPABILITY {capability} on a processor with "
        "AMX: C++, or plain products"
    )


_leave_out_what_fails()


def causal_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
) -> torch.Tensor:
    """Queries [B, H, T, D] over keys and values [B, fewer H, L, D], T ≤ L, D a multiple of `HEAD_SIZES` → [B, H, T, D].

    The last query sees the last key, each one before it a key less, and no more than `window` of them. Scores are
    multiplied by `scale`, and then held below a soft `cap`, where there is one. What is returned lies token by token.
    """
    texts, heads, count, size = queries.shape
    tensors = [each if each.stride(-1) == 1 else each.contiguous() for each in (queries, keys, values)]
    tensors.append(queries.new_empty(texts, count, heads, size).transpose(1, 2))
    strides = (ctypes.c_int64 * 12)(*(stride for each in tensors for stride in each.stride()[:3]))
    shape = AttentionShape(heads, keys.shape[1], count, keys.shape[2], size, window or 0, scale, cap or 0.0)
    pointers = (each.data_ptr() for each in tensors)
    library().quasar_attend_causally(
        *pointers, ctypes.addressof(strides), texts, ctypes.byref(shape), torch.get_num_threads()
    )
    return tensors[3]
