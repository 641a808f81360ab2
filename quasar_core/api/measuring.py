"""Measure and describe: benchmarks, a checkpoint's contents and fidelity, what this machine can do."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from quasar_core.bench.machine import describe_speed, examine
from quasar_core.bench.plots import draw_steps, new_figure, plot_fidelity
from quasar_core.bench.run import encode_shortest, run_bench
from quasar_core.bench.steps import (
    RandomShape,
    StepConfig,
    StepReport,
    measure_steps,
    pair_candidates,
    random_candidates,
    refuse_foreign_report,
)
from quasar_core.checkpoint.checks import check_digest as digest_found
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.config import LoadOptions
from quasar_core.decode.costs.cost_records import pair_costs
from quasar_core.errors import UsageError
from quasar_core.kernels.times import forget_times
from quasar_core.load_pair import dtype_of_source, load
from quasar_core.models.describe import describe
from quasar_core.models.device import choose_device
from quasar_core.models.pair import load_tokenizer
from quasar_core.quantize.blocks.streaming import open_target, open_verifier
from quasar_core.quantize.measure_fidelity import measure_on_text
from quasar_core.records import FidelityReport, Progress, no_progress
from quasar_core.store import current_pair, resolve_model, verifier_folder

__all__ = [
    "RandomShape",
    "StepConfig",
    "StepReport",
    "bench_steps",
    "doctor",
    "draw_fidelity",
    "draw_steps",
    "encode_shortest",
    "fidelity_on_text",
    "inspect",
    "new_figure",
    "refuse_foreign_report",
    "run_bench",
]


def inspect(
    checkpoint: str | None = None,
    *,
    against: str | None = None,
    text: str | None = None,
    verify: bool = False,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """What a checkpoint holds, how faithful it is, and what it costs here, as JSON.

    `checkpoint` is a folder or a pair's name; without it, the current pair's. With `verify` all weights are read, and
    `digest` says whether they are as quantize wrote them; with `against`, a model, and `text`, fidelity is measured.
    """
    choose_device(device)  # one that is not here is refused, whether anything is measured or not
    folder = verifier_folder(checkpoint)
    found = VerifierCheckpoint(folder)
    digest = {"digest": digest_found(found, progress)} if verify else {}
    description = {**describe(found), **digest, "speed": describe_speed(folder)}
    if against is not None and text is not None:
        report = fidelity_on_text(
            against, folder, text, device=device, trust_remote_code=trust_remote_code, progress=progress
        )
        description["measured"] = asdict(report)
    return description


def draw_fidelity(description: dict[str, Any], path: Path) -> None:
    """Draw what `inspect` measured just now, else what quantizing measured; UsageError where neither is known."""
    report = description["report"] or {}
    fidelity = description.get("measured") or report.get("fidelity")
    if fidelity is None:
        raise UsageError("--plot: no fidelity of this checkpoint is known; measure it by --against MODEL --text FILE.")
    name = Path(description["checkpoint"]).name
    plot_fidelity(FidelityReport.from_dict(fidelity), report.get("layer_errors", {}), name, path)


def fidelity_on_text(
    model: str,
    verifier: Path,
    text: str,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> FidelityReport:
    """How faithful any GPTQ checkpoint is to `model` on a user's text; raises as `measure_on_text` does."""
    source, place = resolve_model(model), choose_device(device)
    dtype, _ = dtype_of_source(source.folder, "auto", place)
    target = open_target(source.folder, place, dtype, trust_remote_code)
    streamed = open_verifier(VerifierCheckpoint(verifier), target)
    return measure_on_text(target, streamed, load_tokenizer(source.folder, trust_remote_code), text, progress)


def doctor(remeasure: bool = False, progress: Progress = no_progress) -> dict[str, Any]:
    """What this machine can do, and why, as JSON; with `remeasure`, by times of kernels and passes taken anew."""
    if remeasure:
        forget_times()
        if current_pair() is not None:
            pair = load(LoadOptions(), progress)
            progress("measuring passes", 0, 1)
            pair_costs(pair, with_verifier=True, remeasure=True)
            progress("measuring passes", 1, 1)
    return examine(progress)


def bench_steps(
    options: LoadOptions,
    config: StepConfig,
    shape: RandomShape | None = None,
    with_reference: bool = False,
    progress: Progress = no_progress,
) -> tuple[StepReport, list[str]]:
    """Time the passes of a pair, or of random weights of a shape; the report, and notes on what was chosen."""
    if shape is not None:
        names = ("device", "dtype", "kernel", "fast")
        place: dict[str, Any] = {name: getattr(options, name) for name in names}
        lineup = random_candidates(shape, with_reference=with_reference, progress=progress, **place)
    else:
        pair = load(options, progress)
        lineup = pair_candidates(pair, pair.target_folder if with_reference else None)
    return measure_steps(lineup, config, progress), list(lineup.notes)
