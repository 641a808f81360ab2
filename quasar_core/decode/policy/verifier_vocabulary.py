"""Choose which tokens the verifier's head knows in `exact`: all, or, at temperature 0, the frequent and the text's.

What is frequent is told by the text that the model was quantized on, where the verifier's folder has its successors;
behind those tokens come the lowest ids, which vocabularies made by merging pairs give to frequent tokens.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch

from quasar_core.config import GenerationConfig
from quasar_core.decode.answering import Answering
from quasar_core.draft.successor_file import read_successors
from quasar_core.draft.successors import KnownSuccessors
from quasar_core.models.base import CausalLM
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.pair import Pair
from quasar_core.models.verifier.short_head import also_knowing, short_headed, why_not_short

LEAST_ROWS, SHARE = 1 << 15, 4  # rows of a short head: so many, and one in so many of the vocabulary's
MOST_MET = 4096  # tokens beside the frequent ones that are kept from earlier texts
# An answer whose tokens the head does not know so often, of so many of them, is verified with the whole head.
MOST_MISSED, OF_LAST = 6, 64


class VerifierVocabulary:
    """The verifier of one generator: in `exact` with a short head, where that saves enough of a pass."""

    def __init__(self, pair: Pair, config: GenerationConfig, note: Callable[[str], None]) -> None:
        self._whole, self.usual, self._note = pair, pair, note
        self._frequent = frozenset[int]()
        self._met: dict[int, None] = {}  # tokens of texts that are not frequent, the latest last
        self._missed = deque[bool](maxlen=OF_LAST)
        resident = (
            pair.target is not None and not pair.target.streamed
        )  # else memory is short, and verifies take little
        if config.verify == "exact" and config.sampling.greedy and resident and not pair.processors:
            self._shorten()

    def _shorten(self) -> None:
        pair, verifier = self._whole, self._whole.verifier
        if not isinstance(verifier, LeanDecoder):
            return
        vocabulary = verifier.vocab_size
        rows = max(LEAST_ROWS, vocabulary // SHARE)
        if why_not_short(verifier, rows):
            return
        if pair.short is None:
            tokens = frequent_tokens(vocabulary, rows, _successors(pair, vocabulary))
            others = {role: record for role, record in pair.measured.items() if role != "verifier"}
            pair.short = replace(pair, verifier=short_headed(verifier, tokens), measured=others)
        assert isinstance(pair.short.verifier, LeanDecoder)
        assert pair.short.verifier.head_tokens is not None
        self.usual = pair.short
        self._frequent = frozenset(pair.short.verifier.head_tokens.tolist())
        self._note(
            f"verifier: its head knows {rows:,} of {vocabulary:,} tokens, and those of the text; the target, which "
            "confirms, knows all"
        )

    def pair_for(self, pair: Pair, prompt: Sequence[int], answering: Answering, greedy: bool = True) -> Pair:
        """The pair that answers a prompt: `pair` with a head that knows the prompt's tokens too.

        Rules, such as a grammar, may allow none of the tokens that a short head knows, and sampling draws rare ones:
        they get the whole head.
        """
        if self.usual is self._whole:
            return pair
        self._missed.clear()
        if answering.rules or not greedy:
            return self._whole
        self._meet(prompt)
        if not self._met:
            return pair
        short, verifier = pair.verifier, self._whole.verifier
        assert isinstance(short, LeanDecoder)
        assert isinstance(verifier, LeanDecoder)
        return replace(pair, verifier=also_knowing(short, verifier, torch.tensor(sorted(self._met))))

    def is_whole(self, model: CausalLM) -> bool:
        """Whether a model verifies with the whole head where a short one is usual."""
        return self.usual is not self._whole and model is self._whole.verifier

    def enough(self, token: int) -> CausalLM | None:
        """Take note of an answer's token; the whole verifier, where too many of the last ones were not known."""
        if self.usual is self._whole:
            return None
        known = token in self._frequent or token in self._met
        self._missed.append(not known)
        if known or sum(self._missed) < MOST_MISSED:
            return None
        self._missed.clear()
        self._note("verifier: its whole head took over, as the short one did not know many of an answer's tokens")
        return self._whole.verifier

    def _meet(self, text: Iterable[int]) -> None:
        for token in text:
            if token not in self._frequent:
                self._met.pop(token, None)
                self._met[token] = None
        for token in list(self._met)[: max(len(self._met) - MOST_MET, 0)]:
            del self._met[token]


def frequent_tokens(vocabulary: int, rows: int, known: KnownSuccessors | None) -> torch.Tensor:
    """So many tokens of a vocabulary, rising [rows] int32: those likeliest in the successors, then the lowest ids."""
    odds = np.zeros(vocabulary)
    if known is not None:
        there = known.tokens >= 0
        np.add.at(odds, known.tokens[there], known.odds[there].astype(float))
    chosen = np.argsort(-odds, kind="stable")[:rows]
    return torch.from_numpy(np.sort(chosen)).int()


def _successors(pair: Pair, vocabulary: int) -> KnownSuccessors | None:
    return None if pair.successors_folder is None else read_successors(pair.successors_folder, vocabulary)
