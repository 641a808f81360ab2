"""The plan of a step of decoding, made before its pass begins."""

from dataclasses import dataclass

from quasar_core.decode.policy.trees import Tree
from quasar_core.draft.base import Draft
from quasar_core.records import Piece


@dataclass(frozen=True)
class Plan:
    """A draft, and which of the two models checks it."""

    draft: Draft
    by_target: bool
    tree: Tree  # the tokens of the pass
    seconds: float  # that drafting took
    left_out: tuple[Piece, ...] = ()  # what the drafter offered behind the draft
