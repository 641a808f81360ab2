"""Parts that replies of both endpoints share: names and times, usage, timings, log-probabilities."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from quasar_core.decode.logits.scores import TokenScore
from quasar_core.decode.text import BROKEN
from quasar_core.records import FinishReason, GenerationResult, Stats
from quasar_core.serve.asks import Ask
from quasar_core.serve.served import Served

REASONS: dict[FinishReason, str] = {"eos": "stop", "stop": "stop", "length": "length"}


@dataclass(frozen=True)
class Head:
    """What begins every chunk of a reply."""

    prefix: str
    kind: str
    model: str
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def document(self, **rest: Any) -> dict[str, Any]:
        """The reply with its fields."""
        names = {"id": f"{self.prefix}-{self.id}", "object": self.kind, "created": self.created, "model": self.model}
        return {**names, **rest}


@dataclass
class Tally:
    """What the answers of one request came to."""

    results: list[GenerationResult] = field(default_factory=list)
    reasoning_tokens: int = 0

    def usage(self, asks: Sequence[Ask]) -> dict[str, Any]:
        """OpenAI's usage; several answers to one prompt count it once."""
        prompts = {id(ask.prompt_ids): len(ask.prompt_ids) for ask in asks}
        prompt, new = sum(prompts.values()), sum(result.stats.new_tokens for result in self.results)
        details: dict[str, Any] = {"reasoning_tokens": self.reasoning_tokens}
        if any(ask.request.prediction for ask in asks):
            counts = [predicted(result.stats) for result in self.results]
            drafted, accepted = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
            details |= {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": drafted - accepted}
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": self.results[0].stats.cached_tokens if self.results else 0},
            "completion_tokens_details": details,
        }

    def measures(self, ask: Ask, served: Served) -> dict[str, Any]:
        """`timings` under llama.cpp's names, and what speculation did under our own; empty without an answer."""
        if not self.results:
            return {}
        result = self.results[-1]
        own = {
            "verify": ask.verify,
            "draft": ask.draft,
            "verified_by": result.verified_by,
            "lossless": ask.verify != "quantized",
            "acceptance_length": result.stats.acceptance_length,
            "confirm_rate": result.stats.confirm_rate,
        }
        if ask.verify == "quantized":
            own["agreement"] = served.pair.fidelity.agreement if served.pair.fidelity else None
        return {"timings": timings(result.stats), "quasar": own}


def predicted(stats: Stats) -> tuple[int, int]:
    """Draft tokens out of a prediction, and those of them that were accepted."""
    drafted = accepted = 0
    for step in stats.step_log:
        left = step.accepted
        for piece in step.pieces:
            if piece.source == "prediction":
                drafted, accepted = drafted + piece.length, accepted + min(piece.length, left)
            left = max(left - piece.length, 0)
    return drafted, accepted


def timings(stats: Stats) -> dict[str, Any]:
    """Counts and milliseconds of an answer."""
    passed, behind = stats.prompt_tokens - stats.cached_tokens, stats.new_tokens - stats.prefill_tokens
    return {
        "cache_n": stats.cached_tokens,
        "prompt_n": passed,
        "prompt_ms": 1000 * stats.prefill_s,
        "prompt_per_second": passed / stats.prefill_s if stats.prefill_s else None,
        "predicted_n": stats.new_tokens,
        "predicted_ms": 1000 * stats.decode_s,
        "predicted_per_second": behind / stats.decode_s if stats.decode_s else None,
        "draft_n": stats.drafted,
        "draft_n_accepted": stats.accepted,
    }


def chat_logprobs(scores: Sequence[TokenScore], served: Served, top: int) -> dict[str, Any]:
    """The log-probabilities of some tokens, as chat replies have them."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = served.decode([token])
        known = None if BROKEN in text else list(text.encode("utf-8"))
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": known}

    content = [
        {
            **entry(score.token, score.logprob),
            "top_logprobs": [entry(token, logprob) for token, logprob in score.best[:top]],
        }
        for score in scores
    ]
    return {"content": content, "refusal": None}


class OldLogprobs:
    """The log-probabilities of a completion: four lists, of the prompt's tokens too where it is echoed."""

    def __init__(self, served: Served, top: int) -> None:
        self._served, self._top, self._offset = served, top, 0

    def first(self, token: int) -> dict[str, Any]:
        """The lists of the first token of an echoed prompt, which nothing predicts."""
        return self._lists([(token, None, None)])

    def of(self, scores: Sequence[TokenScore]) -> dict[str, Any]:
        """The lists of tokens with scores."""
        return self._lists([(score.token, score.logprob, self._best(score)) for score in scores])

    def _best(self, score: TokenScore) -> dict[str, float] | None:
        """The best tokens, and the token itself; of tokens with the same text, the best."""
        if not self._top:
            return None
        best: dict[str, float] = {}
        for token, logprob in (*score.best[: self._top], (score.token, score.logprob)):
            best.setdefault(self._served.decode([token]), max(logprob, -9999.0))
        return best

    def _lists(self, rows: Sequence[tuple[int, float | None, dict[str, float] | None]]) -> dict[str, Any]:
        texts, offsets = [self._served.decode([token]) for token, _, _ in rows], []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [None if logprob is None else max(logprob, -9999.0) for _, logprob, _ in rows],
            "top_logprobs": [best for _, _, best in rows] if self._top else None,
            "text_offset": offsets,
        }


def join_logprobs(first: dict[str, Any] | None, second: dict[str, Any]) -> dict[str, Any]:
    """The lists of one part of a text behind those of another."""
    if first is None:
        return second
    return {name: None if values is None else [*first[name], *values] for name, values in second.items()}
