"""Run the passes of one answer, and choose the token of each of their rows: the best, or one drawn.

Letters: T rows of a pass, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch

from quasar_core.config import GenerationConfig, VerifyMode
from quasar_core.decode.answering import Answering
from quasar_core.decode.processors import Processors
from quasar_core.decode.sampling import distribution, draw
from quasar_core.errors import QuasarError
from quasar_core.models.base import CausalLM, Choices, best_tokens, bring_over, choose_best, likeliest_tokens
from quasar_core.models.pair import Pair


class Passes:
    """Passes of one answer over one cache; each row is that of a token of the text, or of a draft behind it.

    Where nothing changes logits and the best token is taken, models choose by themselves, and logits stay where they
    are. `wants_best` is how many of the likeliest tokens of each row are listed, before any logits processor.
    """

    def __init__(
        self,
        pair: Pair,
        verifying: CausalLM,
        cache: Any,
        config: GenerationConfig,
        answering: Answering,
        generator: torch.Generator,
        wants_best: int,
    ) -> None:
        self._target, self._verifying, self._cache = pair.primary, verifying, cache
        self._sampling, self._answering, self._generator = config.sampling, answering, generator
        self._processors = Processors(pair.processors, config)
        self._wants_best, self._wants_margins = wants_best, config.confirms
        self.changes = bool(self._processors or answering.rules)  # whether rules change logits by the text before them
        self._reads_logits = not config.sampling.greedy or self.changes or answering.scores is not None
        self._logits: torch.Tensor | None = None  # of the last pass, as the model gave them, where they are scored

    def begin(self, prompt: Sequence[int], max_tokens: int, eos_ids: frozenset[int]) -> None:
        """An answer to a prompt begins, of at most so many tokens, the prompt's included."""
        self._processors.begin(prompt, max_tokens, eos_ids, self._target.device)

    def read(self, prompt: Sequence[int], chunk: int) -> torch.Tensor:
        """The target's passes over a prompt, so many tokens at a time → the logits [1, V] of its last token."""
        return self._target.pass_prompt(prompt, self._cache, chunk, self._answering.before_pass)

    def verify(self, text: Sequence[int], draft: Sequence[int]) -> tuple[Choices, torch.Tensor | None]:
        """One pass of the verifying model over the text's last token and a draft; see `choose`."""
        tokens = [text[-1], *draft]
        if not self._reads_logits:
            return self._verifying.choose(tokens, self._cache, self._wants_best), None
        return self.choose(self._verifying.forward(tokens, self._cache), text, draft)

    def verify_tree(self, tokens: Sequence[int], parents: Sequence[int]) -> tuple[Choices, torch.Tensor | None]:
        """The same over a tree; no rule changes logits here, so rows need no text."""
        if not self._reads_logits:
            return self._verifying.choose_tree(tokens, parents, self._cache, self._wants_best), None
        return self.choose(self._verifying.forward_tree(tokens, parents, self._cache), (), ())

    def confirm(self, prefix: Sequence[int], offered: Sequence[int]) -> tuple[Choices, torch.Tensor | None]:
        """One target pass over a prefix's last token and what is offered behind it.

        Returns greedy choices; when sampling, the likeliest tokens alone and the distributions [T, V].
        """
        tokens = [prefix[-1], *offered]
        if not self._reads_logits:
            return self._target.choose(tokens, self._cache, self._wants_best), None
        logits = self._target.forward(tokens, self._cache)
        likeliest = self._likeliest(logits)
        logits = self._change(logits, prefix, offered)
        if self._sampling.greedy:
            choices = choose_best(logits)
            return Choices(choices.tokens, choices.margins, likeliest=likeliest), None
        return Choices([], [], likeliest=likeliest), distribution(logits, self._sampling)

    def confirm_tree(self, tokens: Sequence[int], parents: Sequence[int]) -> Choices:
        """One target pass over a tree; when sampling, the choices are drawn, and no window may be part of it."""
        if not self._reads_logits:
            return self._target.choose_tree(tokens, parents, self._cache, self._wants_best)
        return self.choose(self._target.forward_tree(tokens, parents, self._cache), (), ())[0]

    def choose(
        self, logits: torch.Tensor, text: Sequence[int], draft: Sequence[int]
    ) -> tuple[Choices, torch.Tensor | None]:
        """The token of each row, and when sampling the distributions [T, V] that it was drawn from.

        This is where the host waits for the device, once in a pass.
        """
        margins = best_tokens(logits)[1] if self._wants_margins else None
        likeliest = self._likeliest(logits)
        logits = self._change(logits, text, draft)
        if self._sampling.greedy:
            return bring_over(best_tokens(logits)[0], margins, likeliest), None
        probabilities = distribution(logits, self._sampling)
        return bring_over(draw(probabilities, self._generator), margins, likeliest), probabilities

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


def verifying_model(pair: Pair, mode: VerifyMode) -> CausalLM:
    """The model that checks drafts: in `full` the target itself."""
    if mode == "full":
        return pair.primary
    if pair.verifier is None:
        raise QuasarError(f"--verify {mode} needs a verifier; make one with `quasar quantize`.")
    return pair.verifier
