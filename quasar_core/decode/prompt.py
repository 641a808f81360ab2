"""Encode what the user typed, a raw text or messages through the chat template, with no text lost."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import PreTrainedTokenizerBase

from quasar_core.errors import QuasarError
from quasar_core.files import require_characters
from quasar_core.foreign import foreign_errors

Messages = Sequence[dict[str, Any]]
TEMPLATE_FILE = "<template>"  # what jinja calls the code that it makes of a template
MOST_LINES = 5_000_000  # of a template's code; the longest conversations take tens of thousands
_MARK = "quasarmark"  # in small letters, as a template may change them


class EndlessTemplate(Exception):
    """A template ran more lines than any conversation needs."""


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, **options: Any) -> str:
    """The text that the tokenizer's chat template makes of messages, each a text with a role.

    Some templates read the content as a text and others as a list of parts, and what a template does not read it
    leaves out. So each form is tried on marks first, and the one taken in which those of user and system are found.
    Raises QuasarError where the template refuses the messages, where they are in neither form, and for a template
    that does not end.
    """
    marked = [{**message, "content": f"{_MARK}{number}e"} for number, message in enumerate(messages)]
    wanted = [message["content"] for message in marked if message["role"] in ("user", "system")]
    refusal: Exception | None = None
    for form in (as_texts, as_parts):
        try:
            rendered = _render(tokenizer, form(marked), options)
            if all(mark in rendered.lower() for mark in wanted):
                return _render(tokenizer, form(messages), options)
        except EndlessTemplate as error:
            raise QuasarError(
                f"The model's chat template runs more than {MOST_LINES} lines without coming to an end."
            ) from error
        except Exception as error:  # a template raises whatever its author chose
            refusal = error if form is as_texts else refusal
    if refusal is not None:
        first = (str(refusal).strip().splitlines() or [type(refusal).__name__])[0]
        raise QuasarError(f"The model's chat template refuses these messages: {first}") from refusal
    raise QuasarError(
        "The model's chat template leaves the text of the messages out, as a text and as a list of parts; "
        "--raw takes a prompt as it is."
    )


def as_texts(messages: Messages) -> list[dict[str, Any]]:
    """The messages as they are."""
    return list(messages)


def as_parts(messages: Messages) -> list[dict[str, Any]]:
    """Each content as a list of one part."""
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def text_of(content: Any) -> str:
    """The text of a content that is a text or a list of parts; TypeError for a part that is no text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise TypeError("a message is a text or a list of parts")
    parts = [
        part["text"] if isinstance(part, dict) and part.get("type", "text") == "text" else part for part in content
    ]
    if not all(isinstance(part, str) for part in parts):
        raise TypeError("a part is a text")
    return "".join(parts)


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages, options: dict[str, Any]) -> str:
    with line_limit(MOST_LINES):
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))


@contextmanager
def line_limit(most: int) -> Iterator[None]:
    """Raise EndlessTemplate where templates run more than `most` lines of the code that jinja made of them.

    jinja's sandbox bounds the length of a range, not what loops within loops take together.
    """
    run = 0

    def count_line(frame: FrameType, event: str, _: Any) -> Callable[..., Any]:
        nonlocal run
        run += event == "line"
        if run > most:
            raise EndlessTemplate
        return count_line

    def enter(frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        return count_line if frame.f_code.co_filename == TEMPLATE_FILE else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]] | str,
    *,
    raw: bool = False,
    think: bool | None = None,
) -> list[int]:
    """Token ids of a raw text, or of messages through the chat template.

    A text with `raw` False is one user message; where the tokenizer has no chat template it is taken as it is.
    `think` is handed to templates that know `enable_thinking` (Qwen3's).
    """
    if isinstance(messages, str):
        if raw or not tokenizer.chat_template:
            return _encode(tokenizer, messages)
        messages = [{"role": "user", "content": messages}]
    options: dict[str, Any] = {} if think is None else {"enable_thinking": think}
    if not tokenizer.chat_template:
        return _encode(tokenizer, "\n".join(message["content"] for message in messages))
    text = render(tokenizer, messages, add_generation_prompt=True, **options)
    return _encode(tokenizer, text, add_special_tokens=False)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> list[int]:
    require_characters(text, "The prompt")
    with foreign_errors("The tokenizer cannot encode the prompt"):
        return list(tokenizer(text, **options)["input_ids"])
