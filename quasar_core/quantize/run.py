"""From a target to its verifier checkpoint: calibrate, quantize, assemble, measure, move into place."""

import importlib.metadata
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from quasar_core.checkpoint.reader import CARD_VERSION, TensorFiles, VerifierCheckpoint, read_json
from quasar_core.checkpoint.writer import ShardWriter, copy_kept_files, finish, partial_folder, save_tensors, write_json
from quasar_core.config import QuantizeConfig
from quasar_core.errors import QuasarError, UsageError
from quasar_core.models.pair import context_limit
from quasar_core.models.transformers_lm import TransformersLM, attach_verifier
from quasar_core.quantize.calibration import GREEDY_FROM, Calibration, calibration_name, load_calibration
from quasar_core.quantize.card import model_card
from quasar_core.quantize.fidelity import measure_fidelity
from quasar_core.quantize.gptq import SolverConfig
from quasar_core.quantize.layerwise import (
    QuantizedBlock,
    capture_first_inputs,
    check_layers,
    quantize_blocks,
    quantize_head,
)
from quasar_core.quantize.optimum_backend import check_optimum, quantize_with_optimum
from quasar_core.records import FidelityReport, Progress, QuantizeReport, no_progress
from quasar_core.store.safetensors_header import read_headers, weight_files

PACKAGES = ("quasar-cli", "torch", "transformers", "safetensors")


@dataclass(frozen=True)
class Job:
    """What to quantize, and where to."""

    target_name: str
    source: Path
    fingerprint: str
    output: Path
    config: QuantizeConfig

    @property
    def partial(self) -> Path:
        """The folder of the work in progress."""
        return partial_folder(self.output)

    @property
    def commits(self) -> Path:
        """Finished blocks of a run that may be resumed."""
        return self.partial / "commits"

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one that began."""
        return {
            "target": self.fingerprint,
            "config": asdict(self.config),
            "versions": package_versions(),
        }


def solver_config(config: QuantizeConfig, bits: int | None = None) -> SolverConfig:
    """The solver's share of the config; `bits` for the head."""
    return SolverConfig(bits or config.bits, config.group_size, config.sym, config.act_order, config.damp)


def package_versions() -> dict[str, str]:
    """Versions of what the result depends on; a package that runs from a checkout has none."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


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
    target: TransformersLM,
    tokenizer: PreTrainedTokenizerBase,
    resume: bool = True,
    progress: Progress = no_progress,
) -> QuantizeReport:
    """Write the verifier of `target`, whole or not at all; what is finished of an interrupted run is used again."""
    check_layers(target.model, job.config.bits, job.config.lm_head_bits)
    if job.config.backend == "optimum":
        check_optimum(job.config)
    begin_partial(job, resume)
    watch = Stopwatch()
    with watch.stage("calibration text"):
        calibration = calibrate(job, target, tokenizer, progress)
    with watch.stage("quantizing"):
        blocks = quantize_layers(job, target, tokenizer, calibration, progress)
    with watch.stage("writing"):
        assemble(job, target, blocks)
    checkpoint = VerifierCheckpoint(job.partial)
    with watch.stage("fidelity"):
        fidelity = measure(target, checkpoint, calibration, progress)
    report = make_report(job, checkpoint, blocks, watch.seconds, fidelity)
    describe(job, report, calibration)
    shutil.rmtree(job.commits)
    finish(job.partial, job.output)
    return report


def begin_partial(job: Job, resume: bool) -> None:
    """Open the partial folder, or go on with one of the same identity."""
    state = job.commits / "identity.json"
    if job.partial.exists() and resume and state.exists():
        begun = read_json(state)
        differing = [key for key, value in job.identity().items() if begun.get(key) != value]
        if differing:
            raise UsageError(
                f"{job.partial} holds an interrupted run with another {' and '.join(differing)}: "
                "pass --no-resume to begin anew."
            )
        return
    shutil.rmtree(job.partial, ignore_errors=True)
    try:
        job.commits.mkdir(parents=True)
    except OSError as error:
        raise QuasarError(f"{job.partial} could not be made ({error.strerror}).") from error
    write_json(state, job.identity())


def calibrate(job: Job, target: TransformersLM, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> Calibration:
    """Load or write the calibration text; a resumed run reads what the first one had."""
    stored = job.commits / "calibration.safetensors"
    if stored.exists():
        rows = load_file(stored)
        name = calibration_name(job.config.calibration)
        return Calibration(name, rows["samples"], rows["held_out"], rows["greedy"], job.config.seed)
    limit = context_limit(job.source)
    calibration = load_calibration(target.model, tokenizer, job.config, limit, progress)
    save_tensors(
        stored,
        {"samples": calibration.samples, "held_out": calibration.held_out, "greedy": calibration.greedy},
    )
    return calibration


def quantize_layers(
    job: Job, target: TransformersLM, tokenizer: PreTrainedTokenizerBase, calibration: Calibration, progress: Progress
) -> list[QuantizedBlock]:
    """Every block's codes, and the head's where it is asked for."""
    if job.config.backend == "optimum":
        return quantize_with_optimum(job.source, tokenizer, calibration.samples, job.config, progress)
    batches = capture_first_inputs(target.model, calibration.samples)
    blocks = list(quantize_blocks(target.model, batches, solver_config(job.config), job.commits, progress))
    if job.config.lm_head_bits < 16:
        head = quantize_head(target.model, batches, solver_config(job.config, job.config.lm_head_bits), job.commits)
        blocks.append(head)
    return blocks


def assemble(job: Job, target: TransformersLM, blocks: list[QuantizedBlock]) -> None:
    """Write the shards: packed layers in place of their weights, every other tensor of the source as it is."""
    weights = {name: weight for block in blocks for name, weight in block.weights.items()}
    source = TensorFiles(job.source)
    writer = ShardWriter(job.partial)
    for name, weight in weights.items():
        for suffix, tensor in weight.pack().items():
            writer.add(f"{name}.{suffix}", tensor)
    replaced = {f"{name}.weight" for name in weights}
    for name, tensor in source.load_many([name for name in source.names() if name not in replaced]):
        writer.add(name, tensor)
    writer.close()
    copy_kept_files(job.source, job.partial)
    section = quantization_section(job.config)
    config = read_json(job.source / "config.json")
    config["quantization_config"] = section
    if "lm_head" in weights:
        config["tie_word_embeddings"] = False  # the packed head stands on its own
    write_json(job.partial / "config.json", config)
    write_json(job.partial / "quantize_config.json", section)


def quantization_section(config: QuantizeConfig) -> dict[str, Any]:
    """`quantization_config` in AutoGPTQ's words.

    Groups are static, so g_idx is trivial and `desc_act` is false, whatever order the solver took.
    """
    section: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": config.bits,
        "group_size": config.group_size,
        "desc_act": False,
        "sym": config.sym,
        "lm_head": config.lm_head_bits < 16,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "true_sequential": True,
        "damp_percent": config.damp,
        "meta": {
            "quantizer": [f"quasar:{package_versions()['quasar-cli']}"],
            "act_order": config.act_order,
            "static_groups": True,
        },
    }
    if config.lm_head_bits not in (16, config.bits):
        section["dynamic"] = {"lm_head": {"bits": config.lm_head_bits}}
    return section


def measure(
    target: TransformersLM, checkpoint: VerifierCheckpoint, calibration: Calibration, progress: Progress
) -> FidelityReport:
    """Fidelity of the checkpoint as it was written, not of what was meant to be written.

    A row is a pass of hundreds of tokens: packed products on the CPU are slow at that, and a GPU's memory is short.
    """
    verifier = attach_verifier(target, checkpoint, "dense" if target.device.type == "cpu" else "auto")
    cache = target.new_cache(max(calibration.held_out.shape[1], calibration.greedy.shape[1]))
    return measure_fidelity(
        target,
        verifier,
        cache,
        calibration.held_out,
        calibration.greedy,
        GREEDY_FROM,
        calibration.name,
        progress,
    )


def make_report(
    job: Job,
    checkpoint: VerifierCheckpoint,
    blocks: list[QuantizedBlock],
    seconds: dict[str, float],
    fidelity: FidelityReport,
) -> QuantizeReport:
    """Sizes, losses, seconds, fidelity."""
    plain = set(checkpoint.plain_names)
    packed_bytes = sum(entry.size for entry in read_headers(checkpoint.folder) if entry.name not in plain)
    packed_weights = sum(weight.codes.numel() for block in blocks for weight in block.weights.values())
    return QuantizeReport(
        checkpoint=str(job.output),
        target=job.target_name,
        config=asdict(replace(job.config, seq_len=job.config.calibration_length, calibration=fidelity.text)),
        bytes_before=_weight_bytes(job.source),
        bytes_after=_weight_bytes(checkpoint.folder),
        bits_per_weight=round(8 * packed_bytes / packed_weights, 3),
        layer_errors={name: loss for block in blocks for name, loss in block.losses.items()},
        seconds={**seconds, "total": round(sum(seconds.values()), 3)},
        fidelity=fidelity,
    )


def describe(job: Job, report: QuantizeReport, calibration: Calibration) -> None:
    """quasar.json and the model card."""
    card = {
        "format_version": CARD_VERSION,
        "target": {"name": job.target_name, "fingerprint": job.fingerprint},
        "calibration": calibration.identity(),
        "versions": package_versions(),
        "report": {**asdict(report), "checkpoint": job.output.name},
    }
    write_json(job.partial / "quasar.json", card)
    (job.partial / "README.md").write_text(model_card(report, card), encoding="utf-8")


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in weight_files(folder))
