"""Find the files of a target and its verifier, check that they belong together, and load them over one cache."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

import torch
from transformers import PreTrainedTokenizerBase

from quasar_core.checkpoint.checks import check_digest
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.config import GROUP_CHOICES, LoadOptions, QuantizeConfig
from quasar_core.decode.logits.processors import read_processors
from quasar_core.errors import QuasarError, UsageError
from quasar_core.files import absolute, exists, is_folder
from quasar_core.kernels.select import check_kernel_name
from quasar_core.kernels.threads import most_threads
from quasar_core.models.context import UNLIMITED, context_limit
from quasar_core.models.device import choose_device, choose_dtype
from quasar_core.models.drafting.assistant import load_assistant
from quasar_core.models.drafting.mtp import head_bytes, head_of
from quasar_core.models.loading import LoadedModels, load_models, recurrent_layers_in, refuse_drafts
from quasar_core.models.memory.device_offload import plan_on_device
from quasar_core.models.memory.estimate import pair_need, require_room
from quasar_core.models.memory.offload import OffloadPlan, plan_offload
from quasar_core.models.pair import Encode, Pair, end_of_text_ids, load_tokenizer, refuse_long
from quasar_core.records import Progress, no_progress
from quasar_core.store import (
    ModelSource,
    PairRecord,
    current_pair,
    default_output,
    fingerprint,
    list_pairs,
    pair_named,
    resolve_model,
)
from quasar_core.store.folders import is_verifier, read_card
from quasar_core.store.model_config import read_config
from quasar_core.store.safetensors_header import weight_bytes


def load(options: LoadOptions, progress: Progress = no_progress, encode: Encode | None = None) -> Pair:
    """Load target and verifier over one cache; what the mode does not need is left out.

    Where the verifier's files are checked first, a note says what was found. Where the prompt is known already,
    `encode` makes its tokens: one that the context does not hold is refused before weights are read. Raises UsageError
    where there is no pair, or no verifier, and QuasarError for a verifier that was made from another target or whose
    files are damaged, and for a pair that a GPU's memory cannot hold.
    """
    check_kernel_name(options.kernel)
    source, checkpoint = find_pair_files(options)
    if options.draft != "none":
        refuse_drafts(source.label, source.folder, options.trust_remote_code)
    numbers = _choose_numbers(source.folder, options)
    tokenizer = load_tokenizer(source.folder, options.trust_remote_code)  # refused in a moment, weights take minutes
    if encode is not None:
        refuse_long(encode(tokenizer), numbers.context, numbers.context_is_asked)
    digest = [f"digest: {_found(checkpoint, progress)}"] if options.check_digest else []
    room, plan = _plan_memory(source.folder, checkpoint, numbers, options, progress)
    models = load_models(
        source.folder,
        checkpoint,
        numbers.device,
        numbers.dtype,
        offload=plan,
        sparing=options.max_memory is not None and numbers.device.type == "cpu",
        rounds_head=_rounds_head(options),
        compress=_compresses(options, plan),
        kernel=options.kernel,
        use_target=options.use_target,
        fast=options.fast,
        trust_remote_code=options.trust_remote_code,
        progress=progress,
    )
    pair = _make_pair(source, checkpoint, tokenizer, models, numbers, options)
    pair = replace(pair, notes=[*numbers.notes, *digest, *room, *models.notes])
    if options.draft == "mtp":
        head_of(pair)
    return _with_assistant(pair, options, progress) if options.assistant else pair


@dataclass(frozen=True)
class _Numbers:
    """The device that computes, the dtype of its passes, and the longest text; a note for each."""

    device: torch.device
    dtype: torch.dtype
    context: int
    context_is_asked: bool
    notes: Sequence[str]


def _choose_numbers(folder: Path, options: LoadOptions) -> _Numbers:
    """What is asked, else what suits the device and the model's folder."""
    device = choose_device(options.device)
    dtype, reason = dtype_of_source(folder, options.dtype, device)
    own, asked = context_limit(folder, options.trust_remote_code), options.max_context or 0
    context = min(own, asked or own)
    notes = [f"dtype: {str(dtype).removeprefix('torch.')}, {reason}", f"device: {_describe_device(device)}"]
    if context == UNLIMITED:
        notes.append("context: no limit, as config.json names none")
    elif asked > own:
        notes.append(f"context: cut to the {own} tokens that the model was made for; --max-context asks for {asked}")
    return _Numbers(device, dtype, context, context < own, notes)


def _plan_memory(
    folder: Path,
    checkpoint: VerifierCheckpoint | None,
    numbers: _Numbers,
    options: LoadOptions,
    progress: Progress,
) -> tuple[list[str], OffloadPlan | None]:
    """A note of what the pair takes of a GPU's memory, and what is streamed where memory is bounded."""
    place = numbers.device, numbers.dtype
    beside = head_bytes(folder, numbers.dtype) if options.draft == "mtp" else 0
    if numbers.device.type != "cuda":
        if options.max_device_memory is not None:
            raise UsageError(f"--max-device-memory is for a GPU, and the device is {numbers.device}: see --max-memory.")
        return [], plan_offload(folder, checkpoint, numbers.dtype, numbers.context, options, progress, beside)
    plan = plan_on_device(folder, checkpoint, *place, numbers.context, options, beside)
    if plan is not None:
        return [], plan
    rounds_head = _rounds_head(options) and options.kernel == "auto"
    return _check_room(folder, checkpoint, *place, options.use_target, numbers.context, rounds_head, beside), None


def _rounds_head(options: LoadOptions) -> bool:
    """Whether a verifier's head may be rounded beside the target's: what was allowed is planned without it."""
    return options.max_memory is None and options.max_device_memory is None


def _make_pair(
    source: ModelSource,
    checkpoint: VerifierCheckpoint | None,
    tokenizer: PreTrainedTokenizerBase,
    models: LoadedModels,
    numbers: _Numbers,
    options: LoadOptions,
) -> Pair:
    """The models, and what the folders of both say of them."""
    return Pair(
        tokenizer=tokenizer,
        target=models.target,
        verifier=models.verifier,
        target_name=source.label,
        verifier_name=checkpoint.folder.name if checkpoint else None,
        max_context=numbers.context,
        eos_ids=end_of_text_ids(source.folder, tokenizer),
        device=numbers.device,
        dtype=numbers.dtype,
        fidelity=checkpoint.fidelity if checkpoint else None,
        target_folder=source.folder,
        target_fingerprint=fingerprint(source.folder),
        verifier_fingerprint=fingerprint(checkpoint.folder) if checkpoint else None,
        successors_folder=checkpoint.folder if checkpoint else _verifier_beside(source, options.verifier),
        processors=read_processors(source.folder),
        rolls_back=recurrent_layers_in(source.folder, options.trust_remote_code) is None,
        context_is_asked=numbers.context_is_asked,
        fast=options.fast,
    )


def _compresses(options: LoadOptions, plan: OffloadPlan | None = None) -> bool | None:
    """What is asked; what was allowed of memory is planned without, and blocks that are streamed are planned for."""
    if plan is not None:
        return False
    return options.compress if options.max_memory is None else options.compress or False


def _with_assistant(pair: Pair, options: LoadOptions, progress: Progress) -> Pair:
    """The pair, and the small model that drafts for it."""
    assert options.assistant is not None
    source, trusted = resolve_model(options.assistant), options.trust_remote_code
    refuse_drafts(source.label, source.folder, trusted)
    place = pair.device, pair.dtype, trusted, _compresses(options)
    found = load_assistant(source.folder, source.label, pair.tokenizer, *place, progress)
    return replace(
        pair,
        assistant=found.model,
        assistant_fingerprint=fingerprint(source.folder),
        assistant_context=context_limit(source.folder, trusted),
        notes=[*pair.notes, *found.notes],
    )


def _found(checkpoint: VerifierCheckpoint | None, progress: Progress) -> str:
    if checkpoint is None:
        return "no verifier is loaded, so nothing was checked"
    return check_digest(checkpoint, progress)


def _check_room(
    folder: Path,
    checkpoint: VerifierCheckpoint | None,
    device: torch.device,
    dtype: torch.dtype,
    use_target: bool,
    context: int,
    rounds_head: bool = False,
    beside: int = 0,
) -> list[str]:
    """A note of what the pair takes of a GPU's memory; QuasarError, before it is loaded, where that is too much.

    `beside` it are so many bytes of weights.
    """
    need = pair_need(folder, checkpoint, dtype, use_target, rounds_head) if device.type == "cuda" else None
    if need is None:
        return []
    need = replace(need, target=need.target + beside)
    alone = pair_need(folder, checkpoint, dtype, False, rounds_head) if checkpoint else None
    return [require_room(need, alone, device, context)]


def find_pair_files(options: LoadOptions) -> tuple[ModelSource, VerifierCheckpoint | None]:
    """The target's folder and its verifier's checkpoint, checked to belong together."""
    model, verifier = asked_pair(options.model, options.verifier)
    source = resolve_model(model)
    if options.verify == "full":
        _refuse_verifier(source)
        return source, None
    refuse_drafts(source.label, source.folder, options.trust_remote_code)
    folder = absolute(Path(verifier)) if verifier else known_verifier(source)
    if folder is None:
        raise _no_verifier(source, model)
    checkpoint = VerifierCheckpoint(folder)
    made_from = checkpoint.target_fingerprint
    if made_from is not None and made_from != fingerprint(source.folder):
        raise QuasarError(f"The verifier {folder} was not made from {source.label}: their fingerprints differ.")
    return source, checkpoint


def asked_pair(model: str | None, verifier: str | None) -> tuple[str, str | None]:
    """Names of a model and its verifier: of the current pair, or of the recorded one that `model` names."""
    pair = current_pair() if model is None else pair_named(model)
    if pair is not None:
        _require_target(pair)
        return pair.target, verifier or pair.verifier
    if model is None:
        raise UsageError("No pair is current: make one with `quasar quantize MODEL`, or name one with --model.")
    return model, verifier


def _require_target(pair: PairRecord) -> None:
    """UsageError where a pair's model is a folder or file that was moved."""
    if Path(pair.target).is_absolute() and not exists(Path(pair.target)):
        raise UsageError(
            f"The model of the pair {pair.name} is not at {pair.target} any more: "
            f"`quasar models add {quote(pair.verifier)} --target MODEL` takes it from where it is."
        )


def _refuse_verifier(source: ModelSource) -> None:
    """UsageError where a verifier stands in the place of a model."""
    if is_verifier(source.folder):
        raise UsageError(
            f"{source.label} is a verifier, not a model: give it with --verifier, and its model with --model."
        )


def _no_verifier(source: ModelSource, model: str) -> UsageError:
    _refuse_verifier(source)
    return UsageError(
        f"{source.label} has no verifier yet: make one with `quasar quantize {quote(model)}`, or pass --verify full."
    )


def _verifier_beside(source: ModelSource, verifier: str | None) -> Path | None:
    """The folder of the target's verifier, where `full` does without it; None where there is none of this target."""
    folder = absolute(Path(verifier)) if verifier else known_verifier(source)
    return folder if folder is not None and _made_from(source, folder) else None


def known_verifier(source: ModelSource) -> Path | None:
    """The current pair's verifier if it is the target's, else the one last recorded for it, else the usual place's.

    Else, for a model that was moved, one that was recorded for it elsewhere.
    """
    recorded = [pair for pair in (current_pair(), *reversed(list_pairs())) if pair]
    usual = [default_output(source, QuantizeConfig(group_size=size)) for size in GROUP_CHOICES]
    places = [*(Path(pair.verifier) for pair in recorded if pair.target == source.name), *usual]
    found = next((place for place in places if is_folder(place)), None)
    return found or next((place for pair in recorded if _made_from(source, place := Path(pair.verifier))), None)


def _made_from(source: ModelSource, folder: Path) -> bool:
    """Whether a verifier's card says that it was made from this model."""
    made_from = (read_card(folder) or {}).get("target")
    return isinstance(made_from, dict) and made_from.get("fingerprint") == fingerprint(source.folder)


def dtype_of_source(folder: Path, requested: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Choose a dtype from what is asked and what the folder stores, and say why."""
    config = read_config(folder)
    text_config = config.get("text_config") or {}
    stored = config.get("dtype") or config.get("torch_dtype") or text_config.get("dtype")
    return choose_dtype(requested, stored, weight_bytes(folder), device)


def _describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu, {most_threads()} threads"
