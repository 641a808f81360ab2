"""Mixtures of experts in the place of MLPs: how the table names them, and what a config.json says of them.

A router gives each token a score for every expert, the best few run, and their outputs are added by their shares.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Scores = Literal["softmax", "chosen", "sigmoid"]


@dataclass(frozen=True)
class Mixture:
    """Names of a mixture's tensors in the files below its block, and its options in config.json; "" is none.

    `scores` are the shares of the chosen: of a softmax over all experts, over the chosen ones, or sigmoids.
    """

    module: str = "mlp"
    router: str = "gate"  # within the module
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")  # of experts.N
    counts: tuple[str, ...] = ("num_experts", "num_local_experts")  # options with the number of experts
    usual_count: int = 0  # where config.json has none of these
    inner: str = "moe_intermediate_size"
    scores: Scores = "softmax"
    normalised: str = ""  # the option that lets the shares of a token sum to 1
    scale: str = ""  # of the shares
    corrected: bool = False  # by stored numbers where experts are chosen, not in their shares
    shared: str = ""  # an expert of every token
    shared_inner: str = ""
    shared_count: str = ""  # so many times an expert's size
    shared_gate: str = ""  # its share is the sigmoid of this product; else 1
    first: str = ""  # the first block that has experts
    step: str = ""  # every so many blocks have some
    without: str = ""  # a list of blocks that have none
    renamed: tuple[tuple[str, str], ...] = ()  # parts of names, as transformers 5 may write them


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

    @property
    def places(self) -> int:
        """Experts that a token goes through."""
        return self.chosen + bool(self.shared_inner)

    @property
    def experts(self) -> int:
        """All, the one of every token included."""
        return self.count + bool(self.shared_inner)


def read_mixture(row: Mixture | None, options: Mapping[str, Any]) -> MixtureConfig | None:
    """None where the row has no mixtures."""
    if row is None:
        return None
    inner = int(options[row.inner])
    shared = int(options[row.shared_inner]) if row.shared_inner else 0
    if row.shared_count:
        shared = inner * int(options[row.shared_count] or 0)
    normalised = bool(options.get(row.normalised)) if row.normalised else row.scores == "softmax"
    return MixtureConfig(
        row=row,
        count=_count(row, options),
        chosen=int(options["num_experts_per_tok"]),
        inner=inner,
        scores="chosen" if row.scores == "softmax" and normalised else row.scores,  # of the same shares
        normalised=normalised,
        scale=float(options[row.scale]) if row.scale else 1.0,
        shared_inner=shared,
    )


def sparse_blocks(row: Mixture | None, options: Mapping[str, Any]) -> tuple[bool, ...]:
    """Which blocks have experts in the place of an MLP."""
    count = int(options["num_hidden_layers"])
    if row is None:
        return (False,) * count
    first = int(options[row.first]) if row.first else 0
    step = int(options[row.step]) if row.step else 1
    without = options.get(row.without) or () if row.without else ()
    return tuple(i >= first and (i + 1) % step == 0 and i not in without for i in range(count))


def why_not_mixture(row: Mixture | None, options: Mapping[str, Any]) -> str | None:
    """What of a mixture is missing in config.json, or contradicts itself."""
    if row is None:
        return None
    named = ("num_experts_per_tok", row.inner, row.shared_inner, row.shared_count, row.scale, row.first, row.step)
    missing = next((name for name in named if name and options.get(name) is None), None)
    if missing:
        return f"config.json has no {missing}"
    if row.step and options[row.step] < 1:
        return f"its {row.step} is {options[row.step]}"
    chosen, count = options["num_experts_per_tok"], _count(row, options)
    return None if 0 < chosen <= count else f"{chosen} of {count} experts cannot be chosen"


def _count(row: Mixture, options: Mapping[str, Any]) -> int:
    return int(next((options[name] for name in row.counts if options.get(name) is not None), row.usual_count))
