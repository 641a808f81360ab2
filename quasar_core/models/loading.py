"""Load target and verifier: choose each one's decoder, our own or transformers, and its fast pass; say which and why.

The plain pass of `lean_decoder.py` is a few PyTorch operations per layer, on any device and for any number of tokens. A
fast pass computes the same for a few tokens at a time, near the floor that memory sets.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.errors import QuasarError
from quasar_core.kernels.cpu.causal_attention import describe_left_out as describe_fused_attention
from quasar_core.kernels.cpu.library import SOURCE, needs_compiling, why_not_here, why_switched_off
from quasar_core.kernels.linear import PackedLinear
from quasar_core.malloc import return_freed_memory
from quasar_core.models.base import CausalLM, FastPass
from quasar_core.models.cpu import cpu_pass
from quasar_core.models.cpu.compressed_weights import compress as compress_weights
from quasar_core.models.cuda import choose as cuda
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.memory.offload import OffloadPlan
from quasar_core.models.weights import lean_weights
from quasar_core.models.weights.lean_weights import why_folder_not_lean
from quasar_core.models.weights.streaming import LayerStream
from quasar_core.models.weights.verifier_head import round_head
from quasar_core.page_cache import forget_file
from quasar_core.records import Progress, no_progress
from quasar_core.store.gguf import describe_gguf
from quasar_core.store.safetensors_header import weight_files


def recurrent_layers_in(folder: Path, trust_remote_code: bool = False) -> str | None:
    """What kind of layers of a model keep a state that cannot be moved back; our own decoder moves all of them."""
    if why_folder_not_lean(folder) is None:
        return None
    from quasar_core.models.hf.cache import recurrent_layers_of

    return recurrent_layers_of(folder, trust_remote_code)


def refuse_drafts(name: str, folder: Path, trust_remote_code: bool = False) -> None:
    """QuasarError, before any work, for a verifier or drafts where the model cannot go back."""
    kind = recurrent_layers_in(folder, trust_remote_code)
    if kind is not None:
        raise QuasarError(
            f"{name} has {kind}, whose state cannot be moved back to an earlier token, so neither a verifier nor "
            "drafts are of use to it: generate plainly, with --verify full --draft none."
        )


def attach(decoder: LeanDecoder, progress: Progress = no_progress, fast: bool = False) -> str:
    """Give a decoder its fast pass, where there is one; a sentence that says which and why."""
    decoder.fast, note = choose(decoder, progress, fast)
    return note


def choose(decoder: LeanDecoder, progress: Progress = no_progress, fast: bool = False) -> tuple[FastPass | None, str]:
    """The fast pass for a decoder, or None, and a sentence that says which and why.

    `fast` is for a GPU: whatever is fastest there, although a token's last bits may depend on the tokens beside it.
    """
    if decoder.device.type == "cuda":
        return cuda.choose(decoder, progress, fast)
    if decoder.device.type != "cpu":
        return None, f"passes: PyTorch's operations, as there is no fast pass for {decoder.device.type}"
    obstacle = cpu_pass.why_not(decoder)
    if obstacle:
        return None, f"passes: PyTorch's operations, not the C++ pass: {obstacle}"
    passes = cpu_pass.CpuPass(decoder)
    form = cpu_pass.describe_form()
    return passes, f"passes: in C++, {passes.longest} tokens at a time, for {form}{cpu_pass.remark()}"


def _transformers_models() -> Any:
    """What loads models through transformers, whose models take seconds to import: nobody else is to wait for that."""
    from quasar_core.models.hf import causal_lm

    return causal_lm


@dataclass(frozen=True)
class LoadedModels:
    """Target and verifier over caches of one kind, and one note for each choice made."""

    target: CausalLM | None
    verifier: CausalLM | None
    notes: Sequence[str]


def load_models(
    folder: Path,
    checkpoint: VerifierCheckpoint | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    kernel: str = "auto",
    use_target: bool = True,
    fast: bool = False,
    trust_remote_code: bool = False,
    offload: OffloadPlan | None = None,
    sparing: bool = False,
    rounds_head: bool = True,
    compress: bool | None = None,
    progress: Progress = no_progress,
) -> LoadedModels:
    """Load the target of `folder` (unless `use_target` is false) and the verifier of `checkpoint` (where given).

    With a plan of `offload` blocks of the target are streamed; then, and where `sparing` memory is asked for, nothing
    of the files stays in memory. `rounds_head` allows a verifier's head in 8 bits beside the target's
    (`verifier_head.py`), which takes memory; `compress` holds weights of bfloat16 in 12 bits, with None where that is
    faster (`compressed_weights.py`).
    """
    obstacle = why_folder_not_lean(folder)
    library = _transformers_models() if obstacle else lean_weights
    notes = [f"decoder: transformers, as {obstacle}" if obstacle else "decoder: our own"]
    if device.type == "cpu":
        notes += [*_unless_empty(_load_kernels(progress)), *_unless_empty(describe_fused_attention())]
    target = verifier = None
    if use_target:
        if obstacle:
            progress("reading weights", 0, 1)
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        if not obstacle:
            options = {"progress": progress, "sparing": sparing, **(offload.of_target(device) if offload else {})}
        target = library.load_target(folder, device, dtype, **options)
        notes += [*describe_left_out(target), *describe_dequantized(folder)]
    if checkpoint is not None:
        checkpoint.tensors.sparing = sparing or offload is not None
        progress("reading the verifier", 0, 1)
        if target is None:
            verifier = library.load_verifier_alone(checkpoint, device, dtype, kernel, progress)
        else:
            verifier = library.attach_verifier(target, checkpoint, kernel, progress)
        if isinstance(verifier, LeanDecoder) and kernel == "auto" and rounds_head and offload is None:
            notes += _unless_empty(round_head(verifier, progress))
        progress("reading the verifier", 1, 1)
        notes += describe_verifier(checkpoint, verifier)
    lean = [model for model in (target, verifier) if isinstance(model, LeanDecoder)]
    notes += _unless_empty(compress_weights(lean, compress, progress))
    notes += describe_passes({"target": target, "verifier": verifier}, progress, fast)
    if offload or sparing:
        tidy_up(folder, checkpoint)
    if offload:
        notes += describe_stream(target, offload, progress)
    return LoadedModels(target, verifier, notes)


def _load_kernels(progress: Progress) -> str | None:
    """Load the C++ of passes and products, compiled first where it is not there yet; a note where it cannot be had."""
    if why_switched_off():
        return None
    stage = "compiling kernels" if needs_compiling(SOURCE) else "loading kernels"
    progress(stage, 0, 1)
    why = why_not_here()
    progress(stage, 1, 1)
    return f"kernels: PyTorch's operations, several times slower than C++: {why}" if why else None


def _unless_empty(note: str | None) -> list[str]:
    return [note] if note else []


def tidy_up(folder: Path, checkpoint: VerifierCheckpoint | None) -> None:
    """Leave nothing in memory of what loading took on the way: no pages of files, no freed memory."""
    return_freed_memory()
    for place in [folder, *([checkpoint.folder] if checkpoint else [])]:
        for file in weight_files(place):
            forget_file(file)


def describe_stream(target: CausalLM | None, plan: OffloadPlan, progress: Progress = no_progress) -> list[str]:
    """A note of what is streamed, and how fast: the first blocks are read."""
    assert isinstance(target, LeanDecoder)
    assert isinstance(target.source, LayerStream)
    target.source.spare = plan.spare
    progress("reading the first streamed blocks", 0, 1)
    target.source.start()
    progress("reading the first streamed blocks", 1, 1)
    return [plan.describe(target.source)]


def describe_left_out(target: CausalLM) -> list[str]:
    """A note of stored tensors that transformers has no place for, and leaves out of the model."""
    names = getattr(target, "left_out", ())
    return [f"weights: {len(names)} stored tensors are not of this model, such as {names[0]}"] if names else []


def describe_dequantized(folder: Path) -> list[str]:
    """Notes of weights that are stored in 8-bit blocks, and of those that come from a GGUF file."""
    count = TensorFiles(folder).dequantized
    coded = f"weights: {count} are stored in 8-bit floats with scales, and dequantized to bfloat16"
    return [note for note in (coded if count else None, describe_gguf(folder)) if note]


def describe_passes(
    models: Mapping[str, CausalLM | None], progress: Progress = no_progress, fast: bool = False
) -> list[str]:
    """Give our own decoders their fast passes; one note for all of them, or one for each where they differ."""
    lean = {name: model for name, model in models.items() if isinstance(model, LeanDecoder)}
    notes = {name: attach(model, progress, fast) for name, model in lean.items()}
    if len(set(notes.values())) == 1:
        return list(notes.values())[:1]
    return [f"{note} ({name})" for name, note in notes.items()]


def describe_verifier(checkpoint: VerifierCheckpoint, verifier: Any) -> list[str]:
    """Notes of how the checkpoint's zeros are read, and of the kernels that multiply its weights."""
    zeros = checkpoint.describe_zeros()
    return [*_unless_empty(zeros and f"zeros: {zeros}"), *describe_kernels_in_use(verifier.packed_layers)]


def describe_kernels_in_use(layers: Iterable[PackedLinear]) -> list[str]:
    """One note for each kernel: how many products run on it, and why."""
    choices: dict[tuple[str, str], int] = {}
    for layer in layers:
        key = (layer.choice.kernel.name, layer.choice.reason)
        choices[key] = choices.get(key, 0) + 1
    return [f"kernel: {name} for {count} products, {reason}" for (name, reason), count in choices.items()]
