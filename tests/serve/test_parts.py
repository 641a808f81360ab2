"""What was thought, what is said, and tool calls, however the text is cut into pieces."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("starlette")

from helpers.serving import (
    FIXED,
    LINES,
    client,
    demo_pair,
    plain,
    scripted,
    serving,
)

from quasar_core.serve.parts import AnswerParts, Part
from quasar_core.serve.tools import BareCalls, ListedCalls, TaggedCalls, ToolCall, ToolForm, form_of

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "count",
            "parameters": {
                "type": "object",
                "properties": {"path": {"type": "string"}, "limit": {"type": "integer"}},
                "required": ["path"],
            },
        },
    }
]
ONE = '<tool_call>\n{"name": "count", "arguments": {"path": "a.txt"}}\n</tool_call>'
XML = (
    "<tool_call>\n<function=count>\n<parameter=path>\n12\n</parameter>\n"
    "<parameter=limit>\n3\n</parameter>\n</function>\n</tool_call>"
)
LLAMA = '{"name": "count", "parameters": {"path": "a.txt"}}'
MISTRAL = '[TOOL_CALLS][{"name": "count", "arguments": {"path": "a.txt"}}]'
NEWER = '[TOOL_CALLS]count[ARGS]{"path": "a.txt"}[TOOL_CALLS]count[ARGS]{"path": "b.txt"}'
CALLED = 'call:count{"path": "a.txt"}'
BROKEN = "<tool_call>\n{broken\n</tool_call>"
CASES: list[tuple[str, ToolForm | None, bool, list[str]]] = [
    ("Hello <b>you</b>\n", None, False, ["content:Hello <b>you</b>\n"]),
    ("<think>\nHm.\n</think>\n\nYes.", None, True, ["reasoning:Hm.", "content:Yes."]),
    ("No thoughts <think>", None, True, ["content:No thoughts <think>"]),
    ("<think>never ends", None, True, ["reasoning:never ends"]),
    (ONE, TaggedCalls(), False, ['call:count{"path": "a.txt"}']),
    (f"Let me see.\n\n{ONE}\n{ONE}\n", TaggedCalls(), False, ["content:Let me see.", *[CALLED] * 2]),
    (f"<think>a</think>{ONE}", TaggedCalls(), True, ["reasoning:a", 'call:count{"path": "a.txt"}']),
    (XML, TaggedCalls(), False, ['call:count{"path": "12", "limit": 3}']),
    (f"{BROKEN} and on", TaggedCalls(), False, [f"content:{BROKEN} and on"]),
    ("<tool_call>\n{broken", TaggedCalls(), False, ["content:<tool_call>\n{broken"]),
    ("a < b and <tool", TaggedCalls(), False, ["content:a < b and <tool"]),
    (LLAMA, BareCalls(), False, ['call:count{"path": "a.txt"}']),
    (f"{LLAMA}; {LLAMA}", BareCalls(), False, ['call:count{"path": "a.txt"}'] * 2),
    ('{"a": 1}', BareCalls(), False, ['content:{"a": 1}']),
    (f"It is {LLAMA}", BareCalls(), False, [f"content:It is {LLAMA}"]),
    (MISTRAL, ListedCalls(), False, ['call:count{"path": "a.txt"}']),
    (NEWER, ListedCalls(), False, ['call:count{"path": "a.txt"}', 'call:count{"path": "b.txt"}']),
]  # fmt: skip


def joined(parts: list[Part]) -> list[str]:
    """Parts as texts, those of one kind that follow one another as one."""
    found: list[str] = []
    for part in parts:
        text = f"{part.call.name}{part.call.arguments}" if part.call else part.text
        if found and part.kind != "call" and found[-1].startswith(f"{part.kind}:"):
            found[-1] += text
        else:
            found.append(f"{part.kind}:{text}")
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0][:24])
@given(cuts=st.lists(st.integers(0, 200), max_size=6))
def test_parts_do_not_depend_on_how_the_text_is_cut(case: Any, cuts: list[int]) -> None:
    text, form, thinks, wanted = case
    splitter = AnswerParts(thinks, form=form, tools=TOOLS)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[begin:end] for begin, end in pairwise(places)]
    parts = [part for piece in pieces for part in splitter.add(piece)]
    assert joined(parts + splitter.finish()) == wanted
    one_by_one = AnswerParts(thinks, form=form, tools=TOOLS)
    parts = [part for character in text for part in one_by_one.add(character)]
    assert joined(parts + one_by_one.finish()) == wanted


@pytest.mark.parametrize(
    ("text", "form"),
    [(f"Well.\n{ONE}\n{ONE}", TaggedCalls()), (f"{LLAMA}; {LLAMA}", BareCalls()), (NEWER, ListedCalls())],
)
def test_one_call_at_most_is_told_where_one_is_asked_for(text: str, form: ToolForm) -> None:
    whole = AnswerParts(False, form=form, tools=TOOLS, most_calls=1)
    one_by_one = AnswerParts(False, form=form, tools=TOOLS, most_calls=1)
    pieces = [part for character in text for part in one_by_one.add(character)]
    for parts in ([*whole.add(text), *whole.finish()], [*pieces, *one_by_one.finish()]):
        assert [part for part in joined(parts) if part != "content:Well."] == [CALLED]
    assert whole.calls == one_by_one.calls == 1


def test_text_is_not_held_back_longer_than_it_may_be_a_mark() -> None:
    splitter = AnswerParts(True, form=TaggedCalls())
    assert joined(splitter.add("<think>ab")) == ["reasoning:ab"]
    assert joined(splitter.add("c</th")) == ["reasoning:c"]
    assert joined(splitter.add("ere</think>Well")) == ["reasoning:</there", "content:Well"]
    assert joined(splitter.add(", <to")) == ["content:,"]
    assert joined(splitter.add("day")) == ["content: <today"]


def test_a_prompt_may_open_the_thinking() -> None:
    splitter = AnswerParts(True, inside=True)
    assert joined([*splitter.add("Hm.</think>\nYes"), *splitter.finish()]) == ["reasoning:Hm.", "content:Yes"]


def test_the_form_is_read_off_the_template() -> None:
    assert isinstance(form_of("{% if tools %}<tool_call>"), TaggedCalls)
    assert isinstance(form_of('{% if tools %}{"name": function name, "parameters": ...}'), BareCalls)
    assert isinstance(form_of("{% if tools %}[TOOL_CALLS]"), ListedCalls)


HERMES = (
    "{%- if tools %}{{- '<|im_start|>system\n<tool_call>' + (tools | tojson) + '<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content }}"
    "{%- for call in message.tool_calls or [] %}{{- '<tool_call>' + (call.function.arguments | tojson) }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    "{%- if enable_thinking %}{{- '<think>\n</think>' }}{%- endif %}"
)


def test_tool_calls_and_thoughts_reach_openais_client() -> None:
    openai = pytest.importorskip("openai")
    text = f"<think>\nI count.\n</think>\n\nOne moment.\n{ONE}\n{ONE}"
    history = [
        *LINES,
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "count", "arguments": '{"path": "b"}'}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
    ]  # fmt: skip
    with serving(scripted(text, HERMES), plain(FIXED, max_new_tokens=200)) as server:
        api = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        ask: Any = {"model": "demo", "messages": history, "tools": TOOLS}
        reply = api.chat.completions.create(**ask)
        message = reply.choices[0].message
        assert message.content == "One moment."
        assert message.reasoning_content == "I count."
        assert reply.choices[0].finish_reason == "tool_calls"
        assert reply.usage.completion_tokens_details.reasoning_tokens > 0
        assert [json.loads(call.function.arguments) for call in message.tool_calls] == [{"path": "a.txt"}] * 2
        assert len({call.id for call in message.tool_calls}) == 2
        with api.chat.completions.stream(**ask) as stream:  # openai's own accumulation of deltas
            final = stream.get_final_completion().choices[0].message
        assert final.content == "One moment."
        assert [call.function.name for call in final.tool_calls] == ["count", "count"]
        deltas = [c.choices[0].delta for c in api.chat.completions.create(**ask, stream=True)]
        calls = [call for delta in deltas for call in delta.tool_calls or []]
        assert [call.index for call in calls] == [0, 1]
        assert all(isinstance(call.function.arguments, str) and call.id and call.function.name for call in calls)
        single = api.chat.completions.create(**ask, parallel_tool_calls=False).choices[0].message
        assert [json.loads(call.function.arguments) for call in single.tool_calls] == [{"path": "a.txt"}]
        without = api.chat.completions.create(**{**ask, "tool_choice": "none"}).choices[0]
        assert without.finish_reason == "stop"
        assert "<tool_call>" in without.message.content


def test_a_call_can_be_asked_for() -> None:
    """By a grammar, so the demo model makes one too; and only of the tool that is named."""
    pair = demo_pair()
    pair.tokenizer.chat_template = HERMES
    with serving(pair) as server, client(server) as http:
        body: Any = {"messages": LINES, "tools": TOOLS, "max_tokens": 64}
        for choice in ("required", {"type": "function", "function": {"name": "count"}}):
            reply = http.post("/v1/chat/completions", json={**body, "tool_choice": choice}).json()["choices"][0]
            calls = reply["message"].get("tool_calls")
            if reply["finish_reason"] == "tool_calls":
                assert calls[0]["function"]["name"] == "count"
                assert set(json.loads(calls[0]["function"]["arguments"])) >= {"path"}
            else:
                assert reply["finish_reason"] == "length"
                assert reply["message"]["content"].startswith('<tool_call>\n{"name": "count", "arguments": {"path": "')
        other = {"type": "function", "function": {"name": "other"}}
        assert http.post("/v1/chat/completions", json={**body, "tool_choice": other}).status_code == 400


def test_template_variables_that_the_template_reads_are_taken() -> None:
    with serving(scripted("Yes.", HERMES), plain(FIXED)) as server, client(server) as http:
        body = {"messages": LINES, "chat_template_kwargs": {"enable_thinking": True}}
        reply = http.post("/v1/chat/completions", json=body).json()
        assert reply["choices"][0]["finish_reason"]
        body["chat_template_kwargs"] = {"unknown": True}
        assert http.post("/v1/chat/completions", json=body).json()["error"]["param"] == "chat_template_kwargs"


def test_a_call_as_clients_read_it() -> None:
    call = ToolCall("f", "{}").as_json()
    assert call["id"].startswith("call_")
    assert call["function"] == {"name": "f", "arguments": "{}"}
