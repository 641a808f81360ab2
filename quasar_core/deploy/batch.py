"""Draft for a batch of texts that another engine decodes: know its rows again, and decide by how many they are."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from numpy.typing import NDArray

from quasar_core.config import Auto, GenerationConfig
from quasar_core.decode.costs.cost_records import cost_record, positions_seen
from quasar_core.decode.costs.pass_costs import Cost, LiveCost, PairCosts, PlacedCost
from quasar_core.decode.drafts.drafting import Drafting
from quasar_core.decode.policy.agreement import UNKNOWN, AgreementCurve, RunningAgreement
from quasar_core.decode.policy.check import Check, Checker
from quasar_core.decode.policy.checking import Checking
from quasar_core.decode.policy.lengths import AdaptiveLength, plan_exact
from quasar_core.deploy.ahead import Ahead, FreeCaches
from quasar_core.draft.acceptance import Acceptance
from quasar_core.models.pair import Pair
from quasar_core.typed import build

Tokens = NDArray[Any]
SECTION = "quasar"  # of the engine's additional config


@dataclass(frozen=True)
class ProposerSettings:
    """What drafts are made of: `quasar deploy` writes it, under `quasar` of vLLM's `--additional-config`.

    The low-bit copy drafts while no more than `copy_texts` texts are decoded at once: it passes them one by one.
    """

    verifier: str
    window: int | Auto = "auto"
    draft: str = "auto"
    draft_from: tuple[str, ...] = field(default_factory=tuple)
    copy_texts: int = 4

    @classmethod
    def of(cls, additional: Any) -> "ProposerSettings":
        """ValueError that says what is missing or odd."""
        section = additional.get(SECTION) if isinstance(additional, dict) else None
        if section is None:
            raise ValueError(f"--additional-config lacks {SECTION}: `quasar deploy` writes it")
        return build(cls, section, SECTION)

    def config(self) -> GenerationConfig:
        """The config of `quasar generate`; UsageError for what cannot be."""
        return GenerationConfig(draft=self.draft, draft_from=self.draft_from, window=self.window)


@dataclass(frozen=True)
class Shared:
    """The cost of a pass for each of several texts: its share of the seconds of a pass over all of them."""

    cost: PlacedCost
    texts: int

    def at(self, positions: float) -> Cost:
        """The cost where each text has so many positions before it."""
        here = self.cost.at(positions)
        return lambda tokens: here(self.texts * tokens) / self.texts

    def __call__(self, tokens: int) -> float:
        """Seconds of a pass in which each text has `tokens` tokens, by the number of texts."""
        return self.cost(self.texts * tokens) / self.texts


class FixedChecker(Checker):
    """The copy drafts up to a number of tokens, whatever passes cost."""

    limit = 0

    def choose(
        self,
        window: int,
        survival: float,
        by_target: Sequence[float],
        by_verifier: Sequence[float],
        whole: bool = False,
    ) -> Check:
        """See `Checker`."""
        return Check(True, 0, 0.0) if window >= self.limit else Check(False, len(by_verifier), 0.0)


class Decisions:
    """Who checks which drafts, by how many texts are decoded at once; what is learned of drafts holds for all.

    What the target's passes cost the engine shows. Until they are known they are taken to cost `ratio` times the
    copy's. Of T tokens for each of n texts a pass costs each of them its n-th part, while the copy passes one text
    after another: with more texts, its drafts have to be better to pay.
    """

    def __init__(self, pair: Pair, window: int | Auto, ratio: float) -> None:
        self._window = window
        self._acceptance = Acceptance()
        table = pair.fidelity.margins if pair.fidelity else UNKNOWN
        self._agreement = RunningAgreement(AgreementCurve(table))
        known = cost_record(pair, "verifier").cost
        self._verify = LiveCost(known)
        self._target = replace(known, seconds=tuple(ratio * seconds for seconds in known.seconds))
        self._by_texts: dict[int, tuple[Checking, LiveCost]] = {}

    def of(self, texts: int, positions: float) -> Checking:
        """Who checks the drafts of so many texts; of one of so many tokens, which a pass sees before it."""
        checking, target = self._known(texts)
        self._verify.move_to(positions)
        target.move_to(positions)
        return checking

    def observe(self, texts: int, rows: int, seconds: float) -> None:
        """A pass of the target over so many texts, `rows` tokens together, took so long."""
        self._known(texts)[1].observe(max(round(rows / texts), 1), seconds / texts)

    def _known(self, texts: int) -> tuple[Checking, LiveCost]:
        """The number that stands for all numbers of texts between two powers of two."""
        size = 1 << (texts - 1).bit_length()
        if size not in self._by_texts:
            target = LiveCost(Shared(self._target, size))
            self._by_texts[size] = self._make(PairCosts(self._verify, target), target), target
        return self._by_texts[size]

    def _make(self, costs: PairCosts, target: LiveCost) -> Checking:
        usual = [plan_exact(costs, self._agreement.now).usual]
        checker = (Checker if self._window == "auto" else FixedChecker)(costs, self._agreement, usual)
        if isinstance(checker, FixedChecker):
            assert self._window != "auto"
            checker.limit = self._window
        return Checking(
            checker, AdaptiveLength(self._verify, self._acceptance), AdaptiveLength(target, Acceptance(), timed=False)
        )


class Batch:
    """The texts of an engine's rows. Rows change places between passes: they are known again by their tokens."""

    def __init__(
        self,
        pair: Pair,
        settings: ProposerSettings,
        ratio: float,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._pair, self._settings, self._now = pair, settings, now
        config = settings.config()
        self._drafting, self._request = Drafting(pair, config), config.request
        self._drafting.sources.memory = None  # texts of other users stay theirs
        self._caches = FreeCaches(pair, settings.copy_texts)
        self._decisions = Decisions(pair, settings.window, ratio)
        self._texts: dict[int, Ahead] = {}  # by their rows in the last pass
        self._rows = 0  # tokens of the target's pass that is under way; 0 where its time would tell nothing
        self._ended = now()

    def propose(
        self, sampled: Sequence[Sequence[int]], lengths: Sequence[int] | Tokens, ids: Tokens, limit: int
    ) -> list[list[int]]:
        """Drafts of at most `limit` tokens for each row; ids [rows, length] hold texts of `lengths` tokens.

        A row whose `sampled` is empty is in the middle of its prompt, and gets none.
        """
        elapsed = self._now() - self._ended
        active = {row: ids[row, : int(lengths[row])] for row, new in enumerate(sampled) if len(new)}
        before, self._texts = self._texts, {}
        fresh = self._take_over(before, active)
        if before and self._rows and not fresh and len(self._texts) == len(before):
            self._decisions.observe(len(before), self._rows, elapsed)
        drafts: list[list[int]] = [[] for _ in sampled]
        for row, text in self._texts.items():
            drafts[row] = self._draft(text, limit)
        self._rows = len(active) + sum(map(len, drafts)) if len(active) == len(sampled) else 0
        self._ended = self._now()
        return drafts

    def _draft(self, text: Ahead, limit: int) -> list[int]:
        count = len(self._texts)
        room = self._pair.max_context - len(text.tokens) - 1
        with_copy = count <= self._settings.copy_texts
        seen = positions_seen(self._pair.verifier, len(text.tokens))
        return text.propose(min(limit, room), self._decisions.of(count, seen), with_copy) if room > 0 else []

    def _take_over(self, before: dict[int, Ahead], active: dict[int, Tokens]) -> int:
        """Let each row go on with its text; rows without one begin one. Returns how many those are."""
        left, fresh = dict(before), []
        for row, tokens in active.items():
            found = next((other for other in _likely(row, left) if _goes_on(left[other], tokens)), None)
            if found is None:
                fresh.append(row)
                continue
            text = self._texts[row] = left.pop(found)
            text.follow(tokens[len(text.tokens) :].tolist())
        for text in left.values():
            text.close()
        for row in fresh:
            self._texts[row] = self._begin(active[row].tolist())
        return len(fresh)

    def _begin(self, tokens: list[int]) -> Ahead:
        drafter = self._drafting.begin(self._request)
        return Ahead(self._pair, self._caches, drafter, tokens, self._now)


def _likely(row: int, texts: dict[int, Ahead]) -> list[int]:
    """Rows in the order in which they may hold the text: its own row first."""
    return sorted(texts, key=lambda other: other != row)


def _goes_on(text: Ahead, tokens: Tokens) -> bool:
    """Whether a row's tokens begin with the text, and have more."""
    length = len(text.tokens)
    return len(tokens) > length and text.tokens[-1] == tokens[length - 1] and text.tokens == tokens[:length].tolist()
