"""Text from tokens as they come: never half a character, never a piece of a stop string."""

import codecs
import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"  # what bytes decode to that are no character, or not yet
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


class TextStream:
    """Decodes committed tokens one by one, and yields text as soon as it is finished.

    Text that may be the beginning of a stop string waits; a stop string itself is never yielded. Special tokens have
    no text, but those that a stop string names are known by their ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...]) -> None:
        self._decoder = _Decoder(tokenizer)
        self._stop = stop
        self._marks = special_tokens_within(tokenizer, stop) if stop else {}
        self._pieces: list[str] = []
        self._waiting = ""
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
        self._shown += [mark is None] * len(piece)
        found = [at for s in self._stop if (at := self._waiting.find(s)) >= 0]
        if not found:
            return self._take(len(self._waiting) - self._held_back())
        finished = self._take(min(found))
        self._waiting, self._shown, self.stopped = "", [], True
        return finished

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
        self._pieces.append(piece)
        return piece

    def finish(self) -> str:
        """What waited until the end. Bytes that never became a character are left out."""
        return self._take(len(self._waiting))


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

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
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
        return str(self._text_of(tokens, skip_special_tokens=True))
