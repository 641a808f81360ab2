"""Choose a bit width per layer: measure what each layer costs at each width, and spend a budget of bytes on it.

A layer's cost is the divergence of a model in which that layer alone is quantized. The rows go through the model block
by block. At a block, each group of layers that read one input is replaced at one width, and the rows go on from there
through the remaining blocks. That gives the divergence per unit of the solver's loss at this layer, and the other
widths cost their losses times it: a small error's divergence is a quadratic form of it, and so is the loss. The two
agree to a few hundredths; a divergence measured at every width chooses no better, and takes six times the passes
(dev/log.md). Costs are taken to add up. On each layer's lower convex hull of cost over bytes, upgrades are taken in
the order of what a byte saves, which is optimal up to the last one (Shoham and Gersho, 1988). `--target-agreement`
finds the smallest budget that reaches it by bisection; a trial quantizes every block and measures the agreement,
without a checkpoint. Letters: N rows of L tokens, V vocabulary.
"""

import copy
import heapq
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from quasar_core.checkpoint.gptq_format import count_groups, why_not_packable
from quasar_core.config import BITS, QuantizeConfig
from quasar_core.errors import QuasarError, UsageError
from quasar_core.files import read_json, write_json
from quasar_core.models.hf.experts import SeparateExperts
from quasar_core.quantize.blocks.activations import Activations, capture_first_inputs
from quasar_core.quantize.blocks.collect import collect_inputs, find_stages, trace_block
from quasar_core.quantize.blocks.layerwise import hessian_of, replace_weight, replace_weights
from quasar_core.quantize.blocks.streaming import StreamedModel, find_blocks, find_head, linear_layers
from quasar_core.quantize.calibration import Calibration
from quasar_core.quantize.commits import block_file, read_commit
from quasar_core.quantize.fidelity import kl_divergence
from quasar_core.quantize.job import Job
from quasar_core.quantize.layer_plan import LayerPlan
from quasar_core.quantize.solve.factor import InverseFactor, inverse_factor
from quasar_core.quantize.solve.gptq import Solution, SolverConfig, column_order, solve_layer
from quasar_core.records import Progress, no_progress
from quasar_core.typed import build


@dataclass(frozen=True)
class Choice:
    """One way to store a layer (or layers that must be stored alike): its bits, group size and bytes, and its cost."""

    bits: int
    group_size: int
    size: int
    cost: float


def allocate(choices: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, Choice]:
    """A choice for every name, in at most `budget` bytes; ValueError where the smallest choices exceed it."""
    hulls = {name: lower_hull(options) for name, options in choices.items()}
    taken = {name: hull[0] for name, hull in hulls.items()}
    left = budget - sum(choice.size for choice in taken.values())
    if left < 0:
        raise ValueError(f"the smallest choices take {budget - left} bytes, and the budget is {budget}")
    steps = [(_slope(hull[0], hull[1]), name, 1) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, name, index = heapq.heappop(steps)
        hull = hulls[name]
        growth = hull[index].size - hull[index - 1].size
        if growth > left:
            continue  # a later, smaller step of another layer may still fit
        taken[name], left = hull[index], left - growth
        if index + 1 < len(hull):
            heapq.heappush(steps, (_slope(hull[index], hull[index + 1]), name, index + 1))
    return taken


def lower_hull(options: Sequence[Choice]) -> list[Choice]:
    """The choices that are best for some price of a byte, by size: from one to the next a byte saves ever less."""
    hull: list[Choice] = []
    for choice in sorted(options, key=lambda option: (option.size, option.cost)):
        if hull and choice.cost >= hull[-1].cost:
            continue  # larger and no better
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(small: Choice, large: Choice) -> float:
    """Change of the cost for a byte more; negative."""
    return (large.cost - small.cost) / (large.size - small.size)


FINE_GROUPS = (64, 32)  # smaller groups are steps between two widths
FINE_BITS = (3, 4)
MEASURED_BITS = 3  # errors small enough for a quadratic form, and large enough to be seen on few rows
ROWS = 8  # of the calibration text, which the divergence is measured on


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one width, by full name, and what each width costs."""

    names: tuple[str, ...]
    choices: tuple[Choice, ...]


@torch.inference_mode()
def measure_widths(
    model: PreTrainedModel, activations: Activations, default: SolverConfig, progress: Progress = no_progress
) -> list[LayerGroup]:
    """Every group of layers of a whole model, and the mean KL in nats that each width of it costs on these rows.

    At the end `activations` hold the outputs of the last block.
    """
    prefix, blocks = find_blocks(model)
    target = _finish(activations, list(blocks))
    found: list[LayerGroup] = []
    for index, block in enumerate(blocks):
        progress("measuring widths", index, len(blocks))
        layers, after = linear_layers(block), list(blocks[index + 1 :])
        for stage in find_stages(trace_block(block, activations)):
            inputs = collect_inputs(block, stage, layers, activations)
            for names in stage.groups:
                hessian = hessian_of(f"{prefix}.{index}.{names[0]}", layers[names[0]], inputs.pop(names[0]))
                solver = WidthSolver.of({name: layers[name] for name in names}, hessian, default)
                changed = solver.put_into(block)
                cost = _divergence(model, target, _finish(activations, [changed, *after]))
                found.append(LayerGroup(tuple(f"{prefix}.{index}.{name}" for name in names), solver.choices(cost)))
        activations.advance(block)
    progress("measuring widths", len(blocks), len(blocks))
    return found


@dataclass(frozen=True)
class WidthSolver:
    """Layers of one Hessian, by their names in the block, and the widths [W] that they may have."""

    layers: Mapping[str, torch.nn.Linear]
    hessian: torch.Tensor
    factor: InverseFactor
    widths: Sequence[SolverConfig]

    @classmethod
    def of(cls, layers: Mapping[str, torch.nn.Linear], hessian: torch.Tensor, default: SolverConfig) -> "WidthSolver":
        """With the one factor that all widths share."""
        order = column_order(hessian, default.act_order)
        factor = inverse_factor(hessian, order, default.damp, next(iter(layers)))
        return cls(layers, hessian, factor, possible_widths(replace(default, sweeps=0), list(layers.values())))

    @property
    def measured(self) -> SolverConfig:
        """The width whose divergence is measured."""
        return next(width for width in self.widths if width.bits >= MEASURED_BITS)

    def put_into(self, block: torch.nn.Module) -> torch.nn.Module:
        """A copy of the block in which these layers alone are quantized, at the width that is measured."""
        changed = copy.deepcopy(block)
        linears = linear_layers(changed)
        for name, solution in self._solve(self.measured).items():
            replace_weight(linears[name], solution.weight.dequantize(linears[name].weight.dtype))
        return changed

    def choices(self, cost: float) -> tuple[Choice, ...]:
        """Every width's bytes and cost in nats, where `cost` is that of the width that is measured."""
        losses = {width: sum(solution.loss for solution in self._solve(width).values()) for width in self.widths}
        price = cost / losses[self.measured] if losses[self.measured] > 0 else 0.0
        return tuple(
            Choice(width.bits, width.group_size, self._bytes(width), price * loss) for width, loss in losses.items()
        )

    def _solve(self, width: SolverConfig) -> dict[str, Solution]:
        return {
            name: solve_layer(linear.weight, self.hessian, self.factor, width, None, name)
            for name, linear in self.layers.items()
        }

    def _bytes(self, width: SolverConfig) -> int:
        return sum(stored_bytes(linear, width.bits, width.group_size) for linear in self.layers.values())


def stored_bytes(linear: torch.nn.Linear, bits: int, group_size: int) -> int:
    """Bytes of codes, scales and zeros of a layer."""
    groups = count_groups(linear.in_features, group_size)
    return linear.out_features * (linear.in_features + groups) * bits // 8 + 2 * groups * linear.out_features


def possible_widths(default: SolverConfig, linears: Sequence[torch.nn.Linear]) -> list[SolverConfig]:
    """Every width with the groups asked for; some with smaller groups, too: steps between two widths."""
    found = [replace(default, bits=bits) for bits in BITS]
    found += [
        replace(default, bits=bits, group_size=size)
        for bits in FINE_BITS
        for size in FINE_GROUPS
        if default.group_size == -1 or size < default.group_size
    ]
    sizes = [(linear.in_features, linear.out_features) for linear in linears]
    return [config for config in found if all(why_not_packable(*size, config.bits) is None for size in sizes)]


def _finish(activations: Activations, blocks: Sequence[torch.nn.Module]) -> torch.Tensor:
    """Return the outputs of the last of the blocks [N, L, H]; the activations stay as they are."""
    states = activations.fork()
    for block in blocks:
        states.advance(block)
    return states.hidden


def _divergence(model: PreTrainedModel, target: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL in nats between two models of one head, by the outputs of their last blocks [N, L, H]."""
    norm, head = find_head(model)
    place = head.weight.device
    rows = [
        kl_divergence(head(norm(p.to(place))).float(), head(norm(q.to(place))).float())
        for p, q in zip(target, other, strict=True)
    ]
    return torch.cat(rows).double().mean().item()


BUDGETS = tuple(step / 4 for step in range(9, 25))  # bits, from 2.25 to 6


@dataclass(frozen=True)
class Trial:
    """A budget in bits, and the agreement that it gave."""

    bits: float
    agreement: float


def next_budget(goal: float, trials: Sequence[Trial], least: float = 0) -> float | None:
    """Choose the budget to try next, by bisection for the smallest of `BUDGETS` that agrees `goal`; None at the end.

    Those under `least` are left out. At most five are tried.
    """
    budgets, tried = [bits for bits in BUDGETS if bits >= least], {trial.bits: trial.agreement for trial in trials}
    low, high = 0, len(budgets)
    while low < high:
        middle = (low + high) // 2
        if budgets[middle] not in tried:
            return budgets[middle]
        if tried[budgets[middle]] >= goal:
            high = middle
        else:
            low = middle + 1
    return None


def best_trial(goal: float, trials: Sequence[Trial]) -> Trial:
    """Return the smallest trial that agrees `goal`; QuasarError where none does."""
    enough = [trial for trial in trials if trial.agreement >= goal]
    if enough:
        return min(enough, key=lambda trial: trial.bits)
    most = max(trials, key=lambda trial: trial.agreement)
    raise QuasarError(
        f"--target-agreement {goal:g} was not reached: {most.bits:g} bits agree {most.agreement:.4f}. "
        "Ask for less, for smaller groups (--group-size 32), or for --bits 8."
    )


class CommittedModel:
    """A model whose blocks are the target's with what a folder of commits holds in place; read like `StreamedModel`."""

    def __init__(self, target: StreamedModel, commits: Path) -> None:
        self._target, self._commits = target, commits
        self.prefix, self.count, self.device = target.prefix, target.count, target.device

    def block(self, index: int) -> torch.nn.Module:
        """One block, its layers as quantized."""
        block = self._target.block(index)
        replace_weights(block, f"{self.prefix}.{index}", read_commit(block_file(self._commits, index)))
        return block

    def ends(self, device: torch.device | None = None) -> PreTrainedModel:
        """The target's embedding, final norm and head."""
        return self._target.ends(device)


T = TypeVar("T")


def check_mixed(config: QuantizeConfig, skeleton: PreTrainedModel) -> None:
    """Refuse widths by layer for a mixture of experts: few rows reach most experts, too few to measure each alone."""
    if config.mixed and any(isinstance(module, SeparateExperts) for module in skeleton.modules()):
        raise UsageError("Widths by layer are not chosen for a mixture of experts: give a whole number for --bits.")


def keep_trial(job: Job) -> float:
    """Make the blocks of the budget that was found the run's own, and remove the other trials; return its bits."""
    bits = _stored(float, job.budget, "bits")
    for path in sorted(trial_folder(job, bits).glob("block-*.safetensors")):
        path.replace(job.commits / path.name)
    for folder in job.commits.glob("trial-*"):
        shutil.rmtree(folder)
    return bits


def _stored(kind: type[T], path: Path, name: str) -> T:
    """Read a value that an interrupted run wrote to one of its files."""
    try:
        return build(kind, read_json(path).get(name), name)
    except ValueError as error:
        raise QuasarError(f"{path} is damaged ({error}): delete it, and it is measured anew.") from error


def trial_folder(job: Job, bits: float) -> Path:
    """Make the folder of a trial's commits."""
    folder = job.commits / f"trial-{bits:g}"
    folder.mkdir(exist_ok=True)
    return folder


def known_widths(
    job: Job, target: StreamedModel, calibration: Calibration, progress: Progress = no_progress
) -> list[LayerGroup]:
    """Measure what each layer costs at each width; a resumed run reads the first one's figures."""
    stored = job.commits / "widths.json"
    if not stored.exists():
        model = target.whole()
        activations = capture_first_inputs(model, calibration.samples[:ROWS], target.device)
        groups = measure_widths(model, activations, LayerPlan.of(job.config).default, progress)
        write_json(stored, {"groups": [asdict(group) for group in groups]})
    return _stored(list[LayerGroup], stored, "groups")


def spend(plan: LayerPlan, groups: Sequence[LayerGroup], bits: float, widths: Sequence[int] = BITS) -> LayerPlan:
    """Plan for the least measured divergence, by these widths, in the bytes of `bits` bits, which may be a fraction."""
    budget = int(sum(size_at(group, plan.default.group_size, bits) for group in groups))
    try:
        taken = allocate({group.names[0]: _of_widths(group.choices, widths) for group in groups}, budget)
    except ValueError as error:
        raise UsageError(f"--bits {bits:g} is too few for this model: {error}.") from error
    layers = {
        name: replace(plan.default, bits=taken[group.names[0]].bits, group_size=taken[group.names[0]].group_size)
        for group in groups
        for name in group.names
    }
    return LayerPlan(plan.default, {**layers, **plan.layers})


def _of_widths(choices: Sequence[Choice], widths: Sequence[int]) -> list[Choice]:
    return [choice for choice in choices if choice.bits in widths]


def size_at(group: LayerGroup, group_size: int, bits: float) -> float:
    """Bytes of a group of layers at so many bits, by a line through two of its widths: bytes are linear in bits."""
    plain = sorted((choice.bits, choice.size) for choice in group.choices if choice.group_size == group_size)
    (low, small), (high, large) = plain[0], plain[-1]
    return small + (large - small) * (bits - low) / (high - low) if high > low else small
