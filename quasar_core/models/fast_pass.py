"""A decoder's short passes brought near their floor, on the devices where quasar knows how.

The plain pass of `decoder.py` is a few PyTorch operations per layer, on any device; prompts run on it. A fast pass
computes the same for a few tokens at a time, and runs all passes of decoding.
"""

from quasar_core.models import cpu_pass, cuda_pass
from quasar_core.models.base import FastPass
from quasar_core.models.decoder import LeanDecoder
from quasar_core.records import Progress, no_progress

__all__ = ["FastPass", "attach", "choose"]


def attach(decoder: LeanDecoder, progress: Progress = no_progress) -> str:
    """Give a decoder its fast pass, where there is one; a sentence that says which and why."""
    decoder.fast, note = choose(decoder, progress)
    return note


def choose(decoder: LeanDecoder, progress: Progress = no_progress) -> tuple[FastPass | None, str]:
    """The fast pass for a decoder, or None, and a sentence that says which and why."""
    if decoder.device.type == "cuda":
        return cuda_pass.choose(decoder, progress)
    if decoder.device.type != "cpu":
        return None, f"passes: PyTorch's operations, as there is no fast pass for {decoder.device.type}"
    obstacle = cpu_pass.why_not(decoder)
    if obstacle:
        return None, f"passes: PyTorch's operations, not the C++ pass: {obstacle}"
    fast = cpu_pass.CpuPass(decoder)
    return fast, f"passes: in C++, {fast.longest} tokens at a time{cpu_pass.remark()}"
