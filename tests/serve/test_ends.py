"""Fields that vLLM's clients send: the text is transformers' own by the same rule, in every mode."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("starlette")

from helpers.serving import DEMO, LINES, client, demo_pair, serving
from transformers import AutoModelForCausalLM

from quasar_core.decode.text import encode_prompt

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MODES = [{"verify": "full"}, {"verify": "exact"}]
SHORT = [{"role": "user", "content": "Write a function `is_even`."}]


@pytest.fixture(scope="module")
def http() -> Iterator[Any]:
    with serving(demo_pair()) as running, client(running) as http:
        yield http


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)


def reference(model: Any, count: int, messages: Any = LINES, **options: Any) -> list[int]:
    """The tokens that transformers' generate writes behind the messages."""
    ids = torch.tensor([encode_prompt(demo_pair().tokenizer, messages)])
    written = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, **options)
    return [int(token) for token in written[0, ids.shape[1] :]]


def decoded(ids: list[int], skip: bool = True) -> str:
    return str(demo_pair().tokenizer.decode(ids, skip_special_tokens=skip))


def ask(http: Any, **body: Any) -> Any:
    reply = http.post(CHAT, json={"messages": LINES, **body})
    assert reply.status_code == 200, reply.text
    return reply.json()


def said(reply: Any) -> tuple[str, str]:
    choice = reply["choices"][0]
    return choice["message"]["content"], choice["finish_reason"]


@pytest.fixture(scope="module")
def ended(model: Any) -> list[int]:
    """An answer that ends by itself."""
    ids = reference(model, 200, SHORT)
    assert ids[-1] in demo_pair().eos_ids
    return ids


def test_an_answer_goes_on_behind_its_end_where_that_is_ignored(http: Any, model: Any, ended: list[int]) -> None:
    length = len(ended)
    wanted = reference(model, length + 12, SHORT, eos_token_id=[])
    assert len(wanted) == length + 12
    for mode in MODES:
        reply = ask(http, messages=SHORT, max_tokens=length + 12, ignore_eos=True, **mode)
        assert said(reply) == (decoded(wanted), "length")
        assert reply["usage"]["completion_tokens"] == length + 12


def test_an_answer_has_the_fewest_tokens_that_are_asked_for(http: Any, model: Any, ended: list[int]) -> None:
    least = len(ended) + 5
    wanted = reference(model, least + 30, SHORT, min_new_tokens=least)
    assert len(wanted) >= least
    for mode in MODES:
        reply = ask(http, messages=SHORT, max_tokens=least + 30, min_tokens=least, **mode)
        assert said(reply)[0] == decoded(wanted)
        assert reply["usage"]["completion_tokens"] == len(wanted)


def test_tokens_that_are_named_end_an_answer(http: Any, model: Any) -> None:
    plain = reference(model, 40)
    end = plain[17]
    wanted = reference(model, 40, eos_token_id=[*demo_pair().eos_ids, end])
    assert wanted[-1] == end
    assert len(wanted) < 40
    for mode in MODES:
        for kept, text in ((False, decoded(wanted[:-1])), (True, decoded(wanted))):
            body = {"max_tokens": 40, "stop_token_ids": [end], "include_stop_str_in_output": kept, **mode}
            reply = ask(http, logprobs=True, **body)
            assert said(reply) == (text, "stop")
            assert reply["usage"]["completion_tokens"] == len(wanted)
            assert len(reply["choices"][0]["logprobs"]["content"]) == len(wanted) - (not kept)
    alone = ask(http, messages=SHORT, max_tokens=8, stop_token_ids=[end], ignore_eos=True, min_tokens=8)
    assert alone["usage"]["completion_tokens"] == 8


def test_a_stop_text_stays_where_it_is_asked_for(http: Any) -> None:
    text = said(ask(http, max_tokens=40))[0]
    stop = text[20:24]
    cut = text[: text.index(stop) + len(stop)]
    for mode in MODES:
        assert said(ask(http, max_tokens=40, stop=[stop], include_stop_str_in_output=True, **mode)) == (cut, "stop")


def test_no_stop_text_counts_among_the_fewest_tokens(http: Any, model: Any) -> None:
    """As in vLLM, which looks for them in what follows."""
    ids = reference(model, 40)
    text, stop = decoded(ids), "lines"
    first = text.index(stop) + len(stop)
    second = text.index(stop, first)
    least = next(n for n in range(len(ids)) if len(decoded(ids[:n])) >= first)
    assert said(ask(http, max_tokens=40, stop=stop))[0] == text[: first - len(stop)]
    assert said(ask(http, max_tokens=40, stop=stop, min_tokens=least))[0] == text[:second]


def test_special_tokens_are_text_where_they_are_not_skipped(http: Any, model: Any, ended: list[int]) -> None:
    length = len(ended)
    wanted = reference(model, length + 12, SHORT, eos_token_id=[])
    text = decoded(wanted, skip=False)
    assert text != decoded(wanted)
    for mode in MODES:
        body = {"messages": SHORT, "max_tokens": length + 12, "ignore_eos": True, "skip_special_tokens": False}
        assert said(ask(http, **body, **mode))[0] == text
    end = decoded(ended[-1:], skip=False)
    body = {"messages": SHORT, "max_tokens": 200, "skip_special_tokens": False, "include_stop_str_in_output": True}
    assert said(ask(http, **body))[0].endswith(end)
    assert not said(ask(http, messages=SHORT, max_tokens=200, skip_special_tokens=False))[0].endswith(end)


def test_a_repetition_penalty_is_transformers_own(http: Any, model: Any) -> None:
    wanted = reference(model, 40, repetition_penalty=1.3)
    assert wanted != reference(model, 40)
    for mode in MODES:
        assert said(ask(http, max_tokens=40, repetition_penalty=1.3, **mode))[0] == decoded(wanted)


SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["text", "code"]}, "lines": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "lines"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_vllms_names_for_a_shape_are_openais(http: Any, path: str) -> None:
    asked = {"messages": LINES} if path == CHAT else {"prompt": "def count"}
    form = {"type": "json_schema", "json_schema": {"name": "found", "schema": SCHEMA}}

    def text(**shape: Any) -> str:
        reply = http.post(path, json={**asked, "max_tokens": 60, **shape})
        assert reply.status_code == 200, reply.text
        choice = reply.json()["choices"][0]
        return str(choice["message"]["content"] if path == CHAT else choice["text"])

    wanted = text(response_format=form)
    assert json.loads(wanted)["kind"] in ("text", "code")
    for mode in MODES:
        assert text(guided_json=SCHEMA, **mode) == wanted
        assert text(guided_choice=["größer", 'a "b"\n', "😀"], **mode) in ("größer", 'a "b"\n', "😀")
        found = text(structured_outputs={"regex": "[ab]{2,5}-[0-9]{3}"}, **mode)
        assert re.fullmatch("[ab]{2,5}-[0-9]{3}", found)
    assert text(structured_outputs={"json": json.dumps(SCHEMA)}) == wanted
    assert text(structured_outputs={"json_object": True}).startswith("{")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"stop_token_ids": 3}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [True]}, "stop_token_ids"),
        ({"min_tokens": 41}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"skip_special_tokens": "no"}, "skip_special_tokens"),
        ({"include_stop_str_in_output": 0}, "include_stop_str_in_output"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": {"type": "odd"}}, "guided_json"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_choice"),
        ({"guided_grammar": "start: 'a'"}, "guided_grammar"),
        ({"structured_outputs": {"grammar": "a"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"choice": ["a"]}, "min_tokens": 3}, "min_tokens"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({"bad_words": ["a"]}, "bad_words"),
        ({"allowed_token_ids": [3]}, "allowed_token_ids"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"logits_processors": ["a"]}, "logits_processors"),
        ({"length_penalty": 0.5}, "length_penalty"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"echo": True}, "echo"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_named(http: Any, change: dict[str, Any], named: str) -> None:
    reply = http.post(CHAT, json={"messages": LINES, "max_tokens": 40, **change})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, named)
