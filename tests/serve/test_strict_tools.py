"""`strict` where the model may choose: a call that it begins fits the tool's schema, and all else is as it wrote it."""

import json
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("llguidance")

from helpers.serving import FIXED, LINES, client, demo_pair, plain, scripted, serving

TOOL: dict[str, Any] = {
    "name": "count",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"kind": {"enum": ["text", "code"]}, "lines": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["kind", "lines"],
        "additionalProperties": False,
    },
}
STRICT = [{"type": "function", "function": TOOL}]
LOOSE = [{"type": "function", "function": {**TOOL, "strict": False}}]
HERMES = (
    "{%- if tools %}{{- '<tool_call>' + (tools | tojson) }}{%- endif %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}{{- '<|im_start|>assistant\n' }}"
)
THINKING = HERMES + "{# <think></think> #}"
LLAMA = HERMES.replace("'<tool_call>'", "'\"parameters\"'")
MISTRAL = HERMES.replace("'<tool_call>'", "'[TOOL_CALLS]'")
QWEN35 = HERMES + "{# <function= #}"
WRONG = '<tool_call>\n{"name": "count", "arguments": {"kind": "prose", "lines": "many"}}\n</tool_call>'


def answer(text: str, tools: Any, template: str = HERMES, **body: Any) -> Any:
    with serving(scripted(text, template), plain(FIXED, max_new_tokens=160)) as server, client(server) as http:
        reply = http.post("/v1/chat/completions", json={"messages": LINES, "tools": tools, **body})
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"][0]


def arguments(choice: Any) -> list[Any]:
    return [json.loads(call["function"]["arguments"]) for call in choice["message"].get("tool_calls", [])]


def fits(value: Any) -> bool:
    return set(value) == {"kind", "lines"} and value["kind"] in ("text", "code") and 0 <= value["lines"] <= 99


@pytest.mark.parametrize(
    ("text", "template"),
    [(f"Let me see.\n{WRONG}", HERMES), (WRONG.split("\n")[1].replace("arguments", "parameters"), LLAMA)],
    ids=["tagged", "bare"],
)
def test_a_call_that_breaks_the_schema_is_kept_to_it(text: str, template: str) -> None:
    loose, strict = answer(text, LOOSE, template), answer(text, STRICT, template)
    assert arguments(loose) == [{"kind": "prose", "lines": "many"}]
    before = loose["message"]["content"] or ""
    assert (strict["message"]["content"] or "").startswith(before)  # the script goes on behind the call
    assert len(arguments(strict)) == 1
    assert fits(arguments(strict)[0])
    assert strict["finish_reason"] == "tool_calls"


def test_what_is_no_call_is_as_the_model_wrote_it() -> None:
    text = 'Say <tool_cal and {"name": 3} and <tool call>, größer.'
    assert answer(text, STRICT)["message"]["content"] == text
    thought = f"<think>\nI might {WRONG}\n</think>\n\nNo."
    choice = answer(thought, STRICT, THINKING)
    assert choice["message"]["content"] == "No."
    assert choice["message"]["reasoning_content"] == f"I might {WRONG}"
    assert answer('It is {"a": 1}', STRICT, LLAMA)["message"]["content"] == 'It is {"a": 1}'


def test_a_tool_that_is_not_strict_keeps_its_freedom_beside_one_that_is() -> None:
    free = {"type": "function", "function": {"name": "free", "parameters": TOOL["parameters"]}}
    text = '<tool_call>\n{"name": "free", "arguments": {"odd": [1, 2]}}\n</tool_call>'
    assert arguments(answer(text, [*STRICT, free])) == [{"odd": [1, 2]}]


@pytest.mark.parametrize("template", [MISTRAL, QWEN35], ids=["mistral", "qwen3.5"])
def test_where_it_cannot_be_kept_it_is_refused_by_name(template: str) -> None:
    with serving(scripted("a", template), plain(FIXED)) as server, client(server) as http:
        body: Any = {"messages": LINES, "max_tokens": 2}
        reply = http.post("/v1/chat/completions", json={**body, "tools": STRICT})
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == "tools"
        assert "strict" in reply.json()["error"]["message"]
        for other in ({"tools": LOOSE}, {"tools": STRICT, "tool_choice": "none"}):
            assert http.post("/v1/chat/completions", json={**body, **other}).status_code == 200
        odd = [{"type": "function", "function": {"name": "f", "strict": "yes"}}]
        assert http.post("/v1/chat/completions", json={**body, "tools": odd}).json()["error"]["param"] == "tools"


def test_calls_are_the_same_whatever_is_drafted() -> None:
    """The demo model writes a call by itself where its answer is biased to begin one."""
    pair = demo_pair()
    pair.tokenizer.chat_template = LLAMA
    given = {"type": "content", "content": '{"name": "count", "parameters": {"kind": "code", "lines": 7'}
    (brace,) = pair.tokenizer("{")["input_ids"]
    body = {"messages": LINES, "tools": STRICT, "max_tokens": 80, "logit_bias": {str(brace): 40}}
    found = []
    with serving(pair) as server, client(server) as http:
        for mode in ({"verify": "full", "draft": "none"}, {"verify": "full", "prediction": given}, {"verify": "exact"}):
            choice = http.post("/v1/chat/completions", json={**body, **mode}).json()["choices"][0]
            assert choice["finish_reason"] == "tool_calls"
            found.append(arguments(choice))
    assert found[0] == found[1] == found[2]
    assert fits(found[0][0])
