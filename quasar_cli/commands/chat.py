"""`quasar chat`: turns over one cache."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quasar_cli import INTERRUPTED, console
from quasar_cli.commands.generate import as_document, load_pair, make_generator, say_of_memory, show_notes, show_stats
from quasar_cli.help import examples
from quasar_cli.messages import read_messages
from quasar_cli.option_groups import DecodeOptions, ModelOptions, takes_groups
from quasar_cli.options import Json, MaxNewTokens, ShowStats, Stream, System, Think, Verbose
from quasar_core.config import GenerationConfig
from quasar_core.errors import ContextFull, QuasarError, UsageError
from quasar_core.files import absolute, exists, read_json, require_place, write_json

if TYPE_CHECKING:
    from quasar_core.api.decoding import Generator, Pair
    from quasar_core.records import GenerationResult

EXAMPLES = examples(
    "quasar chat",
    "quasar chat --system 'Answer in one sentence.'",
    "quasar chat --model Qwen3-0.6B --stats",
)
HELP = r"""/more         go on with an answer that was cut
/drop N       forget the N oldest turns, or one, for room
/system TEXT  set the system message, and start anew
/save FILE    write the conversation into a JSON file
/load FILE    go on with a conversation that was saved
/stats        tell what the last answer gained
/reset        forget the conversation
/help         print this
/exit         end, as Ctrl-D does
Ctrl-C stops an answer, or drops a line.
A pasted text is one message. A line that ends in \ goes on
in the next; so do lines between two times three double
quotes. // at the beginning sends a message that begins
with /"""


@dataclass(frozen=True)
class ChatOptions(DecodeOptions):
    """An answer of a chat may be longer: /more goes on where it was cut."""

    max_new_tokens: MaxNewTokens = 1024


@takes_groups
def chat(
    *,
    system: System = None,
    think: Think = None,
    decoding: ChatOptions,
    models: ModelOptions,
    stream: Stream = True,
    stats: ShowStats = False,
    history: Annotated[
        bool, typer.Option("--history/--no-history", help="Keep what is typed for the arrows of the next chat.")
    ] = True,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Chat with a pair, in turns; /help lists the commands.

    The cache is kept between turns, so a turn costs its own tokens only. Messages may come from a pipe: what is refused
    is told, the others are answered, and the exit code is not 0.
    """
    config = decoding.config()
    pair = load_pair(models, config)
    answers = Answers(pair, config, stream, stats, verbose, as_json)
    generator = make_generator(pair, config)
    conversation = Conversation(generator, system, think, answers)
    if verbose:
        show_notes(pair)
    if sys.stdin.isatty():
        console.note_plain("/help lists the commands, /exit or Ctrl-D ends.")
    code = _converse(conversation, history)
    say_of_memory(pair)
    if as_json:
        console.print_json({"turns": answers.turns})
    raise typer.Exit(code)


def _converse(conversation: "Conversation", history: bool) -> int:
    """Take messages until they end → the exit code."""
    try:
        for message in read_messages(history):
            if message in ("/exit", "/quit"):
                break
            conversation.take(message)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0 if sys.stdin.isatty() else conversation.refused  # in a terminal somebody could try again


@dataclass(frozen=True)
class Answers:
    """What is shown behind each answer, and the JSON form of all."""

    pair: "Pair"
    config: GenerationConfig
    stream: bool
    stats: bool
    verbose: bool
    as_json: bool
    turns: list[dict[str, Any]] = field(default_factory=list)

    def hear(self, text: str) -> None:
        """Show a piece of an answer as it comes, where that is wanted."""
        if self.stream and not self.as_json:
            console.stream_text(text)

    def show_stopped(self, text: str) -> None:
        """End the line of an answer that was stopped; what was written of it stays."""
        if not self.as_json:
            console.stream_text("\n" if self.stream else text + "\n")
        console.note_plain("(stopped)")

    def show(self, result: "GenerationResult", has_older: bool) -> None:
        """End the answer's line, and say what is to be said of it; `has_older`: whether other turns precede it."""
        self.turns.append(as_document(self.pair, self.config, result))
        if not self.as_json:
            console.stream_text("\n" if self.stream else result.text + "\n")
        if result.finish_reason == "length":
            advice = "/more goes on, -n sets the length"
            if len(result.token_ids) < self.config.max_new_tokens:
                advice = f"the context is full; {_make_room(has_older)}{', then /more goes on' * has_older}"
            console.note_plain(f"(cut after {len(result.token_ids)} tokens; {advice})")
        if self.stats:
            show_stats(self.pair, self.config, result)
        if self.verbose:
            from quasar_core.api import decoding

            console.note_plain(f"- {decoding.describe_threads()}")


class Conversation:
    """The messages so far, and the generator whose cache holds them; `answers` shows each answer."""

    def __init__(
        self,
        generator: "Generator",
        system: str | None,
        think: bool | None,
        answers: Answers,
    ) -> None:
        self._generator, self._think, self._answers = generator, think, answers
        self.refused = 0  # the exit code of what was refused first, where anything was
        self._commands: dict[str, Callable[[str], None]] = {
            "/drop": self.drop,
            "/help": lambda _: console.note_plain(HELP),
            "/load": self.load,
            "/more": lambda _: self.go_on(),
            "/reset": lambda _: self.reset(),
            "/save": self.save,
            "/stats": lambda _: self.show_stats(),
            "/system": self.set_system,
        }
        self._begin(system)

    def _begin(self, system: str | None) -> None:
        self._opening = [{"role": "system", "content": system}] if system is not None else []
        self.messages = list(self._opening)
        self._last: GenerationResult | None = None
        self._written: list[int] = []  # tokens of the last answer

    def take(self, text: str) -> None:
        """Carry out a command, or answer a message; what is refused is one sentence, and the chat goes on."""
        word, _, rest = text.partition(" ")
        try:
            if word in self._commands:
                self._commands[word](rest.strip())
            elif text.startswith("/") and not text.startswith("//"):
                raise UsageError(f"There is no command {word.split()[0]}: /help lists them, /{word} sends it as text.")
            else:
                self.answer(text.removeprefix("/"))
        except QuasarError as error:
            console.print_error(str(error))
            self.refused = self.refused or (2 if isinstance(error, UsageError) else 1)

    def reset(self) -> None:
        """Start anew: only the system message stays."""
        self.messages, self._last = list(self._opening), None
        self._generator.reset()
        console.note_plain("(the conversation is forgotten)")

    def drop(self, count: str) -> None:
        """Forget the oldest turns, so that what follows has room; the system message stays."""
        if not (count or "1").isdecimal() or int(count or 1) < 1:
            raise UsageError(f"/drop takes a number of turns, such as /drop 2, not {count}.")
        turns = [number for number, message in enumerate(self.messages) if message["role"] == "user"]
        dropped = int(count or 1)
        if dropped > len(turns):
            are = {0: "is no turn", 1: "is one turn"}.get(len(turns), f"are {len(turns)} turns")
            raise UsageError(f"There {are} to forget.")
        if dropped == len(turns):
            self.reset()
            return
        self.messages = [*self._opening, *self.messages[turns[dropped] :]]
        console.note_plain(f"(forgotten: {dropped} of {len(turns)} turns)")

    def set_system(self, text: str) -> None:
        """Start anew with another system message; without a text, print the present one."""
        if not text:
            console.note_plain(self._opening[0]["content"] if self._opening else "(there is no system message)")
            return
        self._begin(text)
        self._generator.reset()
        console.note_plain("(the system message is set, and the conversation starts anew)")

    def save(self, name: str) -> None:
        """Write the messages into a JSON file, which must not exist, in a folder that does."""
        if not name:
            raise UsageError("/save needs a file: /save FILE.")
        path = absolute(Path(name))
        if exists(path):
            raise UsageError(f"{name} exists already: name another file.")
        require_place(path / "in it" if name.endswith("/") else path, "file")
        write_json(path, {"model": self._generator.pair.target_name, "messages": self.messages})
        console.note_plain(f"(saved in {name})")

    def load(self, name: str) -> None:
        """Go on with the messages of a file that `save` wrote."""
        if not name:
            raise UsageError("/load needs a file: /load FILE.")
        messages = read_json(absolute(Path(name)), UsageError).get("messages")
        if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
            raise UsageError(f"{name} holds no conversation: /save writes one.")
        begins = bool(messages) and messages[0]["role"] == "system"
        self._begin(messages[0]["content"] if begins else None)
        self.messages = messages
        self._generator.reset()
        console.note_plain(f"({len(messages) - begins} messages of {name})")

    def show_stats(self) -> None:
        """Print the statistics of the last answer."""
        if self._last is None:
            stopped = self.messages != self._opening
            raise UsageError("The answer was stopped: it has no figures." if stopped else "There is no answer yet.")
        show_stats(self._generator.pair, self._generator.config, self._last)

    def answer(self, message: str) -> None:
        """Answer one message.

        A stopped answer stays in the conversation as far as it came; a message without an answer does not.
        """
        self._generate([*self.messages, {"role": "user", "content": message}], [], "")

    def go_on(self) -> None:
        """Generate the rest of an answer that was cut."""
        if self._last is None or self._last.finish_reason != "length":
            raise UsageError("There is no answer that was cut.")
        self._generate(self.messages[:-1], self._written, self.messages[-1]["content"])

    def _generate(self, asked: list[dict[str, str]], written: list[int], before: str) -> None:
        """Answer messages, behind what is written of the answer already: its tokens, and their text."""
        from quasar_core.api import decoding

        prompt_ids = [*decoding.encode_prompt(self._generator.pair.tokenizer, asked, think=self._think), *written]
        pieces: list[str] = []

        def hear(text: str) -> None:
            pieces.append(text)
            self._answers.hear(text)

        try:
            result = self._generator.generate(prompt_ids, hear)
        except ContextFull as error:
            raise UsageError(f"{error} In this chat {_make_room(_has_older_turns(asked))}.") from error
        except KeyboardInterrupt:
            # A pass may have been cut in the middle, so what the cache holds is not known.
            self._generator.reset()
            text = "".join(pieces)
            self.messages, self._last = [*asked, {"role": "assistant", "content": before + text}], None
            self._answers.show_stopped(text)
            if not sys.stdin.isatty():  # nobody is there to go on
                raise
            return
        self._last, self._written = result, [*written, *result.token_ids]
        self.messages = [*asked, {"role": "assistant", "content": before + result.text}]
        self._answers.show(result, _has_older_turns(asked))


def _has_older_turns(asked: list[dict[str, str]]) -> bool:
    """Whether turns precede the one that is asked for."""
    return sum(message["role"] == "user" for message in asked) > 1


def _make_room(has_older: bool) -> str:
    """What makes room in a full context."""
    return "/drop forgets the oldest turn, /reset all of them" if has_older else "/reset starts anew"


def _is_message(value: Any) -> bool:
    """Whether it has a role and a text, and nothing else."""
    is_pair = isinstance(value, dict) and value.keys() == {"role", "content"}
    return is_pair and value["role"] in ("system", "user", "assistant") and isinstance(value["content"], str)
