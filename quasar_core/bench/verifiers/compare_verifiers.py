"""Find the best verifier of a target on this device, by the measured costs of passes and the rates that follow.

Nothing is loaded: costs are those that earlier runs kept. A width that no checkpoint has is estimated: the pass of a
measured verifier, with the times of its products replaced by those of the other width's kernels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from quasar_core.bench.steps import layer_bytes, weight_bytes
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.decode.costs.cost_records import CostRecord, stored_costs
from quasar_core.decode.costs.pass_costs import PairCosts, PassCost
from quasar_core.decode.policy.lengths import predict_rates
from quasar_core.errors import QuasarError
from quasar_core.files import is_folder
from quasar_core.kernels.base import LayerShape
from quasar_core.kernels.select import select_kernel
from quasar_core.kernels.times import ROWS, kernel_times, measured_on
from quasar_core.models.config.decoder import DecoderConfig, why_not_lean
from quasar_core.models.decoder.linear import all_block_products, head_product
from quasar_core.store import fingerprint, list_pairs, read_text_headers

SHOWN = (1, 4, 8)  # tokens
COMPARED_BITS = (4, 8)


@dataclass(frozen=True)
class PassFigures:
    """What passes of a model cost on this device."""

    ms: list[float]  # of passes over SHOWN tokens
    floor_ms: float | None  # that reading the weights takes; None where the bandwidth is not known
    source: str  # how the costs are known: when they were measured, or from which verifier they are estimated
    products: str  # the kernel of the products


@dataclass(frozen=True)
class VerifierFigures:
    """A verifier's passes, its agreement, and the tokens per second to expect of it.

    `exact_is_bound`: the margins are those of a verifier of fewer bits, so that more may be expected.
    """

    name: str
    bits: int
    passes: PassFigures
    agreement: float | None
    quantized: float
    exact: float | None
    exact_is_bound: bool = False


@dataclass(frozen=True)
class VerifierComparison:
    """A target's passes, its rates alone, and its verifiers, the best of each mode by name."""

    device: str
    dtype: str
    target: PassFigures
    plain: float
    full: float
    verifiers: list[VerifierFigures]
    best_quantized: str | None
    best_exact: str | None


@dataclass(frozen=True)
class _Verifier:
    name: str
    checkpoint: VerifierCheckpoint
    record: CostRecord


def compare_verifiers(checkpoint: VerifierCheckpoint, device: torch.device, bandwidth: float) -> VerifierComparison:
    """The recorded verifiers of this one's target, and the common widths that none of them has.

    `bandwidth` in bytes per second gives the floors. QuasarError where the target's passes were never measured here.
    """
    here = _records_here(checkpoint.target_fingerprint, device)
    confirm = next((record for record in here if record.conditions["role"] == "target"), None)
    if confirm is None:
        raise QuasarError(
            "The passes of its target were not measured here yet: `quasar generate` does that, or `doctor --remeasure`."
        )
    comparer = _Comparer(checkpoint, confirm, device, bandwidth)
    known = _known_verifiers(checkpoint, here, confirm.conditions["dtype"])
    verifiers = [comparer.measured(verifier) for verifier in known]
    missing = [bits for bits in COMPARED_BITS if bits not in {verifier.bits for verifier in verifiers}]
    if known and comparer.config is not None:
        verifiers += [comparer.estimated(bits, known[0]) for bits in missing]
    alone = predict_rates(PairCosts(confirm.cost, confirm.cost), None)
    return VerifierComparison(
        device=confirm.conditions["device"],
        dtype=confirm.conditions["dtype"],
        target=comparer.figures(confirm.cost, comparer.target_bytes, confirm.when, confirm.conditions["products"]),
        plain=alone.plain,
        full=alone.full,
        verifiers=verifiers,
        best_quantized=_best({verifier.name: verifier.quantized for verifier in verifiers}),
        best_exact=_best({verifier.name: verifier.exact for verifier in verifiers}),
    )


def _best(rates: Mapping[str, float | None]) -> str | None:
    known = {name: rate for name, rate in rates.items() if rate is not None}
    return max(known, key=lambda name: known[name]) if known else None


def _records_here(target: str | None, device: torch.device) -> list[CostRecord]:
    """The target's costs and its verifiers', measured under this device's conditions in any dtype, latest first."""
    if target is None:
        return []
    now = {name: value for name, value in measured_on(device, torch.bfloat16).items() if name != "dtype"}
    wanted = {**now, "target": target}
    return [record for record in stored_costs() if wanted.items() <= record.conditions.items()]


def _known_verifiers(checkpoint: VerifierCheckpoint, here: Sequence[CostRecord], dtype: str) -> list[_Verifier]:
    """This verifier and the recorded ones of its target whose costs are known in a dtype; this one first."""
    folders = {checkpoint.folder: checkpoint.folder.name}
    folders.update({Path(pair.verifier): pair.name for pair in list_pairs() if is_folder(Path(pair.verifier))})
    costs = {
        record.conditions["verifier"]: record
        for record in reversed(here)
        if record.conditions["role"] == "verifier" and record.conditions["dtype"] == dtype
    }
    found = []
    for folder, name in folders.items():
        key = fingerprint(folder)
        if key in costs:
            found.append(_Verifier(name, VerifierCheckpoint(folder), costs[key]))
    return found


class _Comparer:
    """What is the same for all verifiers of a target."""

    def __init__(
        self, checkpoint: VerifierCheckpoint, confirm: CostRecord, device: torch.device, bandwidth: float
    ) -> None:
        self.confirm, self.device, self.bandwidth = confirm, device, bandwidth
        self.dtype: torch.dtype = getattr(torch, confirm.conditions["dtype"])
        self.config = None if why_not_lean(checkpoint.config) else DecoderConfig.parse(checkpoint.config)
        self.blocks = all_block_products(self.config) if self.config else []
        self.target_bytes = weight_bytes(self.config, self.dtype.itemsize) if self.config else None

    def figures(self, cost: PassCost, size: int | None, source: str, products: str) -> PassFigures:
        """Figures of passes that read `size` bytes of weights."""
        floor = None if size is None else 1000 * size / self.bandwidth
        return PassFigures([1000 * cost(tokens) for tokens in SHOWN], floor, source, products)

    def measured(self, verifier: _Verifier) -> VerifierFigures:
        """A verifier whose passes were measured."""
        record, fidelity = verifier.record, verifier.checkpoint.fidelity
        size = self._verifier_bytes(verifier.checkpoint)
        rates = predict_rates(PairCosts(record.cost, self.confirm.cost), fidelity.margins if fidelity else None)
        return VerifierFigures(
            name=verifier.name,
            bits=verifier.checkpoint.format.bits,
            passes=self.figures(record.cost, size, record.when, record.conditions["products"]),
            agreement=fidelity.agreement if fidelity else None,
            quantized=rates.quantized,
            exact=rates.exact,
        )

    def estimated(self, bits: int, known: _Verifier) -> VerifierFigures:
        """A width that no verifier has, from one that was measured."""
        codes, cost, fidelity = known.checkpoint.format, known.record.cost, known.checkpoint.fidelity
        own, other = (self._product_times(width, codes.group_size) for width in (codes.bits, bits))
        # What is not multiplied takes as long; a sum of kernels' times may exceed a pass that hides their calls.
        passes = {rows: max(cost(rows) - own[rows] + other[rows], 0.1 * cost(rows)) for rows in ROWS}
        estimate = PassCost(ROWS, tuple(passes.values()))
        margins = fidelity.margins if fidelity and bits > codes.bits else None
        rates = predict_rates(PairCosts(estimate, self.confirm.cost), margins)
        size = self._verifier_bytes(known.checkpoint)
        if size is not None:
            size += self._code_bytes(bits, codes.group_size) - self._code_bytes(codes.bits, codes.group_size)
        return VerifierFigures(
            name=f"{bits} bits, not made yet",
            bits=bits,
            passes=self.figures(estimate, size, f"estimated from {known.name}", "the fastest kernels"),
            agreement=None,
            quantized=rates.quantized,
            exact=rates.exact,
            exact_is_bound=margins is not None,
        )

    def _product_times(self, bits: int, group_size: int) -> dict[int, float]:
        """Seconds of all products of the blocks, by rows, on the kernel that each would get."""
        remembered, total = kernel_times(self.device, self.dtype), dict.fromkeys(ROWS, 0.0)
        for product in self.blocks:
            shape = LayerShape(product.columns, sum(product.rows), bits, group_size, trivial_groups=True)
            kernel = select_kernel(shape, self.device, self.dtype).kernel
            times = remembered.of([kernel], shape).seconds[kernel.name]
            for rows in ROWS:
                total[rows] += times[rows]
        return total

    def _code_bytes(self, bits: int, group_size: int) -> int:
        """Bytes of the codes of all blocks in a width."""
        return sum(layer_bytes(product.columns, sum(product.rows), bits, group_size) for product in self.blocks)

    def _verifier_bytes(self, checkpoint: VerifierCheckpoint) -> int | None:
        """Packed layers by what is stored of them, the rest as the target has it."""
        if self.config is None or self.target_bytes is None:
            return None
        packed, tensors = set(checkpoint.layer_names), set(checkpoint.packed_names)
        stored = sum(
            entry.size
            for entry in read_text_headers(checkpoint.folder)
            if entry.name in tensors and not entry.name.endswith(".g_idx")
        )
        products = [*self.blocks, head_product(self.config)]
        replaced = sum(
            rows * product.columns
            for product in products
            for name, rows in zip(product.names, product.rows, strict=True)
            if name in packed
        )
        return self.target_bytes - self.dtype.itemsize * replaced + stored
