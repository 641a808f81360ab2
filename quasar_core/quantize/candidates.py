"""Try several verifiers of one target before one is made: their codes on one set of Hessians, and their agreement.

Every layer's Hessian and its factor are those of the target's own inputs on one text, and each candidate's codes are
solved with them: so a further candidate costs its solving alone. The verifier itself is made as all are, each layer
fitted to what the layers before it have left, and agrees a little more often than its look says.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from quasar_core.checkpoint.compressed_tensors import PackedWeight
from quasar_core.kernels.linear import PackedLinear
from quasar_core.malloc import return_freed_memory
from quasar_core.quantize.blocks.activations import Activations, capture_first_inputs
from quasar_core.quantize.blocks.collect import Stage, collect_inputs, find_stages, trace_block
from quasar_core.quantize.blocks.layerwise import hessian_of, make_room
from quasar_core.quantize.blocks.streaming import StreamedModel, find_head, linear_layers
from quasar_core.quantize.calibration import GREEDY_FROM, Calibration
from quasar_core.quantize.commits import QuantizedBlock, block_file, read_commit, write_commit
from quasar_core.quantize.fidelity import margins, piece_of
from quasar_core.quantize.layer_plan import HEAD, LayerPlan
from quasar_core.quantize.measure_fidelity import RowsRead, read_beside
from quasar_core.quantize.mixed_precision import CommittedModel
from quasar_core.quantize.solve.factor import inverse_factor
from quasar_core.quantize.solve.gptq import SolverConfig, column_order, solve, solve_layer
from quasar_core.quantize.solve.hessian import HessianAccumulator
from quasar_core.records import Progress, no_progress

Plans = Mapping[Path, LayerPlan]  # of candidates, by the folders of their commits


@torch.inference_mode()
def commit_candidates(
    target: StreamedModel, samples: torch.Tensor, plans: Plans, progress: Progress = no_progress
) -> Activations:
    """Commit every block of each plan, solved on the target's own inputs; what has a commit is not solved again.

    Returns the outputs of the target's last block on the samples [N, L].
    """
    activations = capture_first_inputs(target.ends(torch.device("cpu")), samples, target.device)
    for folder in plans:
        folder.mkdir(exist_ok=True)
    for index in range(target.count):
        progress("trying verifiers", index, target.count)
        block, name = target.block(index), f"{target.prefix}.{index}"
        wanted = {folder: plan for folder, plan in plans.items() if not block_file(folder, index).exists()}
        for folder, done in _solve_block(block, name, activations, wanted).items() if wanted else ():
            write_commit(block_file(folder, index), done, target.stored)
        activations.advance(block)
        return_freed_memory()
    progress("trying verifiers", target.count, target.count)
    return activations


def _solve_block(
    block: torch.nn.Module, name: str, activations: Activations, plans: Plans
) -> dict[Path, QuantizedBlock]:
    """Solve all layers of a block by each plan."""
    found = {folder: QuantizedBlock({}, {}) for folder in plans}
    layers = linear_layers(block)
    for stage in find_stages(trace_block(block, activations)):
        for own, hessian in _hessians(block, name, stage, layers, activations):
            for folder, layer, weight in _solve_layers(own, hessian, plans):
                found[folder].weights[layer] = weight
    return found


def _hessians(
    block: torch.nn.Module, name: str, stage: Stage, layers: dict[str, torch.nn.Linear], activations: Activations
) -> Iterator[tuple[dict[str, torch.nn.Linear], torch.Tensor]]:
    """The layers of one input, by their full names, and its Hessian."""
    inputs = collect_inputs(block, stage, layers, activations)
    for names in stage.groups:
        own = {f"{name}.{layer}": layers[layer] for layer in names}
        make_room(layers[names[0]])
        yield own, hessian_of(f"{name}.{names[0]}", layers[names[0]], inputs.pop(names[0])).float()


def _solve_layers(
    own: Mapping[str, torch.nn.Linear], hessian: torch.Tensor, plans: Plans
) -> Iterator[tuple[Path, str, PackedWeight]]:
    """Solve layers of one Hessian; one factor serves all plans."""
    options = next(iter(plans.values())).default
    factor = inverse_factor(hessian, column_order(hessian, options.act_order), options.damp, next(iter(own)))
    for folder, plan in plans.items():
        for name, linear in own.items():
            yield folder, name, solve_layer(linear.weight, hessian, factor, plan.solver(name), None, name).weight


@torch.inference_mode()
def solve_head(ends: PreTrainedModel, activations: Activations, options: SolverConfig) -> PackedWeight:
    """The head in these options' codes, on the outputs of the target's last block."""
    norm, head = find_head(ends)
    sums = HessianAccumulator(head.in_features, head.weight.device)
    for rows in activations.hidden.split(1):
        sums.add(norm(rows.to(head.weight.device)))
    return solve(head.weight, hessian_of(HEAD, head, sums), options, HEAD).weight


@dataclass(frozen=True)
class Look:
    """What a verifier says along rows of the target's greedy text: its margins, and where the target agrees."""

    margins: list[list[float]]
    agreed: list[list[bool]]

    @property
    def agreement(self) -> float:
        """The share of tokens."""
        agreed = [one for row in self.agreed for one in row]
        return sum(agreed) / len(agreed)


class PackedModel(CommittedModel):
    """A candidate as decoding runs it: its codes on the kernels of this device, which may round activations too."""

    def block(self, index: int) -> torch.nn.Module:
        """One block, its layers packed."""
        block, name = self._target.block(index), f"{self.prefix}.{index}."
        for full_name, weight in read_commit(block_file(self._commits, index)).weights.items():
            pack_layer(block, full_name.removeprefix(name), weight, self._target)
        return block


def pack_layer(module: torch.nn.Module, name: str, weight: PackedWeight, target: StreamedModel) -> None:
    """Put packed codes in the place of a linear layer of a module."""
    parent, _, last = name.rpartition(".")
    owner = module.get_submodule(parent)
    linear = getattr(owner, last)
    setattr(owner, last, PackedLinear.build(weight, linear.bias, target.device, target.dtype, "auto"))


class Watcher:
    """Compares verifiers with the target on rows of its greedy text [n, T]; what the target chooses is read once."""

    def __init__(self, target: StreamedModel, text: Calibration) -> None:
        self.target, self.rows = target, text.greedy
        self._own: list[list[int]] = []

    def read(self, folder: Path, progress: Progress = no_progress) -> torch.Tensor:
        """Run the rows through the blocks that a candidate's folder holds, beside the target's."""
        model, stage = PackedModel(self.target, folder), "reading held-out text: verifier"
        theirs, states, _ = read_beside(self.target, model, self.rows[:, :-1], stage, progress)
        if not self._own:
            self._own = [[token for token, _ in row] for row in self._chosen(theirs, None)]
        return states

    def look(self, states: torch.Tensor, head: PackedWeight | None) -> Look:
        """Compare what was read, with the target's own head or a packed one."""
        rows = self._chosen(states, head)
        agreed = [
            [token == own for (token, _), own in zip(row, owns, strict=True)]
            for row, owns in zip(rows, self._own, strict=True)
        ]
        return Look([[margin for _, margin in row] for row in rows], agreed)

    @torch.inference_mode()
    def _chosen(self, states: torch.Tensor, head: PackedWeight | None) -> list[list[tuple[int, float]]]:
        """The best token at each place behind the rows' sampled beginnings, and its margin."""
        ends = self.target.ends()
        if head is not None:
            pack_layer(ends, HEAD, head, self.target)
        read, first = RowsRead(ends, [(self.rows[:, :-1], states)]), min(GREEDY_FROM, self.rows.shape[1] - 1) - 1
        return [self._row(read, row, first) for row in self.rows[:, :-1].tolist()]

    @staticmethod
    def _row(read: RowsRead, tokens: Sequence[int], first: int) -> list[tuple[int, float]]:
        found = list[tuple[int, float]]()
        for logits in read.pieces(tokens, first, piece_of(read.vocab_size)):
            found += zip(logits.argmax(dim=-1).tolist(), margins(logits).tolist(), strict=True)
        return found
