"""The self-speculative loop: draft, verify, confirm.

It knows models, a cache and token ids; nothing of text. In `full` the target verifies the drafts itself; in
`quantized` the verifier does, and its word is final; in `exact` verified tokens wait in the window until the target
has confirmed them, or the target checks a draft at once. Letters: k draft tokens, W window tokens, V vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from math import prod
from typing import cast

import torch

from quasar_core.config import GenerationConfig, VerifyMode
from quasar_core.decode.agreement import Estimate
from quasar_core.decode.answering import Answering
from quasar_core.decode.checking import Checking
from quasar_core.decode.policy import DraftLength, WindowPolicy
from quasar_core.decode.processors import Processors
from quasar_core.decode.sampling import accept_matching, confirm_block, distribution, draw
from quasar_core.decode.trees import Branching, Tree
from quasar_core.draft.base import NO_DRAFT, Draft, Drafter
from quasar_core.errors import QuasarError
from quasar_core.models.base import (
    NO_TOKEN,
    NOT_NUMBERS,
    CausalLM,
    Choices,
    KVCache,
    TreeCache,
    best_tokens,
    bring_over,
    choose_best,
    likeliest_tokens,
)
from quasar_core.models.memory import PROMPT_CHUNK
from quasar_core.models.pair import Pair
from quasar_core.models.rollback import settle
from quasar_core.records import Confirm, Stats, Step, as_recorded

# Tokens of a prompt's pass: enough to be bound by arithmetic, few enough that their activations are small.
PREFILL_CHUNK = {"cpu": 512, "cuda": PROMPT_CHUNK}


# Told the tokens and seconds of a confirm pass.
Observe = Callable[[int, float], None]


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
        generator: torch.Generator,
        max_tokens: int,
        checking: Checking | None = None,
        observe: Observe | None = None,
        now: Callable[[], float] = time.perf_counter,
        answering: Answering | None = None,
        branching: Branching | None = None,
    ) -> None:
        self.pair, self.cache, self.config = pair, cache, config
        self.drafter, self.draft_length, self.window_policy = drafter, draft_length, window
        self.generator = generator
        self.max_tokens = max_tokens  # prompt included
        self._checking, self._observe, self._now = checking, observe, now
        self.confirms = config.verify == "exact"
        self.verifying = _verifying_model(pair, config.verify)
        self.processors = Processors(pair.processors, config)
        self.answering = answering or Answering()
        changed = bool(self.processors or self.answering.rules)
        self._reads_logits = not config.sampling.greedy or changed or self.answering.scores is not None
        self._logits: torch.Tensor | None = None  # of the last pass, as the model gave them, where they are scored
        # With rules or scores each row would need the text of its own path.
        self._branching = None if changed or self.answering.scores is not None else branching

        # What is drawn depends on how drafts are cut: a seed would fix nothing if that followed the clock.
        self._learns_costs = config.sampling.greedy
        self.eos_ids = frozenset() if config.ignore_eos else pair.eos_ids
        self.stats = Stats()
        self.tokens: list[int] = []
        self.committed = 0
        self._survival = 1.0  # P(the target agrees with the whole window)
        self._estimates: list[Estimate] = []  # and with each of its tokens, where it is asked of either model
        self._drafts: list[tuple[int, Draft]] = []  # that the verifier checked since the last confirm, and their places
        self._window_q: list[torch.Tensor] = []  # the verifier's distribution [V] of each window token, when sampling

    @property
    def window(self) -> list[int]:
        """Tokens that wait for a confirm."""
        return self.tokens[self.committed :]

    def prefill(self, prompt: Sequence[int], cached: int = 0) -> None:
        """Run the prompt beyond the `cached` tokens through the target, in chunks; commit the token that follows.

        Where layers are recurrent it is one pass, as in transformers, which may begin their state anew in each.
        """
        start = self._now()
        self.processors.begin(prompt, self.max_tokens, self.eos_ids, self.pair.primary.device)
        chunk = PREFILL_CHUNK[self.pair.primary.device.type] if self.pair.rolls_back else len(prompt)
        logits = self.pair.primary.pass_prompt(prompt[cached:], self.cache, chunk, self.answering.before_pass)
        self.tokens = list(prompt)
        choices, _ = self._choose(logits, [])
        self.drafter.observe(self.tokens)
        self._show(prompt[-1:], choices.likeliest, len(prompt) - 1)
        self._extend(choices.tokens)
        self._score(choices.tokens)
        self.drafter.propose(1)  # so that indexing the prompt is part of its own time
        self.committed = len(self.tokens)
        self.stats.prompt_tokens, self.stats.cached_tokens = len(prompt), cached
        settle(self.cache, self.committed - 1)
        self.stats.prefill_tokens = 1
        self.stats.prefill_s = self._now() - start

    def step(self) -> None:
        """Draft, let one of the models check the draft, and confirm when it is due."""
        start = self._now()
        if self._checking:
            self._check_by_either(self._checking, start)
        else:
            draft = self._draft()
            self._verify_timed(draft, start)
            due = self.confirms and self.window_policy.is_due(len(self.window), self._survival)
            if due or self._must_confirm():
                self._confirm_timed()
        settle(self.cache, self.committed - 1)
        self.stats.decode_s += self._now() - start

    def _check_by_either(self, checking: Checking, start: float) -> None:
        """Offer a draft to both models; the one that is worth more checks it."""
        offered = self._propose(checking.limit)
        check, draft = checking.choose(offered, len(self.window), self._survival)
        if check.by_target:
            self.stats.draft_s += self._now() - start
            self._confirm_timed(draft, self._now() - start)
            return
        self._verify_timed(draft, start)
        checking.verified(self.stats.step_log[-1].drafted + 1)
        if self._must_confirm():
            self._confirm_timed()

    def _verify_timed(self, draft: Draft, start: float) -> None:
        drafted = self._now()
        self._verify(draft, drafted - start)
        self.stats.draft_s += drafted - start
        self.stats.verify_s += self._now() - drafted

    def _confirm_timed(self, draft: Draft = NO_DRAFT, drafting_s: float = 0.0) -> None:
        start = self._now()
        self._confirm(draft, drafting_s)
        self.stats.confirm_s += self._now() - start

    def _draft(self) -> Draft:
        return self.draft_length.cut(self._propose(self.draft_length.limit))

    def _propose(self, limit: int) -> Draft:
        room = self.max_tokens - len(self.tokens) - 1  # the bonus token needs a place
        limit = min(limit, room)
        draft = self.drafter.propose(limit) if limit > 0 else NO_DRAFT
        return draft.first(self.answering.allowed(self.tokens, draft.tokens))

    def _verify(self, draft: Draft, drafting_s: float) -> None:
        """One pass over the last token and the draft; accepted tokens and the bonus join the text."""
        self.answering.before_pass()
        tree = self._grow(draft)
        if tree.branches:
            self._verify_tree(tree, drafting_s)
        else:
            self._verify_chain(draft, drafting_s)

    def _verify_chain(self, draft: Draft, drafting_s: float) -> None:
        start = self._now()
        tokens = [self.tokens[-1], *draft.tokens]
        choices, q = self._pass(tokens)
        pass_s = self._now() - start
        self._show(tokens, choices.likeliest, len(self.tokens) - 1)
        accepted, bonus = _accept(choices, draft.tokens)
        new = self._cut_at_eos([*draft.tokens[:accepted], bonus])
        accepted = min(accepted, len(new))
        margins = choices.margins[: len(new)]
        self._log_step(draft, accepted, margins, drafting_s, pass_s)
        if self.confirms:
            self._drafts.append((len(self.tokens), draft))
            self._remember(margins, accepted, accepted < len(draft.tokens), None if q is None else q[: len(new)])
        if self._learns_costs:
            self.draft_length.learn(draft, accepted, drafting_s, pass_s)
        else:
            self.draft_length.learn(draft, accepted)
        self._extend(new)
        if not self.confirms:
            self._score(new)
            self.committed = len(self.tokens)

    def _log_step(
        self,
        draft: Draft,
        accepted: int,
        margins: list[float],
        drafting_s: float,
        pass_s: float,
        by_target: bool = False,
    ) -> None:
        """Margins and seconds are what a bench replays."""
        shown = as_recorded(margins)
        verifiers, targets = ([], shown) if by_target else (shown, [])
        by_target = by_target or self.verifying is self.pair.target
        self.stats.step_log.append(
            Step(len(draft.tokens), accepted, list(draft.pieces), by_target, verifiers, drafting_s, pass_s, targets)
        )

    def _grow(self, draft: Draft) -> Tree:
        """The draft, and what is worth a row of the pass beside it."""
        reach = self.max_tokens - len(self.tokens) - 1  # the bonus token needs a place
        if self._branching is None or reach <= 0:
            return Tree(self.tokens[-1], draft)
        room = self.cache.capacity - self.cache.length
        return self._branching.grow(self.tokens[-1], draft, self.drafter, reach, room)

    def _verify_tree(self, tree: Tree, drafting_s: float) -> None:
        """As of a draft alone; the cache keeps the path that the pass's own tokens lead through."""
        assert self._branching is not None
        before, start = self.cache.length, self._now()
        choices, q = self._pass_tree(tree)
        pass_s = self._now() - start
        for nodes in tree.paths():
            likeliest = [choices.likeliest[node] for node in nodes] if choices.likeliest else []
            self._show([tree.tokens[node] for node in nodes], likeliest, len(self.tokens) - 1)
        path = tree.follow(choices.tokens)
        cast(TreeCache, self.cache).keep(before, [0, *path])
        new = self._cut_at_eos([*(tree.tokens[node] for node in path), choices.tokens[path[-1] if path else 0]])
        accepted, rows = path[: len(new)], [0, *path][: len(new)]
        margins = [choices.margins[row] for row in rows] if choices.margins else []
        self._log_step(tree.as_draft(accepted), len(accepted), margins, drafting_s, pass_s)
        if self.confirms:
            self._drafts.append((len(self.tokens), tree.draft))
            self._remember(margins, len(accepted), tree.refuses_behind(accepted), None if q is None else q[rows])
        self._branching.learn(tree, accepted, drafting_s, pass_s if self._learns_costs else None)
        self._extend(new)
        if not self.confirms:
            self.committed = len(self.tokens)

    def _pass_tree(self, tree: Tree) -> tuple[Choices, torch.Tensor | None]:
        """A verify pass over a tree; see `_choose`. No logits processor is there, so rows need no text."""
        if not self._reads_logits:
            return self.verifying.choose_tree(tree.tokens, tree.parents, self.cache, self.drafter.wants_best), None
        return self._choose(self.verifying.forward_tree(tree.tokens, tree.parents, self.cache), [])

    def _must_confirm(self) -> bool:
        """Whether the text ends here, if the target agrees."""
        ends = self.tokens[-1] in self.eos_ids or len(self.tokens) >= self.max_tokens
        return self.confirms and ends and bool(self.window)

    def _confirm(self, draft: Draft = NO_DRAFT, drafting_s: float = 0.0) -> None:
        """One target pass over the window, and a draft behind it.

        What it accepts is committed with its bonus token, the rest taken back.
        """
        self.answering.before_pass()
        window, start = self.window, self._now()
        self.cache.rollback(self.committed - 1)
        accepted, bonus, margins = self._accept_window(window, draft.tokens)
        pass_s = self._now() - start
        kept, before = min(accepted, len(window)), self.committed
        self.drafter.forget(len(window) - kept)
        self.tokens = self.tokens[: self.committed + kept]
        ended = bool(window) and kept > 0 and self.tokens[-1] in self.eos_ids
        new = self._cut_at_eos([*draft.tokens[: accepted - kept], bonus])
        self._extend([] if ended or len(self.tokens) >= self.max_tokens else new)
        self.committed = len(self.tokens)
        self._score(self.tokens[before:])
        self._log_confirm(window, kept, draft, min(accepted - kept, len(new)), margins, drafting_s, pass_s)
        self._learn_from_confirm(len(window), kept, draft, accepted - kept, drafting_s, pass_s)
        if self._checking:
            passed = len(window) + 1 + len(draft.tokens)
            self._checking.confirmed(passed, self.committed - before, self._estimates, kept)
        self._survival, self._estimates, self._drafts = 1.0, [], []
        self._window_q.clear()

    def _log_confirm(
        self,
        window: Sequence[int],
        kept: int,
        draft: Draft,
        accepted: int,
        margins: Sequence[float],
        drafting_s: float,
        pass_s: float,
    ) -> None:
        """A confirm where there was a window, a step where there was a draft, or nothing but the newest token."""
        with_step = bool(draft.tokens) or not window
        own = kept if with_step and kept == len(window) else kept + 1  # margins that are not the step's
        if window:
            refused = window[kept] if kept < len(window) else None
            before, shown = len(self.stats.step_log), as_recorded(margins[:own])
            self.stats.confirm_log.append(Confirm(len(window), kept, len(draft.tokens), before, pass_s, shown, refused))
        if with_step:
            seconds, rest = 0.0 if window else pass_s, margins[own : len(window) + accepted + 1]
            self._log_step(draft, accepted, list(rest), drafting_s, seconds, by_target=True)

    def _learn_from_confirm(
        self, window: int, kept: int, draft: Draft, accepted: int, drafting_s: float, pass_s: float
    ) -> None:
        """What the pass cost; what the target accepts of drafts, those that the verifier checked before among them."""
        if self._observe and self._learns_costs:
            self._observe(window + 1 + len(draft.tokens), pass_s)
        if self._checking:
            tried = draft if kept == window else NO_DRAFT
            self._checking.learn_drafts(self._drafts, self.tokens)
            self._checking.target_length.learn(tried, accepted, drafting_s if self._learns_costs else 0.0)

    def _accept_window(self, window: Sequence[int], draft: Sequence[int]) -> tuple[int, int, Sequence[float]]:
        """Pass window and draft through the target → how many of their tokens are accepted, the bonus token, and the
        target's margins of all of them, which are known of greedy choices.
        """
        tokens, prefix = [*self.tokens[self.committed - 1 :], *draft], self.tokens[: self.committed]
        offered = tokens[1:]
        if not self._reads_logits:
            choices = self.pair.primary.choose(tokens, self.cache, self.drafter.wants_best)
            self._show(tokens, choices.likeliest, len(prefix) - 1)
            return *_accept(choices, offered), choices.margins
        logits = self.pair.primary.forward(tokens, self.cache)
        self._show(tokens, self._likeliest(logits), len(prefix) - 1)
        logits = self._change(logits, prefix, offered)
        if self.config.sampling.greedy:
            choices = choose_best(logits)
            return *_accept(choices, offered), choices.margins
        return *self._confirm_drawn(distribution(logits, self.config.sampling), window, draft), []

    def _confirm_drawn(self, p: torch.Tensor, window: Sequence[int], draft: Sequence[int]) -> tuple[int, int]:
        """Sampling: confirm the window by p [W + 1 + k, V]; where all of it is accepted, check the draft behind it."""
        if not window:
            return accept_matching(draw(p, self.generator).tolist(), draft)
        accepted, bonus = confirm_block(p[: len(window) + 1], torch.stack(self._window_q), window, self.generator)
        if accepted < len(window) or not draft:
            return accepted, bonus
        drawn = draw(p[len(window) + 1 :], self.generator).tolist()
        further, bonus = accept_matching([bonus, *drawn], draft)
        return accepted + further, bonus

    def _pass(self, tokens: Sequence[int]) -> tuple[Choices, torch.Tensor | None]:
        """A verify pass over the last token and a draft; see `_choose`."""
        if not self._reads_logits:
            return self.verifying.choose(tokens, self.cache, self.drafter.wants_best), None
        return self._choose(self.verifying.forward(tokens, self.cache), tokens[1:])

    def _choose(self, logits: torch.Tensor, draft: Sequence[int]) -> tuple[Choices, torch.Tensor | None]:
        """The pass's own token at each row, and when sampling the distributions it was drawn from.

        This is where the host waits for the device, once in a pass.
        """
        margins = best_tokens(logits)[1] if self.confirms else None
        likeliest = self._likeliest(logits)
        logits = self._change(logits, self.tokens, draft)
        if self.config.sampling.greedy:
            return bring_over(best_tokens(logits)[0], margins, likeliest), None
        probabilities = distribution(logits, self.config.sampling)
        return bring_over(draw(probabilities, self.generator), margins, likeliest), probabilities

    def _likeliest(self, logits: torch.Tensor) -> list[list[int]]:
        """What the drafter wants of each row of logits [T, V], before any logits processor."""
        return likeliest_tokens(logits, self.drafter.wants_best) if self.drafter.wants_best else []

    def _show(self, tokens: Sequence[int], likeliest: list[list[int]], start: int) -> None:
        """Let the drafter see what a pass over the tokens computed, the first of which stands at `start`."""
        if self.drafter.wants_best:
            self.drafter.see(tokens, likeliest, start)

    def _change(self, logits: torch.Tensor, prefix: Sequence[int], continuation: Sequence[int]) -> torch.Tensor:
        """Logits [T, V] after the model's processors and the answer's own rules."""
        self._logits = logits if self.answering.scores is not None else None
        return self.answering.apply(self.processors(logits, prefix, continuation), prefix, continuation)

    def _score(self, new: Sequence[int]) -> None:
        """Keep the scores of committed tokens by the pass that decided them."""
        if self.answering.scores is not None:
            assert self._logits is not None
            self.answering.scores.add(self._logits, new)

    def _remember(self, margins: list[float], accepted: int, refused: bool, q: torch.Tensor | None) -> None:
        """Keep what a later confirm needs of the new tokens: how sure the verifier was of each, and its q of each."""
        if self._checking:
            estimates = self._checking.agreement.estimates(margins, accepted, refused)
            self._estimates += estimates
            self._survival *= prod(estimate.p for estimate in estimates)
        else:
            self._survival *= prod(self.window_policy.survival(margin) for margin in margins)
        if q is not None:
            self._window_q.extend(q)

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


def _accept(choices: Choices, offered: Sequence[int]) -> tuple[int, int]:
    """How many offered tokens the choices confirm, and the token after them; the device may have counted."""
    if choices.accepted is None:
        return accept_matching(choices.tokens, offered)
    return choices.accepted, choices.tokens[choices.accepted]


def _verifying_model(pair: Pair, mode: VerifyMode) -> CausalLM:
    """The model that checks drafts: in `full` the target itself."""
    if mode == "full":
        return pair.primary
    if pair.verifier is None:
        raise QuasarError(f"--verify {mode} needs a verifier; make one with `quasar quantize`.")
    return pair.verifier
