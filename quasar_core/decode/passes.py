"""Run the passes of one answer, and choose the token of each of their rows.

Letters: T rows of a pass, V vocabulary.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch

from quasar_core.config import GenerationConfig, VerifyMode
from quasar_core.decode.answering import Answering
from quasar_core.decode.logits.processors import Processors
from quasar_core.decode.logits.sampling import Noise, accept_matching, keep_likely
from quasar_core.errors import QuasarError
from quasar_core.kernels.threads import one_thread
from quasar_core.models.base import (
    BeginningPass,
    Begun,
    CausalLM,
    Choices,
    KVCache,
    best_tokens,
    bring_over,
    depths_of,
    likeliest_tokens,
)
from quasar_core.models.decoder.cache import DecoderCache
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.pair import Pair


@dataclass
class Ahead:
    """A pass that a device runs, and what it is a pass of."""

    model: CausalLM
    tokens: list[int]
    parents: Sequence[int] | None
    begun: Begun
    host_s: float  # that the host took to begin it


class Passes:
    """Passes of one answer over one cache; each row is that of a token of the text, or of a draft behind it.

    Where nothing changes logits and the best token is taken, models choose by themselves, and logits stay where they
    are. When sampling, the best is taken after noise that the seed fixes for each position (`sampling.py`).
    `wants_best` is how many of the likeliest tokens of each row are listed, before any logits processor.
    """

    def __init__(
        self,
        pair: Pair,
        verifying: CausalLM,
        cache: KVCache,
        config: GenerationConfig,
        answering: Answering,
        wants_best: int,
    ) -> None:
        self._target, self._verifying, self._cache = pair.primary, verifying, cache
        self._sampling, self._answering, self._wants_best = config.sampling, answering, wants_best
        self._processors = Processors(pair.processors, config)
        self._noise = None
        if not config.sampling.greedy:
            self._noise = Noise(config.sampling.seed, pair.primary.vocab_size, pair.primary.device)
        self.changes = bool(self._processors or answering.rules)  # whether rules change logits by the text before them
        self._reads_logits = self._noise is not None or self.changes or answering.scores is not None
        self._ahead: Ahead | None = None
        self.earlier_s = 0.0  # of the last pass, before it was asked for: the host's share of it, or the device's
        self._logits: torch.Tensor | None = None  # of the last pass, as the model gave them, where they are scored

    def begin(self, prompt: Sequence[int], max_tokens: int, eos_ids: frozenset[int]) -> None:
        """An answer to a prompt begins, of at most so many tokens, the prompt's included."""
        self._processors.begin(prompt, max_tokens, eos_ids, self._target.device)

    def read(self, prompt: Sequence[int], cached: int, chunk: int) -> Choices:
        """The target's passes over a prompt beyond its `cached` tokens, `chunk` at a time → the token behind it."""
        logits = self._target.pass_prompt(prompt[cached:], self._cache, chunk, self._answering.before_pass)
        return self._choose(logits, prompt, [])

    @property
    def start_early(self) -> bool:
        """Whether a device may run a pass while the host goes on, and nothing of the logits is needed on the host."""
        return not self._reads_logits and device_pass(self._verifying, self._cache) is not None

    def start(self, model: CausalLM, tokens: Sequence[int], parents: Sequence[int] | None = None) -> None:
        """Let a pass over tokens, or a tree, begin where a device runs it; what asks for the same pass next gets it."""
        start = time.perf_counter()
        begun = begin_pass(model, tokens, self._cache, self._wants_best, parents)
        host_s = time.perf_counter() - start
        self._ahead = None if begun is None else Ahead(model, list(tokens), parents, begun, host_s)

    def verify_by(self, model: CausalLM) -> None:
        """Let another model over the same cache be the verifying one; a pass that began ahead counts no more."""
        self._verifying, self._ahead = model, None

    def verify(self, text: Sequence[int], draft: Sequence[int]) -> Choices:
        """One pass of the verifying model over the text's last token and a draft."""
        return self._pass(self._verifying, text, draft)

    def confirm(self, text: Sequence[int], offered: Sequence[int]) -> Choices:
        """One target pass over a text's last token and what is offered behind it."""
        return self._pass(self._target, text, offered)

    def verify_tree(self, text: Sequence[int], tokens: Sequence[int], parents: Sequence[int]) -> Choices:
        """One pass of the verifying model over a tree whose first token is the text's last; nothing changes logits."""
        return self._pass_tree(self._verifying, text, tokens, parents)

    def confirm_tree(self, text: Sequence[int], tokens: Sequence[int], parents: Sequence[int]) -> Choices:
        """One target pass over a tree, as `verify_tree`."""
        return self._pass_tree(self._target, text, tokens, parents)

    def _pass(self, model: CausalLM, text: Sequence[int], offered: Sequence[int]) -> Choices:
        tokens = [text[-1], *offered]
        if not self._reads_logits:
            return self._fetch(model, tokens, None) or model.choose(tokens, self._cache, self._wants_best)
        return self._choose(model.forward(tokens, self._cache), text, offered)

    def _pass_tree(
        self, model: CausalLM, text: Sequence[int], tokens: Sequence[int], parents: Sequence[int]
    ) -> Choices:
        if not self._reads_logits:
            begun = self._fetch(model, tokens, parents)
            return begun or model.choose_tree(tokens, parents, self._cache, self._wants_best)
        logits = model.forward_tree(tokens, parents, self._cache)
        return self._best(logits, [len(text) + depth for depth in depths_of(parents)], self._likeliest(logits))

    def _fetch(self, model: CausalLM, tokens: Sequence[int], parents: Sequence[int] | None) -> Choices | None:
        """The choices of the pass that began ahead; None where none did, or another one."""
        ahead, self._ahead, self.earlier_s = self._ahead, None, 0.0
        if ahead is None or (ahead.model, ahead.tokens, ahead.parents) != (model, list(tokens), parents):
            return None
        start = time.perf_counter()
        choices = ahead.begun.fetch()
        waited = time.perf_counter() - start
        self.earlier_s = max(ahead.host_s, ahead.begun.seconds - waited)
        return choices

    def _choose(self, logits: torch.Tensor, text: Sequence[int], offered: Sequence[int]) -> Choices:
        """The token of each row of logits [T, V], the first of which stands behind the text."""
        likeliest = self._likeliest(logits)
        positions = range(len(text), len(text) + len(logits))
        return self._best(self._change(logits, text, offered), positions, likeliest)

    def _best(self, logits: torch.Tensor, positions: Sequence[int], likeliest: list[list[int]]) -> Choices:
        """The best of each row and its margin, when sampling after the noise of the positions that the tokens get.

        This is where the host waits for the device, once in a pass.
        """
        if self._noise is not None:
            with one_thread():  # small work, and threads that it woke would keep cores from the next pass's
                kept = keep_likely(logits, self._sampling)
            logits = self._noise.add(kept, positions, self._sampling.temperature)
        return bring_over(*best_tokens(logits), likeliest)

    def score(self, new: Sequence[int]) -> None:
        """Keep the scores of committed tokens by the pass that decided them."""
        if self._answering.scores is not None:
            assert self._logits is not None
            self._answering.scores.add(self._logits, new)

    def _likeliest(self, logits: torch.Tensor) -> list[list[int]]:
        return likeliest_tokens(logits, self._wants_best) if self._wants_best else []

    def _change(self, logits: torch.Tensor, prefix: Sequence[int], continuation: Sequence[int]) -> torch.Tensor:
        """Logits [T, V] after the model's processors and the answer's own rules."""
        self._logits = logits if self._answering.scores is not None else None
        return self._answering.apply(self._processors(logits, prefix, continuation), prefix, continuation)


def device_pass(model: CausalLM, cache: KVCache) -> BeginningPass | None:
    """What runs a model's passes on a device while the host goes on; None elsewhere."""
    fast = model.fast if isinstance(model, LeanDecoder) and isinstance(cache, DecoderCache) else None
    return fast if fast is not None and _begins(fast) else None


def _begins(fast: object) -> TypeGuard[BeginningPass]:
    kind = type(fast)
    if kind not in _BEGIN:  # once for each, as all of the protocol's methods are looked up
        _BEGIN[kind] = isinstance(fast, BeginningPass)
    return _BEGIN[kind]


_BEGIN: dict[type, bool] = {}


def begin_pass(
    model: CausalLM, tokens: Sequence[int], cache: KVCache, likeliest: int, parents: Sequence[int] | None
) -> Begun | None:
    """Begin a pass there; None, and nothing has happened, where it does not run whole."""
    fast = device_pass(model, cache)
    if fast is None or len(tokens) > (fast.longest if parents is None else fast.longest_tree):
        return None
    return fast.begin(tokens, cache, likeliest, parents=parents)


def verifying_model(pair: Pair, mode: VerifyMode) -> CausalLM:
    """The model that checks drafts: in `full` the target itself."""
    if mode == "full":
        return pair.primary
    if pair.verifier is None:
        raise QuasarError(f"--verify {mode} needs a verifier; make one with `quasar quantize`.")
    return pair.verifier


def accept(choices: Choices, offered: Sequence[int]) -> tuple[int, int]:
    """How many offered tokens the choices confirm, and the token after them; the device may have counted."""
    if choices.accepted is None:
        return accept_matching(choices.tokens, offered)
    return choices.accepted, choices.tokens[choices.accepted]
