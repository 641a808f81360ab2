"""Costs of passes, measured once on a device and kept in quasar's own folder for every later run."""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from math import inf
from pathlib import Path
from typing import Any, Literal

import torch

from quasar_core.decode.costs import PairCosts, PassCost, measure_pass
from quasar_core.errors import QuasarError
from quasar_core.files import read_json_if_there, write_json
from quasar_core.kernels.identity import measured_on
from quasar_core.models.base import CausalLM
from quasar_core.models.pair import Pair
from quasar_core.store.home import home
from quasar_core.typed import build

Role = Literal["target", "verifier"]
SHOWN = (1, 4, 8)  # tokens


@dataclass(frozen=True)
class CostRecord:
    """A model's cost and the conditions that it holds under; when it was measured, in seconds since 1970.

    `trouble` says in a sentence why it was not read from the disk, or is not kept there.
    """

    cost: PassCost
    conditions: dict[str, str]
    measured_at: float
    remembered: bool = False  # whether an earlier run measured it
    trouble: str | None = None

    @property
    def when(self) -> str:
        """Such as "measured now", or "remembered from 3 hours ago"."""
        said = f"remembered from {_ago(time.time() - self.measured_at)}" if self.remembered else "measured now"
        return f"{said} ({self.trouble})" if self.trouble else said

    def describe(self) -> str:
        """Whose passes take how long, and since when that is known."""
        times = ", ".join(f"{1000 * self.cost(tokens):.3g}" for tokens in SHOWN)
        sizes = ", ".join(map(str, SHOWN))
        return f"the {self.conditions['role']}'s passes of {sizes} tokens take {times} ms, {self.when}"


@dataclass(frozen=True)
class _Stored:
    """The content of a file of costs."""

    conditions: dict[str, str]
    measured_at: float
    seconds: dict[str, float]


def pair_costs(pair: Pair, with_verifier: bool, remeasure: bool = False) -> PairCosts:
    """The costs that a mode needs."""
    if with_verifier and pair.verifier is not None:
        verify = cost_record(pair, "verifier", remeasure).cost
        return PairCosts(verify, cost_record(pair, "target", remeasure).cost if pair.target else verify)
    alone = cost_record(pair, "target" if pair.target else "verifier", remeasure).cost
    return PairCosts(alone, alone)


def cost_record(pair: Pair, role: Role, remeasure: bool = False) -> CostRecord:
    """The cost of a loaded model: known already, else remembered from the disk, else measured and kept."""
    known: CostRecord | None = pair.measured.get(role)
    if known is None or remeasure:
        known = pair.measured[role] = _remember_or_measure(pair, role, remeasure)
    return known


def stored_costs() -> Iterator[CostRecord]:
    """Every cost on the disk that holds for this version, the latest first; a damaged file is a QuasarError."""
    records = [_read(path) for path in (home() / "costs").glob("*.json")]
    current = _quasar_version()
    yield from sorted(
        (record for record in records if record and record.conditions.get("quasar") == current),
        key=lambda record: -record.measured_at,
    )


def _remember_or_measure(pair: Pair, role: Role, remeasure: bool) -> CostRecord:
    model = pair.target if role == "target" else pair.verifier
    assert model is not None
    conditions, trouble = _conditions(pair, role, model), None
    path = _path(conditions)
    is_kept = _fingerprints(pair, role) is not None
    if is_kept and not remeasure:
        try:
            if record := _read(path):
                return record
        except QuasarError as error:
            trouble = f"anew, as {error}".rstrip(".")
    record = CostRecord(measure_pass(pair, model), conditions, time.time(), trouble=trouble)
    return _keep(path, record) if is_kept else record


def _fingerprints(pair: Pair, role: Role) -> dict[str, str] | None:
    """Whose cost it is; None for models that are in no files."""
    prints = {"target": pair.target_fingerprint}
    if role == "verifier":
        prints["verifier"] = pair.verifier_fingerprint
    return {name: value for name, value in prints.items() if value} if all(prints.values()) else None


def _conditions(pair: Pair, role: Role, model: CausalLM) -> dict[str, str]:
    kernels = sorted({layer.choice.kernel.name for layer in getattr(model, "packed_layers", ())})
    fast = getattr(model, "fast", None)
    return {
        **(_fingerprints(pair, role) or {}),
        "role": role,
        "products": ", ".join(kernels) or "torch linear",
        "passes": f"{type(model).__name__}, {fast.name}" if fast else type(model).__name__,
        "quasar": _quasar_version(),
        **measured_on(pair.device, pair.dtype),
    }


def _path(conditions: dict[str, str]) -> Path:
    key = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:16]
    return home() / "costs" / f"{key}.json"


def _read(path: Path) -> CostRecord | None:
    content = read_json_if_there(path)
    if content is None:
        return None
    try:
        stored = build(_Stored, content)
        sizes, seconds = tuple(map(int, stored.seconds)), tuple(stored.seconds.values())
        _check_conditions(stored.conditions)
        ordered = list(sizes) == sorted(set(sizes)) and list(seconds) == sorted(seconds)
        figures = (stored.measured_at, *seconds)
        if not sizes or not ordered or sizes[0] < 1 or not all(0 < figure < inf for figure in figures):
            raise ValueError("no costs")
        return CostRecord(PassCost(sizes, seconds), stored.conditions, stored.measured_at, True)
    except ValueError as error:
        raise QuasarError(f"{path} is damaged.") from error


def _check_conditions(conditions: dict[str, str]) -> None:
    """ValueError where what others read of them is not there."""
    needed = {"role", "products", "device", "dtype", *(["verifier"] if conditions.get("role") == "verifier" else [])}
    if needed - conditions.keys() or not isinstance(getattr(torch, conditions["dtype"], None), torch.dtype):
        raise ValueError("no conditions")


def _keep(path: Path, record: CostRecord) -> CostRecord:
    content: dict[str, Any] = {
        "conditions": record.conditions,
        "measured_at": record.measured_at,
        "seconds": dict(zip(map(str, record.cost.sizes), record.cost.seconds, strict=True)),
    }
    try:
        write_json(path, content)
    except QuasarError as error:
        return replace(record, trouble=f"not kept: {error}".rstrip("."))
    return record


def _quasar_version() -> str:
    try:
        return version("quasar-cli")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"


def _ago(seconds: float) -> str:
    for unit, length in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        count = int(seconds // length)
        if count:
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "less than a minute ago"
