"""Answers that follow a grammar: tokens that it forbids get no probability, in verify and confirm passes alike.

The grammar's state follows the text, and goes back where a confirm takes tokens back. A draft is cut where the grammar
forbids it, so that speculation goes on. llguidance (the extra `serve`) compiles schemas and computes the masks.
Letters: T rows of a pass, V vocabulary.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from quasar_core.errors import QuasarError, UsageError, foreign_errors, reason
from quasar_core.models.pair import Pair

# JSON as Python's json.dumps writes it: white space of any length would let a small model write nothing else.
STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
ANY_OBJECT: dict[str, Any] = {"type": "object"}
# What one grammar may take, in llguidance's units. Of its own limits these two let a hostile regular expression hold
# the engine for seconds, and hundreds of megabytes. A mask takes a tenth of a second at most, and states 100 MB.
INITIAL_FUEL, MOST_STATES = 200_000, 50_000


class Grammars:
    """Compiles grammars for the vocabulary of one pair."""

    def __init__(self, pair: Pair) -> None:
        import llguidance
        import llguidance.hf

        self._library = llguidance
        self._limits = llguidance.LLParserLimits(initial_lexer_fuel=INITIAL_FUEL, max_lexer_states=MOST_STATES)
        self.vocabulary, self.eos_ids = pair.primary.vocab_size, pair.eos_ids
        tokenizer: Any = pair.tokenizer
        self._texts: dict[tuple[str, ...], list[bytes]] = {}
        self._added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
        with foreign_errors("A grammar cannot be served, as llguidance cannot read this model's tokenizer", UsageError):
            self._tokenizer = llguidance.hf.from_tokenizer(
                tokenizer, n_vocab=self.vocabulary, eos_token=sorted(pair.eos_ids) or None
            )

    def of_schema(self, schema: Mapping[str, Any]) -> str:
        """The grammar of JSON that fits a schema; UsageError, in one sentence, where there is none."""
        try:
            grammar = self._library.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=STYLE)
        except ValueError as error:
            raise UsageError(f"the JSON schema cannot be served: {reason(error)}") from error
        return self._checked(grammar, "the JSON schema", may_be_empty=False)

    def of_regex(self, expression: str) -> str:
        """The grammar of a text that a regular expression, in Rust's syntax, fits as a whole."""
        return self._checked(self._library.LLMatcher.grammar_from_regex(expression), "the regular expression")

    def of_choice(self, texts: Sequence[str]) -> str:
        """The grammar of an answer that is one of some texts."""
        return self.of_lark(f"start: {' | '.join(json.dumps(text, ensure_ascii=False) for text in texts)}\n")

    def of_lark(self, text: str) -> str:
        """The grammar of a text in llguidance's form of Lark."""
        return self._checked(self._library.LLMatcher.grammar_from_lark(text), "the grammar")

    def _checked(self, grammar: str, named: str, may_be_empty: bool = True) -> str:
        """The grammar, if it yields a first token within its limits; UsageError, in one sentence, where not."""
        failed, messages = self._library.LLMatcher.validate_grammar_with_warnings(
            grammar, self._tokenizer, limits=self._limits
        )
        if failed:
            raise UsageError(f"{named} cannot be served: {reason(ValueError(messages[0]))}")
        first = self.rule(grammar, 0).mask()
        if not may_be_empty:
            first[list(self.eos_ids)] = False
        if not first.any():
            raise UsageError(f"{named} cannot be served: nothing fits it")
        return grammar

    def rule(self, grammar: str, begin: int, behind: int | None = None) -> "GrammarRule":
        """The rule of one answer whose first token stands at `begin`; with `behind`, from the token after that one."""
        matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        return GrammarRule(matcher, self, begin, behind)

    def tokens_of(self, text: bytes) -> tuple[int, ...]:
        """Tokens of a text, marks of the vocabulary's own among them."""
        return tuple(self._tokenizer.tokenize_bytes(text, parse_special=True))

    def token_texts(self, shown: Sequence[str]) -> list[bytes]:
        """What each token adds to a text: special tokens nothing, but for those that are shown."""
        if tuple(shown) not in self._texts:
            self._texts[tuple(shown)] = self._make_texts(shown)
        return self._texts[tuple(shown)]

    def _make_texts(self, shown: Sequence[str]) -> list[bytes]:
        texts = [self._tokenizer.decode_bytes([token]) for token in range(self.vocabulary)]
        for number, added in self._added.items():
            if number < len(texts):
                hidden = added.special and added.content not in shown
                texts[number] = b"" if hidden else added.content.encode("utf-8")
        return texts


# How llguidance begins to say that a token does not fit, and that no token does.
_FORBIDDEN, _DEAD_END = "Parser Error: token", "NoExtension"


class GrammarRule:
    """Implements `answering.TokenRule`."""

    def __init__(self, matcher: Any, grammars: Grammars, begin: int, behind: int | None) -> None:
        self._matcher, self._behind = matcher, behind
        self.vocabulary, self.eos_ids, self.begin = grammars.vocabulary, grammars.eos_ids, begin
        self._read: list[int] = []  # tokens that the matcher has consumed

    def allowed(self, text: Sequence[int], draft: Sequence[int]) -> int:
        """How many tokens of a draft the grammar allows."""
        answer = list(text[self.begin :])
        if self._behind is None:
            self.follow(answer)
            return int(self._matcher.validate_tokens(list(draft)))
        return next(
            (i for i, token in enumerate(draft) if not self._allows(answer + list(draft[:i]), token)), len(draft)
        )

    def _allows(self, answer: list[int], token: int) -> bool:
        constrained = self._constrained(answer)
        return constrained is None or self.allows(constrained, token)

    def allows(self, governed: list[int], token: int) -> bool:
        """Whether a token may follow those that the grammar governs."""
        self.follow(governed)
        return bool(self._matcher.validate_tokens([token]))

    def begins_with(self, tokens: Sequence[int]) -> bool:
        """Whether a text of the grammar may begin so."""
        self.follow([])
        return bool(self._matcher.validate_tokens(list(tokens)) == len(tokens))

    def is_whole(self) -> bool:
        """Whether what was followed is a whole text of the grammar."""
        return bool(self._matcher.is_accepting())

    def __call__(self, logits: torch.Tensor, prefix: Sequence[int], continuation: Sequence[int]) -> torch.Tensor:
        """Logits [T, V] with −∞ for what the grammar forbids; rows behind a forbidden or last token stay."""
        answer = list(prefix[self.begin :])
        logits = logits.clone()
        for row in range(len(logits)):
            if row > 0:
                token = continuation[row - 1]
                if token in self.eos_ids or not self._allows(answer, token):
                    break
                answer.append(token)
            constrained = self._constrained(answer)
            if constrained is not None:
                self.follow(constrained)
                logits[row].masked_fill_(~self.mask().to(logits.device), -torch.inf)
        return logits

    def _constrained(self, answer: list[int]) -> list[int] | None:
        """The part of an answer that the grammar governs; None before it begins."""
        if self._behind is None:
            return answer
        return answer[answer.index(self._behind) + 1 :] if self._behind in answer else None

    def follow(self, answer: list[int]) -> None:
        """Bring the matcher to the state behind the answer."""
        common = 0
        for old, new in zip(self._read, answer, strict=False):
            if old != new:
                break
            common += 1
        if common < len(self._read):
            self._matcher.rollback(len(self._read) - common)
        if answer[common:]:
            self._matcher.consume_tokens(answer[common:])
        self._read = list(answer)
        self._require_sound()

    def _require_sound(self) -> None:
        """UsageError where the grammar leads nowhere or takes too much, QuasarError where it was followed wrongly."""
        if not self._matcher.is_error():
            return
        why = reason(ValueError(self._matcher.get_error().partition("<state>")[0]))
        if why.startswith(_FORBIDDEN):
            raise QuasarError(f"The grammar could not be followed: {why}.")
        trouble = f"it is too complex ({why}); bounds of repetition within one another are the usual cause"
        trouble = "nothing fits it" if why.startswith(_DEAD_END) else trouble
        raise UsageError(f"The shape of the answer cannot be served: {trouble}.")

    def mask(self) -> torch.Tensor:
        """Whether each token may come next [V]."""
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._require_sound()
        bits = np.unpackbits(packed, bitorder="little")[: self.vocabulary].astype(bool)
        return torch.from_numpy(np.pad(bits, (0, self.vocabulary - len(bits))))
