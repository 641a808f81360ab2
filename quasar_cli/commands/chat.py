"""`quasar chat`: turns over one cache."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quasar_cli import console
from quasar_cli.commands.generate import as_document, load_pair, make_generator, say_of_memory, show_notes, show_stats
from quasar_cli.help import examples
from quasar_cli.messages import read_messages
from quasar_cli.option_groups import DecodeOptions, ModelOptions, takes_groups
from quasar_cli.options import Json, MaxNewTokens, ShowStats, Stream, System, Think, Verbose
from quasar_core.config import GenerationConfig
from quasar_core.errors import QuasarError, UsageError
from quasar_core.files import absolute, exists, read_json, require_place, write_json

if TYPE_CHECKING:
    from quasar_core.api import Generator, Pair
    from quasar_core.records import GenerationResult

EXAMPLES = examples(
    "quasar chat",
    "quasar chat --system 'Answer in one sentence.'",
    "quasar chat --model Qwen3-0.6B --stats",
)
HELP = r"""/more         go on with an answer that was cut
/system TEXT  set the system message, and start anew
/save FILE    write the conversation into a JSON file
/load FILE    go on with a conversation that was saved
/stats        tell what the last answer gained
/reset        forget the conversation
/help         print this
/exit         end, as Ctrl-D does; Ctrl-C stops an answer, or drops a line
A pasted text is one message. A line that ends in \ goes on in the
next; so do lines between two times three double quotes.
// at the beginning sends a message that begins with /"""


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
    conversation = Conversation(generator, system, think, stream and not as_json, answers.show)
    if verbose:
        show_notes(pair)
    if sys.stdin.isatty():
        console.note_plain("/help lists the commands, /exit or Ctrl-D ends.")
    for message in read_messages(history):
        if message in ("/exit", "/quit"):
            break
        conversation.take(message)
    say_of_memory(pair)
    if as_json:
        console.print_json({"turns": answers.turns})
    if conversation.refused and not sys.stdin.isatty():  # nobody was there to try again
        raise typer.Exit(conversation.refused)


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

    def show(self, result: "GenerationResult") -> None:
        """End the answer's line, and say what is to be said of it."""
        self.turns.append(as_document(self.pair, self.config, result))
        if not self.as_json:
            console.stream_text("\n" if self.stream else result.text + "\n")
        if result.finish_reason == "length":
            console.note_plain(f"(cut after {len(result.token_ids)} tokens; /more goes on, -n sets the length)")
        if self.stats:
            show_stats(self.pair, self.config, result)
        if self.verbose:
            from quasar_core import api

            console.note_plain(f"- {api.describe_threads()}")


class Conversation:
    """The messages so far, and the generator whose cache holds them; each answer is handed to `present`."""

    def __init__(
        self,
        generator: "Generator",
        system: str | None,
        think: bool | None,
        stream: bool,
        present: Callable[["GenerationResult"], None],
    ) -> None:
        self._generator, self._think, self._stream, self._present = generator, think, stream, present
        self.refused = 0  # the exit code of what was refused first, where anything was
        self._commands: dict[str, Callable[[str], None]] = {
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
        """Print what the last answer gained."""
        if self._last is None:
            stopped = self.messages != self._opening
            raise UsageError("The answer was stopped: it has no figures." if stopped else "There is no answer yet.")
        show_stats(self._generator.pair, self._generator.config, self._last)

    def answer(self, message: str) -> None:
        """Answer one message.

        A stopped answer stays in the conversation as far as it came; a message without an answer does not.
        """
        from quasar_core import api

        asked = [*self.messages, {"role": "user", "content": message}]
        prompt_ids = api.encode_prompt(self._generator.pair.tokenizer, asked, think=self._think)
        self._generate(prompt_ids, asked, "")

    def go_on(self) -> None:
        """Generate the rest of an answer that was cut."""
        if self._last is None or self._last.finish_reason != "length":
            raise UsageError("There is no answer that was cut.")
        prompt_ids = [*self._last.prompt_token_ids, *self._last.token_ids]
        self._generate(prompt_ids, self.messages[:-1], self.messages[-1]["content"])

    def _generate(self, prompt_ids: list[int], asked: list[dict[str, str]], before: str) -> None:
        pieces: list[str] = [before]
        try:
            self._last = self._generator.generate(prompt_ids, lambda text: self._hear(text, pieces))
        except UsageError as error:
            raise UsageError(f"{error} /reset starts a new conversation.") from error
        except KeyboardInterrupt:
            # A pass may have been cut in the middle, so what the cache holds is not known.
            self._generator.reset()
            console.note_plain("\n(stopped)")
            self.messages, self._last = [*asked, {"role": "assistant", "content": "".join(pieces)}], None
            return
        self.messages = [*asked, {"role": "assistant", "content": before + self._last.text}]
        self._present(self._last)

    def _hear(self, text: str, pieces: list[str]) -> None:
        pieces.append(text)
        if self._stream:
            console.stream_text(text)


def _is_message(value: Any) -> bool:
    """Whether it has a role and a text, and nothing else."""
    is_pair = isinstance(value, dict) and value.keys() == {"role", "content"}
    return is_pair and value["role"] in ("system", "user", "assistant") and isinstance(value["content"], str)
