"""Prompts: raw text, one user message, conversations, templates that know of thinking or refuse."""

import time
from typing import Any

import pytest
from helpers.tiny_models import words
from transformers import PreTrainedTokenizerFast

from quasar_core.decode import text
from quasar_core.decode.text import encode_prompt, render, text_of
from quasar_core.errors import QuasarError
from tools.demo.tokenizer import TURN_END, TURN_START, train_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["hello there\n"] * 4, 270)


CONVERSATION = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "there"},
    {"role": "user", "content": "hello there"},
]


def test_a_text_is_one_user_message(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode_prompt(tokenizer, "hello")
    assert tokenizer.decode(ids) == f"{TURN_START}user\nhello{TURN_END}\n{TURN_START}assistant\n"
    assert ids == encode_prompt(tokenizer, [{"role": "user", "content": "hello"}])


def test_a_raw_text_is_taken_as_it_is(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.decode(encode_prompt(tokenizer, "hello\n", raw=True)) == "hello\n"
    assert encode_prompt(tokenizer, "", raw=True) == []


def test_the_marks_of_a_turn_are_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode_prompt(tokenizer, CONVERSATION)
    assert ids.count(tokenizer.convert_tokens_to_ids(TURN_START)) == 4
    assert ids.count(tokenizer.convert_tokens_to_ids(TURN_END)) == 3


def test_a_conversation_goes_on_where_the_answer_ended(tokenizer: PreTrainedTokenizerFast) -> None:
    """What the cache holds of the first turn is a prefix of the second turn's prompt."""
    first = encode_prompt(tokenizer, CONVERSATION[:1])
    answer = list(tokenizer("there" + TURN_END)["input_ids"])
    assert encode_prompt(tokenizer, CONVERSATION)[: len(first) + len(answer)] == first + answer


def test_without_a_template_the_texts_alone_are_encoded() -> None:
    assert words().chat_template is None
    assert encode_prompt(words(), "w3") == [3]
    assert encode_prompt(words(), [{"role": "user", "content": "w5"}]) == [5]


def test_the_template_does_not_add_special_tokens_twice(tokenizer: PreTrainedTokenizerFast) -> None:
    from tokenizers.processors import TemplateProcessing

    begin = tokenizer.convert_tokens_to_ids(TURN_END)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        f"{TURN_END} $A", special_tokens=[(TURN_END, begin)]
    )
    assert encode_prompt(tokenizer, "hello", raw=True)[0] == begin
    assert encode_prompt(tokenizer, "hello").count(begin) == 1


@pytest.mark.parametrize(("think", "expected"), [(None, "unset"), (True, "True"), (False, "False")])
def test_thinking_reaches_the_template(think: bool | None, expected: str, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = (
        "{{ messages[0].content }} {{ enable_thinking if enable_thinking is defined else 'unset' }}"
    )
    assert tokenizer.decode(encode_prompt(tokenizer, "hello", think=think)) == f"hello {expected}"


def test_a_template_that_refuses_is_one_sentence(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(QuasarError, match="refuses these messages: roles must alternate"):
        encode_prompt(tokenizer, "hello")


PARTS = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %};{% endfor %}"
FIRST_PART = "{% for m in messages %}{{ m.content[0].text }};{% endfor %}"
STRICT_PARTS = "{% for m in messages %}{{ m.content[0]['text'] + ';' }}{% endfor %}"  # an error for a text


@pytest.mark.parametrize("chat_template", [PARTS, FIRST_PART, STRICT_PARTS])
def test_a_template_that_wants_parts_gets_parts(chat_template: str, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = chat_template
    assert tokenizer.decode(encode_prompt(tokenizer, CONVERSATION)) == "hello;there;hello there;"
    assert tokenizer.decode(encode_prompt(tokenizer, "u")) == "u;"  # a text that stands in many a template


@pytest.mark.parametrize(
    "chat_template",
    ["user: {{ messages[0].role }}", "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"],
)
def test_a_template_that_leaves_the_text_out_is_refused(chat_template: str, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = chat_template
    with pytest.raises(QuasarError, match="leaves the text of the messages out"):
        encode_prompt(tokenizer, [{"role": "system", "content": "r"}, {"role": "user", "content": "user"}])


@pytest.mark.parametrize(
    ("chat_template", "expected"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "say \\"a\\""}]'),
        ("{{ messages[0].content | upper }}", 'SAY "A"'),
    ],
)
def test_a_text_that_the_template_writes_in_another_way_is_not_lost(
    chat_template: str, expected: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = chat_template
    assert render(tokenizer, [{"role": "user", "content": 'say "a"'}]) == expected


def test_loops_within_loops_of_a_template_end(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "MOST_LINES", 20_000)
    loops = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
    tokenizer.chat_template = loops + "{{ messages[0].content }}"
    with pytest.raises(QuasarError, match="more than 20000 lines"):
        encode_prompt(tokenizer, "hello")
    tokenizer.chat_template = "{% for i in range(900) %}{% if i == 0 %}{{ messages[0].content }}{% endif %}{% endfor %}"
    assert tokenizer.decode(encode_prompt(tokenizer, "hello")) == "hello"


def test_a_template_that_calls_itself_is_one_sentence(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}"
    with pytest.raises(QuasarError, match="refuses these messages: maximum recursion"):
        encode_prompt(tokenizer, "hello")


def test_the_text_of_parts() -> None:
    assert text_of("a") == "a"
    assert text_of([{"type": "text", "text": "a"}, "b", {"text": "c"}]) == "abc"
    wrong: list[Any] = [None, 3, [], [3], [{"type": "image", "url": "x"}], [{"type": "text", "text": 3}]]
    for content in wrong:
        with pytest.raises(TypeError):
            text_of(content)


def test_a_long_conversation_takes_time_in_proportion(tokenizer: PreTrainedTokenizerFast) -> None:
    """The marks of all messages are looked for at once: one by one, these took a minute."""
    messages = [{"role": "user", "content": "a"}] * 40_000
    start = time.process_time()  # other programs take none of it
    assert render(tokenizer, messages).count(f"{TURN_START}user\na{TURN_END}") == len(messages)
    assert time.process_time() - start < 15
