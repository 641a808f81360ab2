"""Let either model check a draft, and learn what each accepts of each drafter: what an engine of `exact` consults."""

from collections.abc import Sequence
from itertools import takewhile

from quasar_core.decode.policy.agreement import Estimate, RunningAgreement
from quasar_core.decode.policy.check import Check, Checker
from quasar_core.decode.policy.gate import Gate
from quasar_core.decode.policy.lengths import DraftLength, FixedLength
from quasar_core.decode.policy.trees import Branching, Tree
from quasar_core.draft.base import NO_DRAFT, Draft


class Checking:
    """A checker, and for each model how long drafts may be; each model's acceptance is learned by itself."""

    def __init__(
        self,
        checker: Checker,
        verifier_length: DraftLength,
        target_length: DraftLength,
        branching: Branching | None = None,
        gate: Gate | None = None,
    ) -> None:
        self.checker, self.verifier_length, self.target_length = checker, verifier_length, target_length
        self.branching, self._gate = branching, gate  # the branches are of the target's passes
        self._whole = isinstance(verifier_length, FixedLength)

    @property
    def agreement(self) -> RunningAgreement:
        """P(agree | margin), as it shows."""
        return self.checker.agreement

    @property
    def limit(self) -> int:
        """The longest draft that one of the models may want."""
        return max(self.verifier_length.limit, self.target_length.limit)

    def begin(self) -> None:
        """Another text begins."""
        self.checker.begin()
        if self._gate:
            self._gate.begin()

    def choose(self, offered: Draft, window: int, survival: float, left: int | None = None) -> tuple[Check, Draft]:
        """Who checks, and what part of the draft; with one token `left` the target, which has to confirm it anyway."""
        if left == 1 and not self._gate:
            return Check(True, 0, 0.0), NO_DRAFT
        at_verifier = self.verifier_length.cut(offered) if self.verifier_length.limit > 0 else NO_DRAFT
        at_target = offered if self.target_length.limit > 0 else NO_DRAFT
        by_target = self.target_length.acceptance.of(at_target)
        by_verifier = self.verifier_length.acceptance.of(at_verifier)
        check = self.checker.choose(window, survival, by_target, by_verifier, self._whole)
        return check, (at_target if check.by_target else at_verifier).first(check.length)

    def verified(self) -> None:
        """The verifier made a pass."""
        self.checker.verified()

    def let_through(self, estimates: Sequence[Estimate]) -> int:
        """How many of the window's first tokens, of these estimates, are committed without a confirm."""
        return self._gate.let_through(estimates) if self._gate else 0

    def learn_passed(self, estimates: Sequence[Estimate], agreed: Sequence[bool]) -> None:
        """What the target would have said of tokens that were let through."""
        for estimate, own in zip(estimates, agreed, strict=True):
            self.agreement.learn([estimate], int(own))
        if self._gate:
            self._gate.passed(agreed)

    def confirmed(self, estimates: Sequence[Estimate], accepted: int, committed: int) -> None:
        """The target made a pass, and `committed` tokens; of the window's, of these estimates, it took `accepted`."""
        self.checker.confirmed(estimates, accepted)
        if self._gate:
            self._gate.learn()
            self._gate.confirmed(committed)

    def learn_tree(self, tree: Tree, path: Sequence[int], drafting_s: float) -> None:
        """What the target accepted of a draft that it checked itself, and of the branches beside it."""
        on_draft = sum(node <= len(tree.draft.tokens) for node in path)
        self.target_length.learn(tree.draft, on_draft, drafting_s)
        if self.branching:
            self.branching.count(tree, path)

    def learn_drafts(self, drafts: Sequence[tuple[int, Draft]], text: Sequence[int]) -> None:
        """What the target would have accepted of drafts that the verifier checked: how far they are its text.

        `drafts` come with their places in `text`, which ends where the target's word ends.
        """
        for place, draft in drafts:
            known = text[place : place + len(draft.tokens)]
            right = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(draft.tokens, known, strict=False)))
            tried = draft if right < len(known) else draft.first(len(known))
            self.target_length.acceptance.count(tried.pieces, right)
