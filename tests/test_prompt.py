"""Prompts: raw text, one user message, conversations, templates that know of thinking or refuse."""

import pytest
from tiny_models import words
from transformers import PreTrainedTokenizerFast

from quasar_core.decode.prompt import encode_prompt
from quasar_core.demo.tokenizer import TURN_END, TURN_START, train_tokenizer
from quasar_core.errors import QuasarError


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
    tokenizer.chat_template = "{{ enable_thinking if enable_thinking is defined else 'unset' }}"
    assert tokenizer.decode(encode_prompt(tokenizer, "hello", think=think)) == expected


def test_a_template_that_refuses_is_one_sentence(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(QuasarError, match="refuses these messages: roles must alternate"):
        encode_prompt(tokenizer, "hello")
