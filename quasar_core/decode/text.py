"""Text from tokens as they come: never half a character, never a piece of a stop string."""

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"  # what bytes decode to that are no character, or not yet


class TextStream:
    """Decodes committed tokens one by one and hands finished text to `on_text`.

    Text that may be the beginning of a stop string waits; a stop string itself is never handed on.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...], on_text: Callable[[str], None] | None
    ) -> None:
        self._decoder = _Decoder(tokenizer)
        self._stop, self._on_text = stop, on_text
        self._pieces: list[str] = []
        self._waiting = ""
        self.stopped = False

    def add(self, token: int) -> bool:
        """Take one token; True when a stop string is complete."""
        self._waiting += self._decoder.add(token)
        found = [at for s in self._stop if (at := self._waiting.find(s)) >= 0]
        if found:
            self._emit(min(found))
            self._waiting, self.stopped = "", True
        else:
            self._emit(len(self._waiting) - self._held_back())
        return self.stopped

    def _held_back(self) -> int:
        """Length of the longest end of the waiting text that begins a stop string."""
        longest = max((len(s) - 1 for s in self._stop), default=0)
        for length in range(min(longest, len(self._waiting)), 0, -1):
            if any(s.startswith(self._waiting[-length:]) for s in self._stop):
                return length
        return 0

    def _emit(self, length: int) -> None:
        piece, self._waiting = self._waiting[:length], self._waiting[length:]
        if piece:
            self._pieces.append(piece)
            if self._on_text:
                self._on_text(piece)

    def finish(self) -> str:
        """Hand on what waited; the whole text. Bytes that never became a character are left out."""
        self._emit(len(self._waiting))
        return "".join(self._pieces)


class _Decoder:
    """Decodes the last finished piece together with the tokens since: many a tokenizer strips the space of the first
    word it decodes, so a token is never decoded alone. Tokens that end within a character wait for the next one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._before: list[int] = []  # tokens of the last finished piece
        self._known = ""  # their text
        self._since: list[int] = []

    def add(self, token: int) -> str:
        """The text that `token` finishes; empty where a character is not whole."""
        self._since.append(token)
        text = self._decode(self._before + self._since)
        if len(text) <= len(self._known) or text.endswith(BROKEN):
            return ""
        piece = text[len(self._known) :]
        self._before, self._since = self._since, []
        self._known = self._decode(self._before)
        return piece

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text
