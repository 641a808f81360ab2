"""What a step of decoding does first, decided before its pass begins."""

from dataclasses import dataclass

from quasar_core.decode.policy.trees import Tree
from quasar_core.draft.base import Draft
from quasar_core.records import Piece


@dataclass(frozen=True)
class Plan:
    """A draft, which of the models checks it, the tokens of that pass; how long drafting took, what it offered more."""

    draft: Draft
    by_target: bool
    tree: Tree
    seconds: float
    left_out: tuple[Piece, ...] = ()
