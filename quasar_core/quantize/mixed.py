"""Widths by layer: what each layer costs at each width is measured once, and a budget of bytes is spent on it."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedModel

from quasar_core.config import QuantizeConfig
from quasar_core.errors import QuasarError, UsageError
from quasar_core.files import read_json, write_json
from quasar_core.models.experts import SeparateExperts
from quasar_core.quantize.activations import capture_first_inputs
from quasar_core.quantize.agreement import smallest_budget
from quasar_core.quantize.allocate import allocate
from quasar_core.quantize.calibration import Calibration
from quasar_core.quantize.job import Job
from quasar_core.quantize.layer_plan import LayerPlan
from quasar_core.quantize.sensitivity import ROWS, LayerGroup, measure_widths
from quasar_core.quantize.streaming import StreamedModel
from quasar_core.records import Progress, no_progress
from quasar_core.typed import build

T = TypeVar("T")
TryPlan = Callable[[LayerPlan, Path], float]  # quantizes into a folder of commits, and gives the agreement


def check_mixed(config: QuantizeConfig, skeleton: PreTrainedModel) -> None:
    """Refuse widths by layer for a mixture of experts: few rows reach most experts, too few to measure each alone."""
    if config.mixed and any(isinstance(module, SeparateExperts) for module in skeleton.modules()):
        raise UsageError("Widths by layer are not chosen for a mixture of experts: give a whole number for --bits.")


def choose_plan(
    job: Job, target: StreamedModel, calibration: Calibration, try_plan: TryPlan, progress: Progress = no_progress
) -> LayerPlan:
    """How each layer is quantized, as the config asks for it."""
    plan = LayerPlan.of(job.config)
    if not job.config.mixed:
        return plan
    groups = known_widths(job, target, calibration, progress)
    bits = job.config.mean_bits
    if bits is None:
        bits = _search(job, lambda bits, trial: try_plan(spend(plan, groups, bits), trial))
    return spend(plan, groups, bits)


def _search(job: Job, measure: Callable[[float, Path], float]) -> float:
    """The smallest budget that reaches the agreement, found once; the blocks of its trial become the run's."""
    if not job.budget.exists():
        assert job.config.target_agreement is not None
        found = smallest_budget(job.config.target_agreement, lambda bits: measure(bits, _trial(job, bits)))
        write_json(job.budget, asdict(found))
    bits = _stored(float, job.budget, "bits")
    for path in sorted(_trial(job, bits).glob("block-*.safetensors")):
        path.replace(job.commits / path.name)
    for folder in job.commits.glob("trial-*"):
        shutil.rmtree(folder)
    return bits


def _stored(kind: type[T], path: Path, name: str) -> T:
    """What an interrupted run kept under a name in one of its files."""
    try:
        return build(kind, read_json(path).get(name), name)
    except ValueError as error:
        raise QuasarError(f"{path} is damaged ({error}): delete it, and it is measured anew.") from error


def _trial(job: Job, bits: float) -> Path:
    """The commits of a trial."""
    folder = job.commits / f"trial-{bits:g}"
    folder.mkdir(exist_ok=True)
    return folder


def known_widths(
    job: Job, target: StreamedModel, calibration: Calibration, progress: Progress = no_progress
) -> list[LayerGroup]:
    """What each layer costs at each width; a resumed run reads what the first one measured."""
    stored = job.commits / "widths.json"
    if not stored.exists():
        model = target.whole()
        activations = capture_first_inputs(model, calibration.samples[:ROWS], target.device)
        groups = measure_widths(model, activations, LayerPlan.of(job.config).default, progress)
        write_json(stored, {"groups": [asdict(group) for group in groups]})
    return _stored(list[LayerGroup], stored, "groups")


def spend(plan: LayerPlan, groups: Sequence[LayerGroup], bits: float) -> LayerPlan:
    """The plan of least measured divergence in the bytes of a checkpoint of `bits` bits, which may be a fraction."""
    budget = int(sum(size_at(group, plan.default.group_size, bits) for group in groups))
    try:
        taken = allocate({group.names[0]: group.choices for group in groups}, budget)
    except ValueError as error:
        raise UsageError(f"--bits {bits:g} is too few for this model: {error}.") from error
    layers = {
        name: replace(plan.default, bits=taken[group.names[0]].bits, group_size=taken[group.names[0]].group_size)
        for group in groups
        for name in group.names
    }
    return LayerPlan(plan.default, {**layers, **plan.layers})


def size_at(group: LayerGroup, group_size: int, bits: float) -> float:
    """Bytes of a group of layers at so many bits, by a line through two of its widths: bytes are linear in bits."""
    plain = sorted((choice.bits, choice.size) for choice in group.choices if choice.group_size == group_size)
    (low, small), (high, large) = plain[0], plain[-1]
    return small + (large - small) * (bits - low) / (high - low) if high > low else small
