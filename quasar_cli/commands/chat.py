"""`quasar chat`: turns over one cache."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from quasar_cli import console
from quasar_cli.commands.generate import as_document, load_pair, show_notes, show_stats
from quasar_cli.options import (
    DecodeOptions,
    Json,
    ModelOptions,
    ShowStats,
    Stream,
    System,
    Think,
    Verbose,
    takes_groups,
)
from quasar_core.errors import UsageError

if TYPE_CHECKING:
    from quasar_core.decode.generator import Generator
    from quasar_core.records import GenerationResult

HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer, /help prints this."


@takes_groups
def chat(
    *,
    system: System = None,
    think: Think = None,
    decoding: DecodeOptions,
    models: ModelOptions,
    stream: Stream = True,
    stats: ShowStats = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Chat with a pair, in turns: one message a line; /help lists the commands.

    The cache is kept between turns, so a turn costs its own tokens only.
    """
    config = decoding.config()
    pair = load_pair(models, config)

    from quasar_core.decode.generator import Generator
    from quasar_core.kernels.threads import describe_threads

    conversation = Conversation(Generator(pair, config), system, think, stream and not as_json)
    if verbose:
        show_notes(pair)
    turns: list[dict[str, Any]] = []
    for message in _messages(conversation):
        result = conversation.answer(message)
        if result is None:
            continue
        turns.append(as_document(pair, config, result))
        if not as_json:
            console.stream_text("\n" if stream else result.text + "\n")
        if stats:
            show_stats(pair, config, result)
        if verbose:
            console.note_plain(f"- {describe_threads()}")
    if as_json:
        console.print_json({"turns": turns})


class Conversation:
    """The messages so far, and the generator whose cache holds them."""

    def __init__(self, generator: "Generator", system: str | None, think: bool | None, stream: bool) -> None:
        self._generator, self._think, self._stream = generator, think, stream
        self._opening = [{"role": "system", "content": system}] if system is not None else []
        self.messages = list(self._opening)

    def reset(self) -> None:
        """Start anew: only the system message stays."""
        self.messages = list(self._opening)
        self._generator.reset()

    def answer(self, message: str) -> "GenerationResult | None":
        """Answer one message; None where the answer was stopped or the message cannot be answered.

        A stopped answer stays in the conversation as far as it came; a message without an answer does not.
        """
        from quasar_core.decode.text import encode_prompt

        asked = [*self.messages, {"role": "user", "content": message}]
        pieces: list[str] = []
        try:
            prompt_ids = encode_prompt(self._generator.pair.tokenizer, asked, think=self._think)
            result = self._generator.generate(prompt_ids, lambda text: self._hear(text, pieces))
        except UsageError as error:
            console.print_error(f"{error} /reset starts a new conversation.")
            return None
        except KeyboardInterrupt:
            # A pass may have been cut in the middle, so what the cache holds is not known.
            self._generator.reset()
            console.note_plain("\n(stopped)")
            self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]
            return None
        self.messages = [*asked, {"role": "assistant", "content": result.text}]
        return result

    def _hear(self, text: str, pieces: list[str]) -> None:
        pieces.append(text)
        if self._stream:
            console.stream_text(text)


def _messages(conversation: Conversation) -> Iterator[str]:
    """The lines to answer; the lines that are commands are carried out here."""
    if sys.stdin.isatty():
        console.note_plain(HELP)
    while (line := _read_line()) is not None:
        message = line.strip()
        if message in ("/exit", "/quit"):
            return
        if message == "/reset":
            conversation.reset()
            console.note_plain("(the conversation is forgotten)")
        elif message.startswith("/"):
            console.note_plain(HELP)
        elif message:
            yield message


def _read_line() -> str | None:
    """The next line, or None at the end; in a terminal it can be edited."""
    if not sys.stdin.isatty():
        return sys.stdin.readline() or None
    import readline  # noqa: F401 - importing it gives input() its line editing

    try:
        return input("> ")
    except EOFError:
        return None
