"""The self-speculative loop: draft, verify, confirm.

It knows models, a cache and token ids; nothing of text. In `full` the target verifies the drafts itself; in
`quantized` the verifier does, and its word is final; in `exact` verified tokens wait in the window until the target
has confirmed them. Letters: k draft tokens, W window tokens, V vocabulary.
"""

import time
from collections.abc import Callable, Sequence

import torch

from quasar_core.config import GenerationConfig, VerifyMode
from quasar_core.decode.policy import DraftLength, WindowPolicy
from quasar_core.decode.processors import Processors
from quasar_core.decode.sampling import accept_matching, confirm_sampled, distribution, draw
from quasar_core.draft.base import NO_DRAFT, Draft, Drafter
from quasar_core.errors import QuasarError
from quasar_core.models.base import (
    NO_TOKEN,
    NOT_NUMBERS,
    CausalLM,
    Choices,
    KVCache,
    best_tokens,
    bring_over,
    choose_best,
)
from quasar_core.models.memory import PROMPT_CHUNK
from quasar_core.models.pair import Pair
from quasar_core.records import Confirm, Stats, Step

# Tokens of a prompt's pass: enough to be bound by arithmetic, few enough that their activations are small.
PREFILL_CHUNK = {"cpu": 512, "cuda": PROMPT_CHUNK}


# Told the tokens and seconds of a confirm pass; when to confirm from now on.
Replan = Callable[[int, float], WindowPolicy]


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
        replan: Replan | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.pair, self.cache, self.config = pair, cache, config
        self.drafter, self.draft_length, self.window_policy = drafter, draft_length, window
        self.generator = generator
        self.max_tokens = max_tokens  # prompt included
        self._replan, self._now = replan, now
        self.confirms = config.verify == "exact"
        self.verifying = _verifying_model(pair, config.verify)
        self.processors = Processors(pair.processors, config)
        self._reads_logits = not config.sampling.greedy or bool(self.processors)  # beyond the best of each row
        # What is drawn depends on how drafts are cut: a seed would fix nothing if that followed the clock.
        self._learns_costs = config.sampling.greedy
        self.eos_ids = frozenset() if config.ignore_eos else pair.eos_ids
        self.stats = Stats()
        self.tokens: list[int] = []
        self.committed = 0
        self._survival = 1.0
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
        for begin in range(cached, len(prompt), chunk):
            logits = self.pair.primary.forward(prompt[begin : begin + chunk], self.cache, last_only=True)
        self.tokens = list(prompt)
        choices, _ = self._choose(logits, [])
        self.drafter.observe(self.tokens)
        self._extend(choices.tokens)
        self.drafter.propose(1)  # so that indexing the prompt is part of its own time
        self.committed = len(self.tokens)
        self.stats.prompt_tokens, self.stats.cached_tokens = len(prompt), cached
        self.stats.prefill_tokens = 1
        self.stats.prefill_s = self._now() - start

    def step(self) -> None:
        """Draft, verify, and confirm when it is due."""
        start = self._now()
        draft = self._draft()
        drafted = self._now()
        self._verify(draft, drafted - start)
        verified = self._now()
        self.stats.draft_s += drafted - start
        self.stats.verify_s += verified - drafted
        if self.confirms and self._confirm_is_due():
            self._confirm()
            self.stats.confirm_s += self._now() - verified
        self.stats.decode_s += self._now() - start

    def _draft(self) -> Draft:
        room = self.max_tokens - len(self.tokens) - 1  # the bonus token needs a place
        limit = min(self.draft_length.limit, room)
        return self.draft_length.cut(self.drafter.propose(limit)) if limit > 0 else NO_DRAFT

    def _verify(self, draft: Draft, drafting_s: float) -> None:
        """One pass over the last token and the draft; accepted tokens and the bonus join the text."""
        start = self._now()
        choices, q = self._pass([self.tokens[-1], *draft.tokens])
        pass_s = self._now() - start
        accepted, bonus = _accept(choices, draft.tokens)
        new = self._cut_at_eos([*draft.tokens[:accepted], bonus])
        accepted = min(accepted, len(new))
        if self.confirms:
            self._remember(choices.margins[: len(new)], None if q is None else q[: len(new)])
        self.stats.step_log.append(Step(len(draft.tokens), accepted, list(draft.pieces)))
        if self._learns_costs:
            self.draft_length.learn(draft, accepted, drafting_s, pass_s)
        else:
            self.draft_length.learn(draft, accepted)
        self._extend(new)
        if not self.confirms:
            self.committed = len(self.tokens)

    def _confirm_is_due(self) -> bool:
        return (
            self.window_policy.is_due(len(self.window), self._survival)
            or self.tokens[-1] in self.eos_ids
            or len(self.tokens) >= self.max_tokens
        )

    def _confirm(self) -> None:
        """One target pass over the window; what it accepts is committed with its bonus token, the rest taken back."""
        window, start = self.window, self._now()
        self.cache.rollback(self.committed - 1)
        accepted, bonus = self._accept_window(window)
        if self._replan and self._learns_costs:
            self.window_policy = self._replan(len(window) + 1, self._now() - start)
        self.stats.confirm_log.append(Confirm(len(window), accepted))
        self.drafter.forget(len(window) - accepted)
        self.tokens = self.tokens[: self.committed + accepted]
        ended = self.tokens[-1] in self.eos_ids and accepted > 0
        self._extend([] if ended or len(self.tokens) >= self.max_tokens else [bonus])
        self.committed = len(self.tokens)
        self._survival = 1.0
        self._window_q.clear()

    def _accept_window(self, window: Sequence[int]) -> tuple[int, int]:
        """Pass the window through the target → how many of its tokens are accepted, and the bonus token."""
        tokens, prefix = self.tokens[self.committed - 1 :], self.tokens[: self.committed]
        if not self._reads_logits:
            return _accept(self.pair.primary.choose(tokens, self.cache), window)
        logits = self.pair.primary.forward(tokens, self.cache)
        logits = self.processors(logits, prefix, window)
        if self.config.sampling.greedy:
            return _accept(choose_best(logits), window)
        p = distribution(logits, self.config.sampling)
        return confirm_sampled(p, torch.stack(self._window_q), window, self.generator)

    def _pass(self, tokens: Sequence[int]) -> tuple[Choices, torch.Tensor | None]:
        """A verify pass over the last token and a draft; see `_choose`."""
        if not self._reads_logits:
            return self.verifying.choose(tokens, self.cache), None
        return self._choose(self.verifying.forward(tokens, self.cache), tokens[1:])

    def _choose(self, logits: torch.Tensor, draft: Sequence[int]) -> tuple[Choices, torch.Tensor | None]:
        """The pass's own token at each row, and when sampling the distributions it was drawn from.

        This is where the host waits for the device, once in a pass.
        """
        margins = best_tokens(logits)[1] if self.window_policy.agreement else None
        logits = self.processors(logits, self.tokens, draft)
        if self.config.sampling.greedy:
            return bring_over(best_tokens(logits)[0], margins), None
        probabilities = distribution(logits, self.config.sampling)
        return bring_over(draw(probabilities, self.generator), margins), probabilities

    def _remember(self, margins: Sequence[float], q: torch.Tensor | None) -> None:
        """Keep what a later confirm needs of the new tokens: how sure the verifier was of each, and its q of each."""
        for margin in margins:
            self._survival *= self.window_policy.survival(margin)
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
