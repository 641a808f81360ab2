"""From a target to its verifier checkpoint: calibrate, quantize, assemble, measure, move into place."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.draft.successor_file import write_successors
from quasar_core.draft.successors import KnownSuccessors, width_of
from quasar_core.files import exists, write_json
from quasar_core.malloc import keep_freed_memory
from quasar_core.models.context import UNLIMITED, position_limit
from quasar_core.quantize.assemble import assemble, describe, make_report
from quasar_core.quantize.blocks.activations import Activations, capture_first_inputs
from quasar_core.quantize.blocks.eight_bit import eight_bit_method, kernel_of_method
from quasar_core.quantize.blocks.layerwise import leave_block, quantize_blocks, quantize_head
from quasar_core.quantize.blocks.rounding import round_blocks, round_head
from quasar_core.quantize.blocks.streaming import StreamedModel, open_verifier, quantized_layers
from quasar_core.quantize.calibration import Calibration, calibration_name, load_calibration
from quasar_core.quantize.checks import (
    check_blocks,
    check_calibration,
    check_calibration_file,
    check_dtypes,
    check_finite,
    check_names,
    check_tokenizer,
)
from quasar_core.quantize.commits import block_file, write_commit
from quasar_core.quantize.fidelity import token_kinds
from quasar_core.quantize.handover import Record, hand_over, whole_report
from quasar_core.quantize.job import Job, clear_all_but_commits, working_folder
from quasar_core.quantize.kept_text import keep_text, read_text
from quasar_core.quantize.layer_plan import LayerPlan
from quasar_core.quantize.measure_fidelity import RowsRead, measure, read_rows
from quasar_core.quantize.mixed_precision import (
    CommittedModel,
    Trial,
    best_trial,
    check_mixed,
    keep_trial,
    known_widths,
    next_budget,
    spend,
    trial_folder,
)
from quasar_core.quantize.optimum_backend import check_optimum, quantize_with_optimum
from quasar_core.quantize.successors import known_successors, read_likeliest, rows_to_count
from quasar_core.quantize.text_plan import TextPlan, open_writer
from quasar_core.records import Progress, QuantizeReport, no_progress


class Stopwatch:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)


def quantize_checkpoint(
    job: Job,
    target: StreamedModel,
    tokenizer: PreTrainedTokenizerBase,
    record: Record,
    text: TextPlan,
    resume: bool = True,
    spill: bool = False,
    progress: Progress = no_progress,
) -> QuantizeReport:
    """Write the verifier of `target`, whole or not at all, and `record` it; what an interrupted run finished is used.

    With `spill`, hidden states lie in a file. The target writes its text as `text` plans.
    """
    check_request(job, target, tokenizer)
    with working_folder(job, resume) as interrupted:
        if interrupted:
            progress(interrupted, 1, 1)
        report = whole_report(job, job.partial)
        if report is None:
            report = _work(job, target, tokenizer, spill, text, progress)
        hand_over(job, record)
    return report


def _work(
    job: Job,
    target: StreamedModel,
    tokenizer: PreTrainedTokenizerBase,
    spill: bool,
    text: TextPlan,
    progress: Progress,
) -> QuantizeReport:
    """Run all stages, in the working folder."""
    keep_freed_memory()
    watch = Stopwatch()
    with watch.stage("calibration text"):
        calibration = calibrate(job, target, tokenizer, text, progress)
    with watch.stage("quantizing"):
        activations = quantize_layers(job, target, tokenizer, calibration, spill, progress)
    with watch.stage("successors"):
        successors = count_on(target, calibration, activations, progress)
        del activations
    with watch.stage("writing"):
        clear_all_but_commits(job)
        digests = assemble(job, target.weights)
        if successors is not None:
            write_successors(job.partial, successors, calibration.name)
    with watch.stage("fidelity"):
        kernel = kernel_of_method(job.config)
        verifier = open_verifier(VerifierCheckpoint(job.partial), target, kernel)
        kinds = token_kinds(tokenizer, target.vocab_size)
        packed = kernel == "dense" and target.device.type == "cpu"
        in_use = open_verifier(VerifierCheckpoint(job.partial), target, "auto") if packed else None
        fidelity = measure(target, verifier, calibration, progress, kinds, in_use)
    report = make_report(job, watch.seconds, fidelity)
    describe(job, report, calibration, digests)
    return report


def check_request(job: Job, target: StreamedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse, before any work, what cannot be quantized."""
    check_dtypes(job.source, target)
    check_names(target)
    check_tokenizer(tokenizer, target.vocab_size)
    quantized_layers(target.skeleton, LayerPlan.of(job.config))
    check_mixed(job.config, target.skeleton)
    check_blocks(target)
    if job.config.backend == "optimum":
        check_optimum(job.config)
    if not exists(job.calibration):
        check_calibration_file(job.config)


def calibrate(
    job: Job,
    target: StreamedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: TextPlan,
    progress: Progress = no_progress,
) -> Calibration:
    """Load or write the calibration text; a resumed run reads that of the first."""
    if job.calibration.exists():
        found = read_text(job.calibration, "pass --no-resume to begin anew")
        return Calibration.of_tensors(calibration_name(job.config.calibration), found, job.config.seed)
    check_finite(target.weights.files, progress)
    limit = position_limit(target.skeleton.config.get_text_config()) or UNLIMITED
    shutil.rmtree(job.rounded, ignore_errors=True)  # of a run that was interrupted
    writer = open_writer(job.source, target, text, progress, job.rounded)
    calibration = load_calibration(
        writer, tokenizer, job.config, limit, progress, job.written_text, by_target=text.by_target
    )
    del writer
    check_calibration(calibration, target.vocab_size, not job.config.reads_no_text)
    keep_text(job.calibration, calibration.tensors())
    for folder in (job.written_text, job.rounded):
        if folder.exists():
            shutil.rmtree(folder)
    return calibration


def quantize_layers(
    job: Job,
    target: StreamedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Calibration,
    spill: bool,
    progress: Progress = no_progress,
) -> Activations | None:
    """Commit every block, and the head where it is asked for; the outputs of the last block, where they are known."""
    if job.config.backend == "optimum":
        blocks = quantize_with_optimum(job.source, tokenizer, calibration.samples, job.config, progress)
        for index, block in enumerate(blocks):
            write_commit(block_file(job.commits, index), block, target.stored)
        return None
    if job.config.reads_no_text:
        round_blocks(target, LayerPlan.of(job.config), job.commits, progress)
        if job.config.lm_head_bits < 16:
            round_head(target, LayerPlan.of(job.config), job.commits)
        return None
    plan = choose_plan(job, target, calibration, spill, progress)
    activations = quantize_with(plan, job, target, calibration, spill, job.commits, progress)
    if plan.quantizes_head:
        quantize_head(target.ends(), activations, plan, job.commits, target.stored)
    return activations


def count_on(
    target: StreamedModel, calibration: Calibration, activations: Activations | None, progress: Progress = no_progress
) -> KnownSuccessors | None:
    """Count successors as they were found while the text was written, else on the outputs of the last block.

    These are the target's own where there are some; without outputs the target reads the samples. None without samples,
    and of a vocabulary too large for the file.
    """
    if not width_of(target.vocab_size) or not len(calibration.samples):
        return None
    samples = calibration.samples[: rows_to_count(calibration.samples)]
    if calibration.likeliest is not None:
        return known_successors(samples, calibration.likeliest)
    if activations is None:
        read = read_rows(target, [samples], "counting successors: target", progress)
    else:
        read = RowsRead(target.ends(), [(samples, (activations.reference or activations).hidden)])
    return known_successors(samples, read_likeliest(read, samples, progress))


def choose_plan(
    job: Job, target: StreamedModel, calibration: Calibration, spill: bool, progress: Progress = no_progress
) -> LayerPlan:
    """Choose how each layer is quantized, as the config asks for it; `--target-agreement` tries several budgets."""
    default, config = LayerPlan.of(job.config), job.config
    if not config.mixed:
        return default
    groups, trials = known_widths(job, target, calibration, progress), list[Trial]()
    if config.mean_bits is not None:
        return spend(default, groups, config.mean_bits, config.widths)
    assert config.target_agreement is not None
    while not job.budget.exists():
        bits = next_budget(config.target_agreement, trials, min(config.widths))
        if bits is None:
            write_json(job.budget, asdict(best_trial(config.target_agreement, trials)))
            break
        folder = trial_folder(job, bits)
        quantize_with(spend(default, groups, bits, config.widths), job, target, calibration, spill, folder, progress)
        agreement = measure(target, CommittedModel(target, folder), calibration, progress).agreement
        trials.append(Trial(bits, agreement))
    return spend(default, groups, keep_trial(job), config.widths)


def quantize_with(
    plan: LayerPlan,
    job: Job,
    target: StreamedModel,
    calibration: Calibration,
    spill: bool,
    commits: Path,
    progress: Progress = no_progress,
) -> Activations:
    """Commit every block of a plan to a folder; return the outputs of the last block."""
    file = job.spill if spill else None
    activations = capture_first_inputs(target.ends(torch.device("cpu")), calibration.samples, target.device, file)
    if job.config.rounding == "gptq":
        activations.keep_reference(job.spill.with_name("reference") if spill else None)
    prepare = eight_bit_method(job.config, job.source) or leave_block
    for done in quantize_blocks(target, activations, plan, commits, progress, prepare):
        del done  # committed; nothing of it stays in memory
    return activations
