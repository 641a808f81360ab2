"""What a config.json says of mixtures of experts, which stand in the place of MLPs, or beside them.

A router gives each token a score for every expert, the best few run, and their outputs are added by their shares.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from quasar_core.models.architectures.row import Mixture, Scores


@dataclass(frozen=True)
class MixtureConfig:
    """One model's mixtures, which are alike in all its blocks."""

    row: Mixture
    count: int
    chosen: int  # experts of a token
    inner: int
    scores: Scores
    normalised: bool
    scale: float
    shared_inner: int  # 0: there is no expert of every token
    correction: str  # the name in the files, within the module, of what counts where experts are chosen; "" is none

    @property
    def places(self) -> int:
        """Experts that a token goes through."""
        return self.chosen + bool(self.shared_inner)

    @property
    def experts(self) -> int:
        """All, the one of every token included."""
        return self.count + bool(self.shared_inner)


def read_mixture(row: Mixture | None, options: Mapping[str, Any]) -> MixtureConfig | None:
    """None where the row has no mixtures, or this model has none."""
    if not _is_on(row, options):
        return None
    inner = int(options[row.inner])
    shared = int(options[row.shared_inner]) if row.shared_inner else 0
    if row.shared_count:
        shared = inner * int(options[row.shared_count] or 0)
    normalised = bool(options.get(row.normalised)) if row.normalised else row.scores == "softmax"
    return MixtureConfig(
        row=row,
        count=_count(row, options),
        chosen=int(options[row.chosen]),
        inner=inner,
        scores="chosen" if row.scores == "softmax" and normalised else row.scores,  # of the same shares
        normalised=normalised,
        scale=float(options[row.scale]) if row.scale else 1.0,
        shared_inner=shared,
        correction=row.correction if not row.correction_option or options.get(row.correction_option) else "",
    )


def sparse_blocks(row: Mixture | None, options: Mapping[str, Any]) -> tuple[bool, ...]:
    """Which blocks have experts."""
    count = int(options["num_hidden_layers"])
    if not _is_on(row, options):
        return (False,) * count
    first = int(options[row.first]) if row.first else 0
    step = int(options[row.step]) if row.step else 1
    without = options.get(row.without) or () if row.without else ()
    return tuple(i >= first and (i + 1) % step == 0 and i not in without for i in range(count))


def why_not_mixture(row: Mixture | None, options: Mapping[str, Any]) -> str | None:
    """What of a mixture is missing in config.json, or contradicts itself."""
    if not _is_on(row, options):
        return None
    named = (row.chosen, row.inner, row.shared_inner, row.shared_count, row.scale, row.first, row.step)
    missing = next((name for name in named if name and options.get(name) is None), None)
    if missing:
        return f"config.json has no {missing}"
    if row.step and options[row.step] < 1:
        return f"its {row.step} is {options[row.step]}"
    chosen, count = options[row.chosen], _count(row, options)
    return None if 0 < chosen <= count else f"{chosen} of {count} experts cannot be chosen"


def _is_on(row: Mixture | None, options: Mapping[str, Any]) -> TypeGuard[Mixture]:
    return row is not None and (not row.option or bool(options.get(row.option)))


def _count(row: Mixture, options: Mapping[str, Any]) -> int:
    return int(next((options[name] for name in row.counts if options.get(name) is not None), row.usual_count))
