"""Make verifiers: quantize a model, estimate that, add what was made elsewhere."""

from dataclasses import replace
from pathlib import Path

import torch

from quasar_core.checkpoint.checks import refuse_other_target
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.config import QuantizeConfig
from quasar_core.errors import QuasarError, UsageError
from quasar_core.files import absolute
from quasar_core.load_pair import dtype_of_source, known_verifier
from quasar_core.models.context import context_limit
from quasar_core.models.device import choose_device
from quasar_core.models.loading import refuse_drafts
from quasar_core.models.pair import load_tokenizer
from quasar_core.models.weights.lean_weights import check_whole
from quasar_core.quantize.blocks.streaming import StreamedModel, open_target
from quasar_core.quantize.checks import check_finite
from quasar_core.quantize.estimate import layer_sizes, plan_here, with_seconds
from quasar_core.quantize.group_size import settle_group_size
from quasar_core.quantize.handover import finish_earlier
from quasar_core.quantize.job import Job
from quasar_core.quantize.plan import Plan, refuse_what_cannot_fit
from quasar_core.quantize.run import check_request, quantize_checkpoint
from quasar_core.quantize.sample_length import within_context
from quasar_core.quantize.solve.cpp import describe_loops
from quasar_core.quantize.successors import add_successors as count_for_verifier
from quasar_core.quantize.whole_run import WholeRun, over_whole_run
from quasar_core.records import Progress, QuantizeReport, Tell, no_progress, tell_nobody
from quasar_core.store import (
    ModelSource,
    PairRecord,
    check_registry,
    default_output,
    fingerprint,
    list_pairs,
    record_pair,
    resolve_model,
)
from quasar_core.store.folders import refuse_existing, refuse_place, replaced_folder
from quasar_core.store.model_config import read_config

__all__ = [
    "Plan",
    "add_successors",
    "add_verifier",
    "describe_loops",
    "estimate",
    "open_job",
    "quantize",
    "refuse_what_cannot_fit",
    "replaced_folder",
    "spare_gpus",
]


def quantize(
    model: str,
    config: QuantizeConfig,
    *,
    output: Path | None = None,
    force: bool = False,
    resume: bool = True,
    device: str = "auto",
    max_memory: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
    tell: Tell = tell_nobody,
) -> QuantizeReport:
    """Write the verifier of `model` and make the pair current; hidden states beyond `max_memory` bytes go to a file.

    `tell` hears, before any work, what was chosen, and which other programs will refuse the checkpoint.
    What an interrupted run finished is used: a finished verifier of the same identity is recorded, not made again.
    Raises UsageError where the output exists without `force`, is no verifier that quasar wrote, or overlaps the model;
    QuasarError where the model cannot be read or held.
    """
    source, job, target = open_job(model, config, output, device, trust_remote_code, tell)

    def record() -> None:
        record_pair(source.name, job.output)

    earlier = finish_earlier(job, record, resume)
    if earlier is not None:
        progress("recording what an earlier run has finished", 1, 1)
        return earlier
    refuse_existing(job.output, force)
    check_registry()
    plan = plan_here(source.folder, target, job.config, job.output, max_memory)
    refuse_what_cannot_fit(plan, job.output)
    tell(f"text: written {plan.text.describe()}")
    tokenizer = load_tokenizer(source.folder, trust_remote_code)
    whole = over_whole_run(target, job.config, plan, progress)
    report = quantize_checkpoint(job, target, tokenizer, record, plan.text, resume, plan.spilled, whole)
    if isinstance(whole, WholeRun):
        whole.finish()
    return report


def add_successors(
    model: str,
    config: QuantizeConfig,
    *,
    output: Path | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
    tell: Tell = tell_nobody,
) -> Path:
    """Count what drafts begin with for a verifier that was made before: `output`, or the model's own; return the file.

    The text is the one that the config names. Raises UsageError where there is no verifier of the model.
    """
    source, job, target = open_job(model, config, output, device, trust_remote_code, tell)
    known = output or known_verifier(source)
    job = job if known is None else replace(job, output=absolute(known))
    return count_for_verifier(job, target, load_tokenizer(source.folder, trust_remote_code), progress)


def estimate(
    model: str,
    config: QuantizeConfig,
    *,
    output: Path | None = None,
    device: str = "auto",
    max_memory: int | None = None,
    trust_remote_code: bool = False,
    tell: Tell = tell_nobody,
) -> Plan:
    """What `quantize` would need, and what is free here; nothing is written.

    Raises as `quantize` does of what it refuses before any work, but for an output that exists.
    """
    source, job, target = open_job(model, config, output, device, trust_remote_code, tell)
    check_request(job, target, load_tokenizer(source.folder, trust_remote_code))
    plan = plan_here(source.folder, target, job.config, job.output, max_memory)
    return with_seconds(target, job.config, plan)


def open_job(
    model: str, config: QuantizeConfig, output: Path | None, device: str, trust_remote_code: bool, tell: Tell
) -> tuple[ModelSource, Job, StreamedModel]:
    """The target, none of it read yet, and where its verifier goes."""
    source = resolve_model(model)
    place = choose_device(device)
    _refuse_quantized(source)
    refuse_drafts(source.label, source.folder, trust_remote_code)
    dtype, _ = dtype_of_source(source.folder, "auto", place)
    target = open_target(source.folder, place, dtype, trust_remote_code)
    config, note = settle_group_size(config, layer_sizes(target.skeleton, config))
    config, cut = within_context(config, context_limit(source.folder, trust_remote_code))
    destination = absolute(output or default_output(source, config))
    refuse_place(destination, source.folder)
    for sentence in filter(None, (note, cut)):
        tell(sentence)
    computed = str(dtype).removeprefix("torch.")
    made_from = fingerprint(source.folder)
    return source, Job(source.label, source.folder, made_from, destination, config, place.type, computed), target


def _refuse_quantized(source: ModelSource) -> None:
    config = read_config(source.folder)
    section = config.get("quantization_config", config.get("quantization"))  # the latter is mlx's
    if section is not None and not TensorFiles(source.folder).dequantized:
        raise UsageError(f"{source.label} is quantized already; name the model that it was made from.")


def add_verifier(verifier: str, target: str | None = None, progress: Progress = no_progress) -> PairRecord:
    """Record a verifier that was made elsewhere, and make the pair current; its folder is only read.

    `verifier` is a folder or a hub id; without `target` it is the model that its card names. Raises QuasarError, with a
    reason, where it cannot be read, lacks a layer, holds numbers that are not finite or was not made from the target,
    UsageError where the target is not known.
    """
    found = resolve_model(verifier)
    checkpoint = VerifierCheckpoint(found.folder)
    source = resolve_model(target) if target is not None else _target_of(checkpoint)
    check_whole(checkpoint)
    progress("comparing the verifier with the target", 0, 1)
    refuse_other_target(checkpoint, source.folder)
    progress("comparing the verifier with the target", 1, 1)
    check_finite(checkpoint.tensors, progress)
    made_here = any(pair.verifier == str(found.folder) and not pair.added for pair in list_pairs())
    return record_pair(source.name, found.folder, found.label.rpartition("/")[2], added=not made_here)


def _target_of(checkpoint: VerifierCheckpoint) -> ModelSource:
    """The model that a verifier's card names: by that name, beside the verifier, or a recorded pair's target."""
    folder, made_from = checkpoint.folder, checkpoint.target_fingerprint
    if made_from is None:
        raise UsageError(f"{folder} does not say which model it was made from: name it with --target MODEL.")
    name = str(checkpoint.card["target"].get("name"))
    for candidate in (name, str(folder.parent / name), *(pair.target for pair in list_pairs())):
        try:
            source = resolve_model(candidate)
            if fingerprint(source.folder) == made_from:
                return source
        except QuasarError:
            continue  # not here; the next may be
    raise UsageError(f"{folder} was made from {name}, which is not found under that name: give it with --target MODEL.")


def spare_gpus(device: str) -> str | None:
    """One sentence where there are several GPUs: a block waits for the one before it, so a second would stand idle."""
    place = choose_device(device)
    if place.type != "cuda" or (count := torch.cuda.device_count()) < 2:
        return None
    return f"One of {count} GPUs is used ({place}): each block waits for the one before it."
