"""`POST /v1/chat/completions`: messages in, the assistant's message out, whole or in chunks."""

import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from quasar_core.decode.answering import TokenRule
from quasar_core.decode.logits.scores import TokenScore
from quasar_core.decode.logits.triggered_grammar import TriggeredRule
from quasar_core.serve.asks import MOST_TOP, Ask, Common, content_text, read_common
from quasar_core.serve.errors import ApiError, refused
from quasar_core.serve.fields import Fields
from quasar_core.serve.job import Event, Finished, Job, Written, by_answer, read_events
from quasar_core.serve.parts import AnswerParts, Part, join_parts
from quasar_core.serve.replies import REASONS, Head, Tally, chat_logprobs
from quasar_core.serve.served import THINK, Served
from quasar_core.serve.structure import Structure, read_structure, require_free_end
from quasar_core.serve.tooling import Tooling, read_tooling, shown_in
from quasar_core.serve.tools import ToolForm

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
PROMPT_END = 8  # tokens of a prompt in which thinking may be opened


@dataclass(frozen=True)
class ChatAsk:
    """A checked request: its answers, and how their texts are split."""

    asks: list[Ask]
    common: Common
    top: int  # tokens beside each in logprobs
    logprobs: bool
    form: ToolForm | None
    tools: list[dict[str, Any]]
    thinks: bool
    inside: bool  # whether the prompt ends within thinking
    most_calls: int | None  # of tools, in one answer

    def parts(self) -> AnswerParts:
        """The splitter of one answer."""
        return AnswerParts(self.thinks, self.inside, self.form, self.tools, self.most_calls)


def read_chat(body: Mapping[str, Any], served: Served) -> ChatAsk:
    """Check a body, and encode its messages; ApiError names the field that cannot be."""
    fields = Fields(body)
    common = read_common(fields, served, served.settings.defaults.max_new_tokens)
    messages = read_messages(fields.take("messages"))
    logprobs, top = fields.flag("logprobs"), fields.whole("top_logprobs", 0, MOST_TOP)
    if top and not logprobs:
        raise refused("top_logprobs goes with logprobs true.", "top_logprobs")
    tools = read_tooling(fields, served)
    most_calls = None if fields.flag("parallel_tool_calls", True) else 1
    trace = fields.flag("trace")
    variables, structure = _variables(fields), read_structure(fields, common, served)
    fields.end()
    if structure is not None and tools.offered:
        raise refused(f"{structure.field} and tools cannot both shape an answer.", structure.field)
    if structure is not None and "enable_thinking" in served.variables:
        variables = {"enable_thinking": False, **variables}
    if tools.offered:
        variables = {**variables, "tools": tools.offered}
    if messages[-1]["role"] == "assistant" and "add_generation_prompt" not in variables:
        raise refused("The last of messages must not be the assistant's: an answer is what is asked for.", "messages")
    for message in messages:
        if message["role"] != "assistant":  # whose texts templates may shorten
            served.check_length(message["content"], "messages")
    ids = served.encode_messages(messages, variables)
    served.check_prompt(ids, "messages")
    inside = served.thinks and served.decode(ids[-PROMPT_END:]).rstrip().endswith(THINK)
    rules = _rules(served, common, tools, structure, inside, bool(variables.get("enable_thinking")))
    ask = Ask(
        ids, common.request, common.verify, common.draft, partial(rules, ids), common.ends,
        replace(common.reading, shown=shown_in(served, tools.form)), (top or 0) if logprobs else None, trace=trace,
    )  # fmt: skip
    asks = [replace(ask, request=common.request_of(number)) for number in range(common.count)]
    return ChatAsk(asks, common, top or 0, logprobs, tools.form, tools.offered, served.thinks, inside, most_calls)


def _variables(fields: Fields) -> dict[str, Any]:
    """What the template is given beside messages and tools, which have fields of their own."""
    given = fields.mapping("chat_template_kwargs")
    for name in ("tools", "messages"):
        if name in given:
            raise refused(f"chat_template_kwargs: {name} is a field of its own.", "chat_template_kwargs")
    if not isinstance(given.get("add_generation_prompt", True), bool):
        raise refused("chat_template_kwargs: add_generation_prompt must be true or false.", "chat_template_kwargs")
    return given


def read_messages(value: Any) -> list[dict[str, Any]]:
    """The messages as templates read them: contents as texts, arguments of calls as objects."""
    if not isinstance(value, list) or not value:
        raise refused("messages must be a list of at least one message.", "messages")
    return [_message(message, f"messages[{number}]") for number, message in enumerate(value)]


def _message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise refused(f"{where} must be an object.", "messages")
    fields = Fields(value)
    role = fields.take("role")
    if not isinstance(role, str) or role not in ROLES:
        raise refused(f"{where}: role must be one of {', '.join(ROLES)}.", "messages")
    calls = _calls(fields.take("tool_calls", []), where)
    content = fields.take("content", "" if calls else None)
    if content is None:
        raise refused(f"{where} has no content.", "messages")
    message: dict[str, Any] = {"role": ROLES[role], "content": content_text(content, where)}
    for name in ("name", "tool_call_id", "reasoning_content"):
        text = fields.take(name)
        if isinstance(text, str):
            message[name] = text
        elif text is not None:
            raise refused(f"{where}: {name} must be a text.", "messages")
    for name in ("refusal", "annotations", "audio"):
        if fields.take(name):
            raise refused(f"{where}: {name} is not served.", "messages", "unsupported_field")
    try:
        fields.end()
    except ApiError as error:
        raise refused(f"{where}: {error.message}", "messages", error.code) from error
    return {**message, "tool_calls": calls} if calls else message


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise refused(f"{where}: tool_calls must be a list.", "messages")
    return [_call(call, where) for call in value]


def _call(value: Any, where: str) -> dict[str, Any]:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise refused(f"{where}: each of tool_calls must have a function with a name.", "messages")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise refused(f"{where}: the arguments of a call must be JSON.", "messages") from None
    return {"id": value.get("id"), "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _rules(
    served: Served, common: Common, tools: Tooling, structure: Structure | None, inside: bool, asked: bool
) -> Callable[[Sequence[int]], list[TokenRule]]:
    """What makes the rules of an answer to a prompt, whose thinking is open (`inside`) or `asked` for."""
    if structure is not None:
        grammar = structure.grammar(served)
    elif tools.held:
        require_free_end(common, "tools", served)
        grammar = tools.grammar(served)
    else:
        return common.rules
    behind = served.end_of_thinking if inside or asked else None

    trigger = tools.trigger(served, inside, common.reading.special) if tools.strict else None

    def rules(ids: Sequence[int]) -> list[TokenRule]:
        if trigger is None:
            return [*common.rules(ids), served.grammars.rule(grammar, len(ids), behind)]
        return [*common.rules(ids), TriggeredRule(served.grammars, grammar, trigger, len(ids))]

    return rules


@dataclass
class Choice:
    """One answer of a reply as it grows."""

    parts: AnswerParts
    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)  # not told yet
    reason: str | None = None
    traced: list[dict[str, Any]] = field(default_factory=list)  # texts, and who wrote each

    def take(self, event: Event, tally: Tally) -> list[Part]:
        """The finished parts of an event."""
        if isinstance(event, Written):
            self.scores += event.scores
            if event.maker is not None:
                self.traced.append({"text": event.text, "by": event.maker})
            parts = self.parts.add(event.text)
            tally.reasoning_tokens += len(event.tokens) if parts and parts[-1].kind == "reasoning" else 0
            return parts
        if not isinstance(event, Finished) or event.result is None:
            return []
        ended = event.result.finish_reason == "eos"
        self.scores += event.scores[:-1] if ended else event.scores
        parts = self.parts.finish()
        tally.results.append(event.result)
        self.reason = "tool_calls" if self.parts.calls else REASONS[event.result.finish_reason]
        return parts

    def delta(self, part: Part) -> dict[str, Any]:
        """What a chunk says of a part; what it adds is kept."""
        if part.kind == "reasoning":
            self.reasoning.append(part.text)
            return {"reasoning_content": part.text}
        if part.call is None:
            self.content.append(part.text)
            return {"content": part.text}
        self.calls.append(part.call.as_json())
        return {"tool_calls": [{"index": len(self.calls) - 1, **self.calls[-1]}]}

    def message(self) -> dict[str, Any]:
        """The whole message."""
        content = "".join(self.content)
        message: dict[str, Any] = {"role": "assistant", "content": content if content or not self.calls else None}
        if self.reasoning:
            message["reasoning_content"] = "".join(self.reasoning)
        return {**message, "tool_calls": self.calls} if self.calls else message


async def whole_chat(chat: ChatAsk, job: Job, served: Served) -> dict[str, Any]:
    """The reply to a request that does not stream."""
    choices, tally = [Choice(chat.parts()) for _ in chat.asks], Tally()
    async for told in read_events(job, stream=False):
        for number, event in told:
            for part in choices[number].take(event, tally):
                choices[number].delta(part)
    listed: list[dict[str, Any]] = [
        {
            "index": number,
            "message": choice.message(),
            "logprobs": chat_logprobs(choice.scores, served, chat.top) if chat.logprobs else None,
            "finish_reason": choice.reason,
        }
        for number, choice in enumerate(choices)
    ]
    head = Head("chatcmpl", "chat.completion", served.name)
    measures = tally.measures(chat.asks[-1], served)
    if chat.asks[0].trace:
        for number, choice in enumerate(choices):
            listed[number]["tokens"] = choice.traced
    return head.document(choices=listed, usage=tally.usage(chat.asks), **measures)


async def stream_chat(chat: ChatAsk, job: Job, served: Served) -> AsyncIterator[dict[str, Any] | None]:
    """The chunks of a reply: the role first, the reason of the end last; None where nothing came for a while."""
    head, tally = Head("chatcmpl", "chat.completion.chunk", served.name), Tally()
    choices = [Choice(chat.parts()) for _ in chat.asks]
    usage = {"usage": None} if chat.common.include_usage else {}

    def chunk(number: int, delta: dict[str, Any], scores: Sequence[TokenScore] = (), **rest: Any) -> dict[str, Any]:
        logprobs = chat_logprobs(scores, served, chat.top) if scores else None
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        return head.document(choices=[{**choice, **rest}], **usage)

    for number in range(len(choices)):
        yield chunk(number, {"role": "assistant", "content": ""})
    async for told in read_events(job, stream=True):
        if not told:
            yield None
        for number, events in by_answer(told):
            choice = choices[number]
            for part in join_parts(part for event in events for part in choice.take(event, tally)):
                traced = {"quasar": {"tokens": choice.traced}} if choice.traced else {}
                yield {**chunk(number, choice.delta(part), choice.scores), **traced}
                choice.scores, choice.traced = [], []
            if choice.reason is not None:
                last = chunk(number, {}, choice.scores, finish_reason=choice.reason)
                yield {**last, **tally.measures(chat.asks[number], served)}
    if chat.common.include_usage:
        yield head.document(choices=[], usage=tally.usage(chat.asks))
