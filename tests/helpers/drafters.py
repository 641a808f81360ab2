"""Drafters that know too much, or the wrong things: whatever they propose, the text must stay the same."""

import random
from collections.abc import Callable, Sequence

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from quasar_core.config import GenerationConfig
from quasar_core.draft.automaton import SuffixAutomaton
from quasar_core.draft.base import Draft, Drafter
from quasar_core.draft.make import Sources, make_drafter
from quasar_core.draft.memory import remember
from quasar_core.draft.texts import TextIndex

SOURCES = ("suffix", "prediction", "texts", "memory", "auto")


def edited(text: Sequence[int], seed: int, vocabulary: int) -> list[int]:
    """A text in which about every seventh token is another, left out, or doubled."""
    dice, result = random.Random(seed), list[int]()
    for token in text:
        kind = dice.randrange(21)
        if kind == 0:
            continue
        result += [(token + dice.randrange(1, vocabulary)) % vocabulary] if kind == 1 else [token]
        result += [token] if kind == 2 else []
    return result


def source_factory(kind: str, answer: Sequence[int], seed: int, vocabulary: int) -> Callable[[], Drafter]:
    """A drafter with one source, or with `auto` all of them; each knows an edited version of the answer."""
    known = [edited(answer, seed + i, vocabulary) for i in range(3)]
    sources, expected = Sources(), list[int]()
    if kind in ("prediction", "auto"):
        expected = known[0]
    if kind in ("texts", "auto"):
        sources.texts = TextIndex.build([known[1], known[0]])
    if kind in ("memory", "auto"):
        sources.memory = SuffixAutomaton()
        remember(sources.memory, known[2])
    config = GenerationConfig(draft="auto" if kind == "auto" else "suffix")
    return lambda: make_drafter(config, sources, expected)


class Forking(Drafter):
    """Another drafter, beside whose tokens others are likely: random ones, and in half of the places the right one."""

    def __init__(self, inner: Drafter, text: Sequence[int], seed: int, vocabulary: int) -> None:
        self.inner, self.text, self.vocabulary = inner, text, vocabulary
        self.dice, self.wants_best, self.position = random.Random(seed), inner.wants_best, 0

    def observe(self, tokens: Sequence[int]) -> None:
        self.inner.observe(tokens)
        self.position += len(tokens)

    def forget(self, count: int) -> None:
        self.inner.forget(count)
        self.position -= count

    def propose(self, limit: int, after: Sequence[int] = ()) -> Draft:
        return self.inner.propose(limit, after)

    def see(self, tokens: Sequence[int], best: Sequence[Sequence[int]], start: int) -> None:
        self.inner.see(tokens, best, start)

    def alternatives(self, draft: Sequence[int]) -> list[list[int]]:
        return [self._likely(self.position + place) for place in range(len(draft) + 1)]

    def _likely(self, place: int) -> list[int]:
        likely = self.dice.sample(range(self.vocabulary), 3)
        if place < len(self.text) and self.text[place] not in likely and self.dice.random() < 0.5:
            likely[self.dice.randrange(3)] = self.text[place]
        return likely


def spaced_words(count: int) -> PreTrainedTokenizerFast:
    """Token i is the word `wi`, between spaces."""
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
