"""Encode a prompt with no text lost, and decode tokens as they come.

A prompt is a raw text, or messages through the chat template. Decoded text never ends within a character, and never
with a piece of a stop string.
"""

import codecs
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from transformers import PreTrainedTokenizerBase

from quasar_core.errors import QuasarError, foreign_errors
from quasar_core.files import require_characters

Messages = Sequence[dict[str, Any]]
TEMPLATE_FILE = "<template>"  # what jinja calls the code that it makes of a template
MOST_LINES = 5_000_000  # of a template's code; the longest conversations take tens of thousands
_MARK = "quasarmark"  # in small letters, as a template may change them
_MARKS = re.compile(f"{_MARK}\\d+e")
BROKEN = "\ufffd"  # what bytes decode to that are no character, or not yet
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


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
    wanted = {message["content"] for message in marked if message["role"] in ("user", "system")}
    refusal: Exception | None = None
    for form in (as_texts, as_parts):
        try:
            rendered = _render(tokenizer, form(marked), options)
            if wanted <= set(_MARKS.findall(rendered.lower())):
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
    messages: list[dict[str, Any]] | str,
    *,
    raw: bool = False,
    think: bool | None = None,
    **template: Any,
) -> list[int]:
    """Token ids of a raw text, or of messages through the chat template.

    A text with `raw` False is one user message; where the tokenizer has no chat template it is taken as it is.
    `think` is handed to templates that know `enable_thinking` (Qwen3's), and `template` are further variables.
    """
    if isinstance(messages, str):
        if raw or not tokenizer.chat_template:
            return _encode(tokenizer, messages)
        messages = [{"role": "user", "content": messages}]
    options: dict[str, Any] = template if think is None else {**template, "enable_thinking": think}
    if not tokenizer.chat_template:
        return _encode(tokenizer, "\n".join(message["content"] for message in messages))
    text = render(tokenizer, messages, **{"add_generation_prompt": True, **options})
    return _encode(tokenizer, text, add_special_tokens=False)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that stands within another: without tokens that begin or end one."""
    return _encode(tokenizer, text, "The text", add_special_tokens=False)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, what: str = "The prompt", **options: Any) -> list[int]:
    require_characters(text, what)
    with foreign_errors(f"The tokenizer cannot encode {what.lower()}"):
        return list(tokenizer(text, **options)["input_ids"])


@dataclass(frozen=True)
class Reading:
    """Which of an answer's tokens are text.

    Special tokens have none, but for those that are `shown`, and all of them with `special`. With `keeps_stop` what
    ends the answer, a stop string or a token, belongs to its text. No stop string ends with the first `least` tokens.
    """

    shown: tuple[str, ...] = ()
    special: bool = False
    keeps_stop: bool = False
    least: int = 0


class TextStream:
    """Decodes committed tokens one by one, and yields text as soon as it is finished.

    Text that may be the beginning of a stop string waits; a stop string itself is not yielded, unless it belongs to the
    text. Special tokens that a stop string names are known by their ids.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...], reading: Reading | None = None
    ) -> None:
        self._reading = reading or Reading()
        self._decoder = _Decoder(tokenizer, self._reading.special)
        self._stop, self._left = stop, self._reading.least
        shown = self._reading.shown
        known = not self._reading.special and (stop or shown)
        self._marks = special_tokens_within(tokenizer, [*stop, *shown]) if known else {}
        self._are_text = {number for number, text in self._marks.items() if text in shown}
        self._pieces: list[str] = []
        self._waiting = ""
        self._early = 0  # characters of it in which no stop string may end
        self._shown: list[bool] = []  # of each waiting character: whether it is text, and not a special token's name
        self.stopped = False  # whether a stop string is complete

    @property
    def text(self) -> str:
        """All that was yielded."""
        return "".join(self._pieces)

    def add(self, token: int) -> str:
        """Take one token; the text that it finishes, often none."""
        mark = self._marks.get(token)
        piece = self._decoder.add(token) if mark is None else mark
        self._waiting += piece
        self._shown += [mark is None or token in self._are_text] * len(piece)
        found = self._stops()
        if not found:
            return self._take(len(self._waiting) - self._held_back())
        at, length = min(found)
        if self._reading.keeps_stop:
            self._shown[at : at + length] = [True] * length
            at += length
        finished = self._take(at)
        self._waiting, self._shown, self.stopped = "", [], True
        return finished

    def _stops(self) -> list[tuple[int, int]]:
        """Places and lengths of the stop strings in the waiting text, of each the first that may count."""
        if self._left > 0:
            self._left, self._early = self._left - 1, len(self._waiting)
        begins = [(s, max(self._early - len(s) + 1, 0)) for s in self._stop]
        return [(at, len(s)) for s, begin in begins if (at := self._waiting.find(s, begin)) >= 0]

    def _held_back(self) -> int:
        """Length of the longest end of the waiting text that begins a stop string."""
        longest = max((len(s) - 1 for s in self._stop), default=0)
        for length in range(min(longest, len(self._waiting)), 0, -1):
            if any(s.startswith(self._waiting[-length:]) for s in self._stop):
                return length
        return 0

    def _take(self, length: int) -> str:
        """The first `length` waiting characters, which wait no longer."""
        shown = zip(self._waiting[:length], self._shown, strict=False)
        piece = "".join(character for character, is_text in shown if is_text)
        self._waiting, self._shown = self._waiting[length:], self._shown[length:]
        self._early = max(self._early - length, 0)
        self._pieces.append(piece)
        return piece

    def finish(self) -> str:
        """What waited until the end. Bytes that never became a character are left out."""
        return self._take(len(self._waiting))


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """The text that each token finishes, as it is streamed; what waits until the end is the last token's."""
    stream = TextStream(tokenizer, ())
    pieces = [stream.add(token) for token in token_ids]
    if rest := stream.finish():
        pieces[-1] += rest
    return pieces


def special_tokens_within(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> dict[int, str]:
    """The special tokens, which decoding drops, that stand in one of the stop strings: their ids and their texts."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {
        number: token.content
        for number, token in added.items()
        if token.special and any(token.content in text for text in stop)
    }


class _Decoder:
    """Decodes the last finished piece together with the tokens since: many a tokenizer strips the space of the first
    word it decodes, so a token is never decoded alone. Tokens that end within a character wait for the next one.

    Tokens that are bytes by name are put together here: tokenizers take all of a run of them for broken where one is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special: bool = False) -> None:
        self._skips = not special
        self._names = tokenizer.convert_ids_to_tokens
        backend = getattr(tokenizer, "backend_tokenizer", None)  # which tokenizers in Python do not have
        self._text_of = tokenizer.decode if backend is None else backend.decode
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._broken = ""  # marks of bytes that will be no character
        self._before: list[int] = []  # tokens of the last finished piece
        self._known = ""  # their text
        self._since: list[int] = []

    def add(self, token: int) -> str:
        """The text that `token` finishes; empty where a character is not whole."""
        byte = self._byte(token)
        if byte is None:
            self._broken += self._bytes.decode(b"", final=True)
            return self._whole(self._add_text(token))
        waited = self._decode(self._before + self._since)[len(self._known) :]
        self._follow([token])
        return self._whole(waited + self._bytes.decode(byte))

    def _whole(self, piece: str) -> str:
        """The text up to its last character that is whole; broken ones wait for one."""
        text = self._broken + piece
        whole = text.rstrip(BROKEN)
        self._broken = text[len(whole) :]
        return whole

    def _add_text(self, token: int) -> str:
        self._since.append(token)
        text = self._decode(self._before + self._since)
        if len(text) <= len(self._known) or text.endswith(BROKEN):
            return ""
        piece = text[len(self._known) :]
        self._follow(self._since)
        return piece

    def _follow(self, tokens: list[int]) -> None:
        self._before, self._since = tokens, []
        self._known = self._decode(tokens)

    def _byte(self, token: int) -> bytes | None:
        """The byte that a token such as <0x0A> stands for; None for any other."""
        found = _BYTE.fullmatch(str(self._names(token)))
        is_byte = found is not None and self._decode([token]) != found.group()
        return bytes.fromhex(found.group(1)) if found is not None and is_byte else None

    def _decode(self, tokens: list[int]) -> str:
        return str(self._text_of(tokens, skip_special_tokens=self._skips))
