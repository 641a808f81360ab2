"""The self-speculative loop: draft, verify, confirm.

It knows models, a cache and token ids; nothing of text. In `full` the target verifies the drafts itself; in
`quantized` the verifier does, and its word is final; in `exact` verified tokens wait in the window until the target
has confirmed them, or the target checks a draft at once; in `gated` only those wait that the verifier is not sure of.
Letters: k draft tokens, W window tokens, V vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import cast

from quasar_core.config import GenerationConfig
from quasar_core.decode.answering import Answering
from quasar_core.decode.passes import Passes, accept, verifying_model
from quasar_core.decode.plan import Plan
from quasar_core.decode.policy.agreement import Estimate
from quasar_core.decode.policy.checking import Checking
from quasar_core.decode.policy.lengths import DraftLength, WindowPolicy
from quasar_core.decode.policy.trees import WINDOW, Branching, Tree
from quasar_core.decode.step_log import StepLog
from quasar_core.draft.base import NO_DRAFT, Draft, Drafter, pieces_behind
from quasar_core.errors import QuasarError
from quasar_core.models.base import NO_TOKEN, NOT_NUMBERS, CausalLM, Choices, KVCache, TreeCache
from quasar_core.models.memory.estimate import PROMPT_CHUNK
from quasar_core.models.pair import Pair
from quasar_core.models.rollback import settle
from quasar_core.records import Stats

MOST_UNSEEN = 32  # tokens that are let through between two confirms
# Tokens of a prompt's pass: enough to be bound by arithmetic, few enough that their activations are small.
PREFILL_CHUNK = {"cpu": 512, "cuda": PROMPT_CHUNK}

Observe = Callable[[int, float], None]  # told the tokens and seconds of a confirm pass


def prompt_chunk(pair: Pair, length: int) -> int:
    """Tokens of each pass over a prompt of so many.

    Where layers are recurrent it is one pass, as in transformers, which may begin their state anew in each.
    """
    return PREFILL_CHUNK[pair.primary.device.type] if pair.rolls_back else length


class Engine:
    """One generation. `tokens` holds prompt, committed tokens and window; only the last has no place in the cache."""

    def __init__(
        self,
        pair: Pair,
        cache: KVCache,
        config: GenerationConfig,
        drafter: Drafter,
        draft_length: DraftLength,
        window: WindowPolicy,
        max_tokens: int,
        checking: Checking | None = None,
        observe: Observe | None = None,
        now: Callable[[], float] = time.perf_counter,
        answering: Answering | None = None,
        branching: Branching | None = None,
    ) -> None:
        self.pair, self.cache, self.config = pair, cache, config
        self.drafter, self.draft_length, self.window_policy = drafter, draft_length, window
        self.max_tokens = max_tokens  # prompt included
        self._checking, self._observe, self._now = checking, observe, now
        self.confirms = config.confirms
        self.verifying = verifying_model(pair, config.verify)
        self.answering = answering or Answering()
        self._passes = Passes(pair, self.verifying, cache, config, self.answering, drafter.wants_best)
        # With rules or scores each row would need the text of its own path.
        forks = not self._passes.changes and self.answering.scores is None
        self._branching = branching if forks else None
        self._branching_at_target = checking.branching if checking and forks else None
        usual = frozenset() if config.ignore_eos else pair.eos_ids
        self.eos_ids = usual if self.answering.ends is None else self.answering.ends
        self.stats = Stats()
        self._log = StepLog(self.stats, self.verifying is pair.target)
        self.tokens: list[int] = []
        self.committed = 0
        self._plan: Plan | None = None  # of a step that has begun
        self._earlier_s = 0.0  # that the step took before it was asked for
        self._survival = 1.0  # P(the target agrees with the whole window)
        self._passed: list[Estimate] = []  # of tokens that were let through since, which the target has not passed
        self._estimates: list[Estimate] = []  # and with each of its tokens, where it is asked of either model
        self._drafts: list[tuple[int, Draft]] = []  # that the verifier checked since the last confirm, and their places

    @property
    def window(self) -> list[int]:
        """Tokens that wait for a confirm."""
        return self.tokens[self.committed :]

    @property
    def seen(self) -> int:
        """How many tokens the target has passed or made: all that are committed but for those that were let through."""
        return self.committed - len(self._passed)

    def prefill(self, prompt: Sequence[int], cached: int = 0) -> None:
        """Run the prompt beyond the `cached` tokens through the target, in chunks; commit the token that follows."""
        start = self._now()
        self._passes.begin(prompt, self.max_tokens, self.eos_ids)
        choices = self._passes.read(prompt, cached, prompt_chunk(self.pair, len(prompt)))
        self.tokens = list(prompt)
        self.drafter.observe(self.tokens)
        self._show(prompt[-1:], choices.likeliest, len(prompt) - 1)
        self._extend(choices.tokens)
        self._passes.score(choices.tokens)
        self.drafter.propose(1)  # so that indexing the prompt is part of its own time
        self.committed = len(self.tokens)
        self.stats.prompt_tokens, self.stats.cached_tokens = len(prompt), cached
        settle(self.cache, self.committed - 1)
        self.stats.prefill_tokens = 1
        self.stats.prefill_s = self._now() - start

    def verify_by(self, model: CausalLM) -> None:
        """Let another model over the same cache verify from here on."""
        self.verifying = model
        self._passes.verify_by(model)

    def begin(self) -> None:
        """Let the next step's first pass begin where a device runs it: what is done until `step` costs no time then.

        Only what is committed must be looked at between the two.
        """
        if self._plan is None and not self._ends and self._passes.start_early:
            start = self._now()
            self._plan = plan = self._make_plan()
            self._earlier_s = self._now() - start
            if plan.by_target:
                self.cache.rollback(self.seen - 1)
            model = self.pair.primary if plan.by_target else self.verifying
            parents = plan.tree.parents if plan.tree.branches else None
            self._passes.start(model, plan.tree.tokens, parents)

    def step(self) -> None:
        """Draft, let one of the models check the draft, and confirm when it is due."""
        start, passes_s = self._now(), self._log.seconds
        plan, self._plan = self._plan or self._make_plan(), None
        self.stats.draft_s += plan.seconds
        self._log.left_out = plan.left_out
        if self._checking:
            self._check_by_either(self._checking, plan)
        else:
            self._verify_timed(plan)
            due = self.confirms and self.window_policy.is_due(len(self.window), self._survival)
            if due or self._must_confirm():
                self._confirm_timed()
        settle(self.cache, self.committed - 1)
        step_s, self._earlier_s = self._now() - start + self._earlier_s, 0.0
        self.stats.decode_s += step_s
        if self._checking:
            self._checking.checker.spent(step_s - (self._log.seconds - passes_s))

    def _make_plan(self) -> Plan:
        """Draft, and decide who checks the draft."""
        self.answering.before_pass()
        start, checking = self._now(), self._checking
        if checking is None:
            draft, seconds = self._draft(), self._now() - start
            return Plan(draft, False, self._grow(draft), seconds)
        offered, left = self._propose(checking.limit), self.max_tokens - len(self.tokens)
        check, draft = checking.choose(offered, len(self.window), self._survival, left)
        seconds = self._now() - start
        tree = self._grow_behind(draft) if check.by_target else self._grow(draft)
        waiting = len(self.tokens) - self.seen if check.by_target else 0
        left_out = pieces_behind(offered.pieces, len(tree.draft.tokens) - waiting)
        return Plan(draft, check.by_target, tree, seconds, left_out)

    def _check_by_either(self, checking: Checking, plan: Plan) -> None:
        """The model that is worth more checks the draft; the target may then have to confirm."""
        if plan.by_target:
            self._confirm_timed(plan)
            return
        self._verify_timed(plan)
        checking.verified()
        self._let_through(checking)
        if self._must_confirm() or (len(self._passed) >= MOST_UNSEEN and not self._ends):
            self._confirm_timed()

    def _let_through(self, checking: Checking) -> None:
        """In `gated`, commit the window's first tokens, as far as the verifier is sure of them."""
        count = checking.let_through(self._estimates)
        if count:
            self._log.let_through(count)
            self._passed += self._estimates[:count]
            self._estimates = self._estimates[count:]
            self.committed += count
            self._survival = prod(estimate.p for estimate in self._estimates)

    def _verify_timed(self, plan: Plan) -> None:
        start, earlier = self._now(), self._earlier_s
        self._verify(plan)
        self.stats.verify_s += self._now() - start + self._earlier_s - earlier

    def _confirm_timed(self, plan: Plan | None = None) -> None:
        start, earlier = self._now(), self._earlier_s
        self._confirm(plan)
        self.stats.confirm_s += self._now() - start + self._earlier_s - earlier

    def _pass_s(self, start: float) -> float:
        """Seconds of a pass that was asked for at `start`, and may have begun earlier."""
        self._earlier_s += self._passes.earlier_s
        return self._now() - start + self._passes.earlier_s

    def _draft(self) -> Draft:
        return self.draft_length.cut(self._propose(self.draft_length.limit))

    def _propose(self, limit: int) -> Draft:
        room = self.max_tokens - len(self.tokens) - 1  # the bonus token needs a place
        limit = min(limit, room)
        draft = self.drafter.propose(limit) if limit > 0 else NO_DRAFT
        return draft.first(self.answering.allowed(self.tokens, draft.tokens))

    def _verify(self, plan: Plan) -> None:
        """One pass over the last token and the draft; accepted tokens and the bonus join the text."""
        if plan.tree.branches:
            self._verify_tree(plan.tree, plan.seconds)
        else:
            self._verify_chain(plan.draft, plan.seconds)

    def _verify_chain(self, draft: Draft, drafting_s: float) -> None:
        start = self._now()
        tokens = [self.tokens[-1], *draft.tokens]
        choices = self._passes.verify(self.tokens, draft.tokens)
        pass_s = self._pass_s(start)
        self._show(tokens, choices.likeliest, len(self.tokens) - 1)
        accepted, bonus = accept(choices, draft.tokens)
        new = self._cut_at_eos([*draft.tokens[:accepted], bonus])
        accepted = min(accepted, len(new))
        margins = choices.margins[: len(new)]
        self._log.step(draft, accepted, margins, drafting_s, pass_s)
        if self.confirms:
            self._drafts.append((len(self.tokens), draft))
            self._remember(margins, accepted, accepted < len(draft.tokens))
        self.draft_length.learn(draft, accepted, drafting_s, pass_s)
        self._extend(new)
        if not self.confirms:
            self._passes.score(new)
            self.committed = len(self.tokens)

    def _grow(self, draft: Draft) -> Tree:
        """The tree of a draft and of the branches beside it that are worth a row of the pass."""
        reach = self.max_tokens - len(self.tokens) - 1  # the bonus token needs a place
        if self._branching is None or reach <= 0:
            return Tree(self.tokens[-1], draft)
        room = self.cache.capacity - self.cache.length
        return self._branching.grow(self.tokens[-1], draft, self.drafter, reach, room)

    def _verify_tree(self, tree: Tree, drafting_s: float) -> None:
        """Verify a tree as a draft alone; the cache keeps the path that the pass's own tokens lead through."""
        assert self._branching is not None
        before, start = self.cache.length, self._now()
        choices = self._passes.verify_tree(self.tokens, tree.tokens, tree.parents)
        pass_s = self._pass_s(start)
        self._show_tree(tree, choices.likeliest, len(self.tokens) - 1)
        path = tree.follow(choices.tokens)
        cast(TreeCache, self.cache).keep(before, [0, *path])
        new = self._cut_at_eos([*(tree.tokens[node] for node in path), choices.tokens[path[-1] if path else 0]])
        accepted, rows = path[: len(new)], [0, *path][: len(new)]
        margins = [choices.margins[row] for row in rows]
        self._log.step(tree.as_draft(accepted), len(accepted), margins, drafting_s, pass_s)
        if self.confirms:
            self._drafts.append((len(self.tokens), tree.draft))
            self._remember(margins, len(accepted), tree.refuses_behind(accepted))
        self._branching.learn(tree, accepted, drafting_s, pass_s)
        self._extend(new)
        if not self.confirms:
            self.committed = len(self.tokens)

    @property
    def _ends(self) -> bool:
        """Whether the text ends here, if all of it stays."""
        return self.tokens[-1] in self.eos_ids or len(self.tokens) >= self.max_tokens

    def _must_confirm(self) -> bool:
        """Whether the text ends here, if the target agrees."""
        return self.confirms and self._ends and bool(self.window)

    def _confirm(self, plan: Plan | None = None) -> None:
        """One target pass over what was let through, the window, and a draft behind it.

        What it accepts of the window is committed with its bonus token, the rest taken back. What was let through
        stays, with keys and values that are the target's now.
        """
        if plan is None:
            self.answering.before_pass()
            plan = Plan(NO_DRAFT, True, self._grow_behind(NO_DRAFT), 0.0)
        window, unseen, start = self.window, len(self._passed), self._now()
        tree, drafting_s = plan.tree, plan.seconds
        self.cache.rollback(self.seen - 1)
        path, bonus, margins = self._accept_tree(tree) if tree.branches else self._accept_window(plan.draft.tokens)
        path, margins = path[unseen:], margins[unseen:]
        pass_s = self._pass_s(start)
        kept, before = min(len(path), len(window)), self.committed
        self.drafter.forget(len(window) - kept)
        self.tokens = self.tokens[: self.committed + kept]
        ended = bool(window) and kept > 0 and self.tokens[-1] in self.eos_ids
        new = self._cut_at_eos([*(tree.tokens[node] for node in path[kept:]), bonus])
        self._extend([] if ended or len(self.tokens) >= self.max_tokens else new)
        self.committed = len(self.tokens)
        self._passes.score(self.tokens[before:])
        waited = unseen + len(window)
        behind = tree.behind(waited)
        accepted = [node - waited for node in path[kept:]]
        recorded = behind.as_draft(accepted[: len(new)])
        self._log.confirm(window, kept, recorded, min(len(accepted), len(new)), margins, drafting_s, pass_s)
        whole = behind if kept == len(window) else Tree(behind.last, NO_DRAFT)
        self._learn_from_confirm(len(tree.tokens), whole, accepted, drafting_s, pass_s)
        if self._checking:
            self._checking.confirmed(self._estimates, kept, self.committed - before)
        self._survival, self._estimates, self._passed, self._drafts = 1.0, [], [], []

    def _learn_from_confirm(
        self, passed: int, tried: Tree, path: Sequence[int], drafting_s: float, pass_s: float
    ) -> None:
        """Learn what the pass cost, and which drafts the target accepts, also of those that the verifier checked."""
        if self._observe:
            self._observe(passed, pass_s)
        if self._checking:
            self._checking.learn_drafts(self._drafts, self.tokens)
            self._checking.learn_tree(tried, path, drafting_s)

    def _grow_behind(self, draft: Draft) -> Tree:
        """What the target has not passed yet and the draft, and what is worth a row of its pass beside the draft."""
        waiting, last = self.tokens[self.seen :], self.tokens[self.seen - 1]
        branching, reach = self._branching_at_target, self.max_tokens - len(self.tokens) - 1
        if branching is None or reach <= 0:
            return Tree(last, Draft.of(waiting, WINDOW, 0).then(draft))
        room = self.cache.capacity - self.seen + 1
        survivals = [*(1.0 for _ in self._passed), *(estimate.p for estimate in self._estimates)]
        return branching.grow(last, draft, self.drafter, reach, room, waiting, survivals)

    def _hold(self, choices: Choices) -> Choices:
        """Keep what was let through, whatever the target chose there; learn how often the two agree."""
        if not self._passed:
            return choices
        assert self._checking is not None
        held, own = self.tokens[self.seen : self.committed], choices.tokens
        self._checking.learn_passed(self._passed, [one == other for one, other in zip(held, own, strict=False)])
        return replace(choices, tokens=[*held, *own[len(held) :]], accepted=None)

    def _accept_tree(self, tree: Tree) -> tuple[list[int], int, Sequence[float]]:
        """Pass a tree through the target; the cache keeps the path that its choices lead through.

        Returns the path behind the first node, the bonus token, and the target's margins along it.
        """
        start = self.cache.length
        choices = self._passes.confirm_tree(self.tokens[: self.seen], tree.tokens, tree.parents)
        self._show_tree(tree, choices.likeliest, start)
        choices = self._hold(choices)
        path = tree.follow(choices.tokens)
        cast(TreeCache, self.cache).keep(start, [0, *path])
        margins = [choices.margins[node] for node in [0, *path]]
        return path, choices.tokens[path[-1] if path else 0], margins

    def _show_tree(self, tree: Tree, likeliest: Sequence[list[int]], start: int) -> None:
        for nodes in tree.paths() if likeliest else ():
            self._show([tree.tokens[node] for node in nodes], [likeliest[node] for node in nodes], start)

    def _accept_window(self, draft: Sequence[int]) -> tuple[list[int], int, Sequence[float]]:
        """Pass what was let through, window and draft through the target.

        Returns the places of what is accepted, from 1 on, the bonus token, and the target's margins of all of it.
        """
        tokens, prefix = [*self.tokens[self.seen - 1 :], *draft], self.tokens[: self.seen]
        offered = tokens[1:]
        choices = self._passes.confirm(prefix, offered)
        self._show(tokens, choices.likeliest, len(prefix) - 1)
        accepted, bonus = accept(self._hold(choices), offered)
        return list(range(1, accepted + 1)), bonus, choices.margins

    def _show(self, tokens: Sequence[int], likeliest: list[list[int]], start: int) -> None:
        """Let the drafter see what a pass over the tokens computed, the first of which stands at `start`."""
        if self.drafter.wants_best:
            self.drafter.see(tokens, likeliest, start)

    def _remember(self, margins: list[float], accepted: int, refused: bool) -> None:
        """Keep what decides when to confirm the new tokens: how sure the verifier was of each."""
        if self._checking:
            estimates = self._checking.agreement.estimates(margins, accepted, refused)
            self._estimates += estimates
            self._survival *= prod(estimate.p for estimate in estimates)
        else:
            self._survival *= prod(self.window_policy.survival(margin) for margin in margins)

    def _cut_at_eos(self, tokens: list[int]) -> list[int]:
        for i, token in enumerate(tokens):
            if token in self.eos_ids:
                return tokens[: i + 1]
        return tokens

    def _extend(self, new: list[int]) -> None:
        """Append tokens, and move the cache to just before the last one."""
        if NO_TOKEN in new:
            raise QuasarError(f"{NOT_NUMBERS}: try --dtype bfloat16 or float32.")
        self.tokens += new
        self.drafter.observe(new)
        self.cache.rollback(len(self.tokens) - 1)
