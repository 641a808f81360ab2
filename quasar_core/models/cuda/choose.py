"""Choose the recorded pass of a decoder on CUDA, and try it out before anything is written with it."""

import torch

from quasar_core.errors import QuasarError
from quasar_core.kernels.gpu import first_line, on, raise_if_lost
from quasar_core.kernels.triton.adapters import why_not_triton
from quasar_core.models.cuda.graph_pass import POSITION, CudaPass, cache_at, sweeps
from quasar_core.models.cuda.overlap import COUNTS, time_passes, with_overlap
from quasar_core.models.cuda.products import tune_products
from quasar_core.models.cuda.torch_steps import Steps, TorchSteps
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.memory.estimate import LONGEST_PASS, LONGEST_SWEEP
from quasar_core.records import Progress, no_progress

ONLY_TRITON = "experts are chosen on the way, which only Triton's kernels do within a graph"


def why_not(decoder: LeanDecoder) -> str | None:
    """Why a decoder's passes cannot be recorded, or None where they can."""
    if decoder.joint is not None:
        return "a head that predicts further tokens has a joint, which is not recorded"
    if decoder.config.is_recurrent or decoder.config.gates_attention:
        return "states of recurrent layers and gates of attention are not recorded"
    if any(rope.limit is not None for rope in decoder.ropes):
        return "its rotary embedding depends on where a pass ends"
    if any(layer.choice.kernel.name == "reference" for layer in decoder.packed_layers):
        return "the reference kernel dequantizes its weight for every product"
    return None


def choose(decoder: LeanDecoder, progress: Progress = no_progress, fast: bool = False) -> tuple[CudaPass | None, str]:
    """The recorded pass of a decoder on CUDA, or None, and a sentence that says which and why.

    `fast` is whatever is fastest here, although a token's last bits may then depend on the tokens beside it; where
    weights are streamed, which takes longer than any pass, nothing is. Where anything fails in Triton's kernels,
    PyTorch's operations take their place.
    """
    obstacle, fast = why_not(decoder), fast and not sweeps(decoder)
    if obstacle:
        return None, _unrecorded(obstacle)
    steps, why = choose_steps(decoder.device, decoder.dtype)
    obstacle = why_not_mixed(decoder, steps, why)
    if obstacle:
        return None, _unrecorded(obstacle)
    if steps.name == "Triton":
        try:
            with on(decoder.device):
                found, notes = _pass_in_triton(decoder, steps, progress, fast)
            found.note = "; ".join(note for note in [_sentence(decoder, why), *notes] if note)
            return found, found.note
        except Exception as error:  # of a compiler, a kernel, the driver: it is told
            raise_if_lost(error)
            failed = first_line(error)
            if decoder.config.mixture is not None:
                return None, _unrecorded(f"{ONLY_TRITON} ({failed})")
            why = f"PyTorch's operations, not Triton's: {failed}"
    plain = CudaPass(decoder, TorchSteps(), fast=fast)
    plain.note = f"{_sentence(decoder, why)}; a token's logits may differ in the last bits with the tokens beside it"
    return plain, plain.note


def why_not_mixed(decoder: LeanDecoder, steps: Steps, why: str) -> str | None:
    """Why a decoder's experts keep its passes from being recorded, or None where they do not; `why` is of the steps."""
    if decoder.config.mixture is None:
        return None
    if steps.name != "Triton":
        return f"{ONLY_TRITON} ({why})"
    from quasar_core.models.cuda.mixtures import why_not_routed

    return why_not_routed(decoder)


def _unrecorded(obstacle: str) -> str:
    return f"passes: PyTorch's operations, not recorded: {obstacle}"


def _sentence(decoder: LeanDecoder, why: str) -> str:
    if sweeps(decoder):
        return f"passes: up to {LONGEST_SWEEP} tokens at a time, each block when its weights are there, by {why}"
    return f"passes: {LONGEST_PASS} tokens at a time as CUDA graphs of {why}"


def _pass_in_triton(decoder: LeanDecoder, steps: Steps, progress: Progress, fast: bool) -> tuple[CudaPass, list[str]]:
    """Tune the products, then try the pass out, which compiles its kernels; the pass and notes of both."""
    notes = [tune_products(decoder, progress, gates_of_codes=fast)]
    if decoder.config.mixture is not None:
        notes.append("experts are chosen on the device, and each is read once for up to 16 tokens that chose it")
    found = CudaPass(decoder, steps, fast=fast)
    progress("compiling kernels", 0, 1)
    try_out(found)
    progress("compiling kernels", 1, 1)
    if not fast:
        return found, [*notes, "a token's logits do not depend on the tokens beside it"]
    progress("trying fewer launches", 0, 2)
    found, about_norms = with_joined_norms(found)
    progress("trying fewer launches", 1, 2)
    found, about_attention = with_joined_attention(found)
    progress("trying fewer launches", 2, 2)
    progress("trying launches that overlap", 0, 1)
    found, about_overlap = with_overlap(found)
    progress("trying launches that overlap", 1, 1)
    return found, [*notes, about_norms, about_attention, about_overlap]


def with_joined_norms(apart: CudaPass) -> tuple[CudaPass, str]:
    """The pass whose products apply the norms where that can be had and is faster, else the one given; a sentence."""
    from quasar_core.models.cuda.joined_norms import why_not_joined

    obstacle = why_not_joined(apart.decoder)
    if obstacle:
        return apart, f"norms have launches of their own: {obstacle}"
    joined = CudaPass(apart.decoder, apart.steps, fast=True, joins_norms=True)
    found, told = faster_of(apart, joined)
    if found is joined:
        return joined, f"norms join their products: {told}"
    return apart, f"norms have launches of their own: joined to their products, {told}"


MERGES = (0, 4, 16)  # tokens of the passes up to which attention may merge: its last program has the more to do


def with_joined_attention(apart: CudaPass) -> tuple[CudaPass, str]:
    """The pass whose attention rotates, and may merge, by itself where that is faster, else the one given."""
    from quasar_core.models.cuda.triton_steps import Joined, TritonSteps

    best, notes = apart, list[str]()
    for most in MERGES:
        steps = TritonSteps(joined=Joined(turns=True, merges=most))
        joined = CudaPass(apart.decoder, steps, fast=True, joins_norms=apart.joins_norms)
        best, told = faster_of(best, joined)
        merges = f"merges up to {most} tokens" if most else "merges in a launch of its own"
        taken = "attention rotates" if best is joined else "not taken: attention that rotates"
        notes.append(f"{taken} and {merges}: {told}")
    return best, "; ".join(notes)


def faster_of(apart: CudaPass, other: CudaPass) -> tuple[CudaPass, str]:
    """The faster of two passes of a decoder, the first where the other fails; the other's figures, or its error."""
    try:
        try_out(other)
        seconds = time_passes([apart, other], cache_at(apart.decoder, POSITION))
    except Exception as error:  # of a compiler, a kernel, the driver: it is told
        raise_if_lost(error)
        return apart, f"it failed here ({first_line(error)})"
    counts = " and ".join(map(str, COUNTS))
    figures = f"{1e6 * seconds[1]:.0f} µs for passes of {counts}, {1e6 * seconds[0]:.0f} without"
    return (other if seconds[1] < seconds[0] else apart), figures


def choose_steps(device: torch.device, dtype: torch.dtype) -> tuple[Steps, str]:
    """Triton's kernels where they run, else PyTorch's operations; and why."""
    obstacle = why_not_triton(device, dtype)
    if obstacle:
        return TorchSteps(), f"PyTorch's operations, not Triton's: {obstacle}"
    from quasar_core.models.cuda.triton_steps import TritonSteps

    return TritonSteps(), "Triton's kernels"


TRIED = (1, LONGEST_PASS)  # tokens of the passes that are tried out
LARGEST_DIFFERENCE = 0.5  # of the norm of the logits: far more than rounding makes of it


def try_out(fast: CudaPass) -> None:
    """Run passes of one token and of many, as decoding will; QuasarError where they are not what plain ones give."""
    decoder, cache = fast.decoder, cache_at(fast.decoder, POSITION)
    for count in TRIED:
        logits = fast.run([0] * count, cache)
        cache.rollback(POSITION)
        expected = decoder.forward([0] * count, cache)
        cache.rollback(POSITION)
        if not float((logits - expected).norm()) <= LARGEST_DIFFERENCE * float(expected.norm()):
            raise QuasarError(f"a pass of {count} tokens gives other logits than PyTorch's operations do")
