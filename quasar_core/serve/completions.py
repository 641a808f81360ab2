"""`POST /v1/completions`: prompts as texts or token ids in, what follows them out, with log-probabilities."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from quasar_core.decode.answering import TokenRule
from quasar_core.serve.asks import Ask, Common, content_text, read_common
from quasar_core.serve.errors import refused
from quasar_core.serve.fields import Fields
from quasar_core.serve.job import Begun, Event, Finished, Job, Written, by_answer, read_events
from quasar_core.serve.replies import REASONS, Head, OldLogprobs, Tally, join_logprobs
from quasar_core.serve.served import Served
from quasar_core.serve.structure import read_structure

USUAL_TOKENS = 16  # as OpenAI's endpoint has it
MOST_LOGPROBS = 20
MOST_PROMPTS = 256


@dataclass(frozen=True)
class TextAsk:
    """A checked request: its answers, of which `common.count` belong to each prompt."""

    asks: list[Ask]
    common: Common
    echo: bool
    top: int | None
    echoed: list[str]  # the text of each answer's prompt


def read_completion(body: Mapping[str, Any], served: Served) -> TextAsk:
    """Check a body; ApiError names the field that cannot be."""
    fields = Fields(body)
    common = read_common(fields, served, USUAL_TOKENS, least_tokens=0)
    echo, top = fields.flag("echo"), fields.whole("logprobs", 0, MOST_LOGPROBS)
    prompts = _prompts(fields.take("prompt"), served)
    structure = read_structure(fields, common, served)
    fields.end()
    grammar = None if structure is None else structure.grammar(served)
    if common.request.max_new_tokens == 0 and not echo:
        raise refused("max_tokens 0 goes with echo: nothing would be answered.", "max_tokens")
    asks, echoed = [], []
    for ids, text in prompts:
        served.check_prompt(ids, "prompt")
        ask = Ask(
            ids, common.request, common.verify, common.draft, partial(_rules, common, served, grammar, ids),
            common.ends, common.reading, top, score_prompt=echo and top is not None,
        )  # fmt: skip
        asks += [replace(ask, request=common.request_of(number)) for number in range(common.count)]
        echoed += [text] * common.count
    return TextAsk(asks, common, echo, top, echoed)


def _rules(common: Common, served: Served, grammar: str | None, ids: Sequence[int]) -> list[TokenRule]:
    """The rules of an answer behind a prompt."""
    held = [] if grammar is None else [served.grammars.rule(grammar, len(ids))]
    return [*common.rules(ids), *held]


def _prompts(value: Any, served: Served) -> list[tuple[list[int], str]]:
    """Token ids and text of each prompt: a text, token ids, or a list of either."""
    if isinstance(value, list) and value and all(_is_id(item) for item in value):
        value = [value]
    listed = value if isinstance(value, list) else [value]
    if not listed or len(listed) > MOST_PROMPTS:
        raise refused(f"prompt must be a text, token ids, or a list of 1 to {MOST_PROMPTS} of either.", "prompt")
    return [_prompt(item, served) for item in listed]


def _prompt(item: Any, served: Served) -> tuple[list[int], str]:
    if isinstance(item, str):
        text = content_text(item, "prompt")
        served.check_length(text, "prompt")
        return served.encode(text, special=True), text
    if isinstance(item, list) and item and all(_is_id(token) for token in item):
        served.check_prompt(item, "prompt")
        return list(item), served.decode(item)
    raise refused("prompt must be a text, token ids, or a list of either.", "prompt")


def _is_id(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


class TextChoice:
    """One answer of a reply as it grows."""

    def __init__(self, ask: TextAsk, number: int, served: Served) -> None:
        self._ask, self._number = ask, number
        self._logprobs = None if ask.top is None else OldLogprobs(served, ask.top)
        self.reason: str | None = None

    def take_all(self, events: Sequence[Event], tally: Tally) -> tuple[str, dict[str, Any] | None]:
        """The text of some events, and its log-probabilities where they are asked for."""
        texts, logprobs = [], None
        for event in events:
            text, found = self._take(event, tally)
            texts.append(text)
            logprobs = logprobs if found is None else join_logprobs(logprobs, found)
        return "".join(texts), logprobs

    def _take(self, event: Event, tally: Tally) -> tuple[str, dict[str, Any] | None]:
        if isinstance(event, Begun):
            return self._echo(event) if self._ask.echo else ("", None)
        if isinstance(event, Written):
            return event.text, self._logprobs.of(event.scores) if self._logprobs else None
        assert isinstance(event, Finished)
        if event.result is None:
            self.reason = "length"
            return "", None
        tally.results.append(event.result)
        self.reason = REASONS[event.result.finish_reason]
        return "", self._logprobs.of(event.scores) if self._logprobs and event.scores else None

    def _echo(self, event: Begun) -> tuple[str, dict[str, Any] | None]:
        text = self._ask.echoed[self._number]
        if self._logprobs is None:
            return text, None
        first = self._logprobs.first(self._ask.asks[self._number].prompt_ids[0])
        return text, join_logprobs(first, self._logprobs.of(event.prompt_scores))


async def whole_completion(ask: TextAsk, job: Job, served: Served) -> dict[str, Any]:
    """The reply to a request that does not stream."""
    tally = Tally()
    choices = [TextChoice(ask, number, served) for number in range(len(ask.asks))]
    texts: list[str] = ["" for _ in choices]
    logprobs: list[dict[str, Any] | None] = [None for _ in choices]
    async for told in read_events(job, stream=False):
        for number, events in by_answer(told):
            text, found = choices[number].take_all(events, tally)
            texts[number] += text
            logprobs[number] = logprobs[number] if found is None else join_logprobs(logprobs[number], found)
    listed = [
        {"index": number, "text": texts[number], "logprobs": logprobs[number], "finish_reason": choice.reason}
        for number, choice in enumerate(choices)
    ]
    head = Head("cmpl", "text_completion", served.name)
    return head.document(choices=listed, usage=tally.usage(ask.asks), **tally.measures(ask.asks[-1], served))


async def stream_completion(ask: TextAsk, job: Job, served: Served) -> AsyncIterator[dict[str, Any] | None]:
    """The chunks of a reply; None where nothing came for a while."""
    head, tally = Head("cmpl", "text_completion", served.name), Tally()
    choices = [TextChoice(ask, number, served) for number in range(len(ask.asks))]
    usage: dict[str, Any] = {"usage": None} if ask.common.include_usage else {}
    async for told in read_events(job, stream=True):
        if not told:
            yield None
        for number, events in by_answer(told):
            text, logprobs = choices[number].take_all(events, tally)
            reason = choices[number].reason
            if text or logprobs or reason is not None:
                choice = {"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason}
                measures = tally.measures(ask.asks[number], served) if reason is not None else {}
                yield head.document(choices=[choice], **usage, **measures)
    if ask.common.include_usage:
        yield head.document(choices=[], usage=tally.usage(ask.asks))
