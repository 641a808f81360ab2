"""`quasar generate`: one prompt, one answer."""

import gc
import os
import stat
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quasar_cli import INTERRUPTED, console
from quasar_cli.commands.models import announce
from quasar_cli.help import examples
from quasar_cli.option_groups import DecodeOptions, ModelOptions, takes_groups
from quasar_cli.options import Json, ShowStats, Stream, System, Think, Trace, Verbose, use_threads
from quasar_core.config import GenerationConfig
from quasar_core.errors import UsageError, reason
from quasar_core.files import BYTE_ORDER_MARK, read_text, require_characters

if TYPE_CHECKING:
    from quasar_core import trace as api_trace
    from quasar_core.api.decoding import Encode, Generator, Pair
    from quasar_core.records import GenerationResult

EXAMPLES = examples(
    "quasar generate 'Why is the sky blue?'",
    "git diff | quasar generate --system 'Review this.'",
    "quasar generate -f prompt.txt -n 512 --json",
    "quasar generate --raw 'def fibonacci(' --no-stats",
    "quasar generate --trace 'Count to ten.'",
)


@takes_groups
def generate(
    text: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The prompt; without one, what is piped in.")
    ] = None,
    *,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="The prompt, or - for standard input.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", "-f", metavar="FILE", help="A file that holds the prompt.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat/--raw", help="Through the chat template, or the text as it is.")] = True,
    system: System = None,
    think: Think = None,
    prediction: Annotated[
        Path | None,
        typer.Option(
            "--prediction", metavar="FILE", help="The text that is expected, such as the file before an edit."
        ),
    ] = None,
    decoding: DecodeOptions,
    models: ModelOptions,
    stream: Stream = True,
    show_unconfirmed: Annotated[
        bool,
        typer.Option(
            "--show-unconfirmed", help="In a terminal: show what waits for the full-precision model's word, dimmed."
        ),
    ] = False,
    stats: ShowStats = True,
    trace: Trace = None,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Generate text with a pair: quantize once, then generate fast.

    The answer goes to stdout as it comes; what it gained goes to stderr after it.
    """
    config = replace(decoding.config(), prediction=_read_prediction(prediction) if prediction else "")
    asked = read_prompt(text, prompt, prompt_file)
    if system is not None and not chat:
        raise UsageError("--system is part of the chat template; leave --raw out, or put the text into the prompt.")
    trace_file = _trace_file(trace)
    _refuse_what_cannot_be_drawn(trace == "-", show_unconfirmed, stream, as_json)

    from quasar_core.api.decoding import encode_prompt, trace_of, write_trace

    messages = asked if system is None else conversation(system, asked)
    encode = cache(partial(encode_prompt, messages=messages, raw=not chat, think=think))
    pair = load_pair(models, config, encode)
    prompt_ids = encode(pair.tokenizer)
    generator = make_generator(pair, config)
    coloured = trace == "-" and not as_json
    streamed = stream and not as_json and not coloured
    result = _generate(generator, prompt_ids, streamed, show_unconfirmed, as_json)
    if coloured:
        show_trace(trace_of(pair, config, result, asked))
    elif as_json:
        console.print_json(as_document(pair, config, result))
    else:
        console.stream_text("\n" if streamed else result.text + "\n")
    if trace_file is not None:  # behind the answer, which is not lost where the file cannot be written
        write_trace(trace_of(pair, config, result, asked), trace_file)
    if verbose:
        show_notes(pair)
    else:
        say_of_memory(pair)
    if stats:
        show_stats(pair, config, result)


def _refuse_what_cannot_be_drawn(coloured: bool, dimmed: bool, stream: bool, as_json: bool) -> None:
    """UsageError for a trace or unconfirmed text that no terminal would show."""
    if coloured and as_json:
        raise UsageError("--trace draws in the terminal: with --json, name a file for it.")
    if dimmed and not (console.has_colours() and stream and not as_json and not coloured):
        raise UsageError("--show-unconfirmed draws in a terminal: not with --json, --no-stream, --trace or a pipe.")


def _generate(
    generator: "Generator", prompt_ids: list[int], streamed: bool, dimmed: bool, as_json: bool
) -> "GenerationResult":
    """Generate, and show the text as it comes where it is `streamed`, with `dimmed` what waits for a confirm too.

    Ctrl-C ends the command; what was written by then stays, or is printed, unless it was to be one JSON document.
    """
    written: list[str] = []
    show: Callable[[str], None] = console.stream_text if streamed else lambda text: None
    answering: dict[str, Any] = {}
    if dimmed:
        from quasar_cli.render.unconfirmed import Unconfirmed
        from quasar_core.api import decoding

        tokenizer = generator.pair.tokenizer
        shown = Unconfirmed(console.stream_text, lambda tokens: str(tokenizer.decode(list(tokens))))
        show, answering = shown.add, {"answering": decoding.Answering(waiting=shown.show)}

    def hear(text: str) -> None:
        written.append(text)
        show(text)

    try:
        return generator.generate(prompt_ids, hear, **answering)
    except KeyboardInterrupt:
        show("")  # clears what was dimmed
        if written and not as_json:
            console.stream_text("\n" if streamed else "".join(written) + "\n")
        console.note_plain("(stopped)")
        raise typer.Exit(INTERRUPTED) from None


def _read_prediction(path: Path) -> str:
    """The text that is expected; UsageError where there is none."""
    text = read_text(path, kind=UsageError)
    if not text.strip():
        raise UsageError(f"--prediction: {path} holds no text.")
    return text


def _trace_file(trace: str | None) -> Path | None:
    """The file that --trace names, if any; UsageError, before any work, where another program's stands there."""
    if trace in (None, "-"):
        return None
    from quasar_core.api import decoding

    path = Path(str(trace))
    if path.suffix != ".json":
        raise UsageError(f"--trace must be a .json file, not {trace}.")
    decoding.refuse_foreign_trace(path)
    return path


def show_trace(trace: "api_trace.Trace") -> None:
    """Print an answer on stdout coloured by who made each token, and the legend on stderr."""
    from quasar_cli.render import trace as render

    console.show(render.coloured(trace) if console.has_colours() else render.bracketed(trace))
    console.note(render.legend(trace, console.has_colours()))


def read_prompt(argument: str | None, prompt: str | None, prompt_file: Path | None) -> str:
    """The prompt's text from the one place that was named, else from a pipe; UsageError for none, two, or an empty one.

    What a pipe or a file ends with is part of the prompt, but for one line break, which `echo` and editors put there.
    """
    given = [place for place in (argument, prompt, prompt_file) if place is not None]
    if len(given) > 1:
        raise UsageError("Give the prompt once: as PROMPT, with --prompt, with --prompt-file, or through a pipe.")
    if given not in ([], ["-"]) and prompt_file is None and _is_piped():
        console.note_plain(
            "note: what comes through the pipe is not read, as the prompt is given; `-` in its place reads it"
        )
    if prompt_file is not None:
        text = _read_pipe(prompt_file) if _is_own_pipe(prompt_file) else read_text(prompt_file, kind=UsageError)
        text = text.removesuffix("\n")
    else:
        text = _read_stdin() if given in ([], ["-"]) else str(given[0])
    require_characters(text, "The prompt")
    if not text.strip():
        raise UsageError("The prompt is empty.")
    return text


def _read_stdin() -> str:
    if sys.stdin.isatty():
        raise UsageError("Give a prompt: quasar generate 'PROMPT', --prompt-file FILE, or through a pipe.")
    return sys.stdin.read().removeprefix(BYTE_ORDER_MARK).removesuffix("\n")


def _is_piped() -> bool:
    """Whether a command writes to stdin."""
    try:
        return stat.S_ISFIFO(os.fstat(sys.stdin.fileno()).st_mode)
    except (OSError, ValueError, AttributeError):  # closed, or no file
        return False


def _is_own_pipe(path: Path) -> bool:
    """Whether the shell opened it for this process, as for `<(command)`: unlike a pipe in a folder, it has an end."""
    return str(path).startswith(("/dev/fd/", "/dev/stdin", "/proc/self/fd/"))


def _read_pipe(path: Path) -> str:
    try:
        return path.read_text("utf-8").removeprefix(BYTE_ORDER_MARK)
    except (OSError, ValueError) as error:
        raise UsageError(f"--prompt-file {path} cannot be read: {reason(error)}.") from error


def conversation(system: str | None, text: str) -> list[dict[str, str]]:
    """The messages of a first turn."""
    first = [{"role": "system", "content": system}] if system is not None else []
    return [*first, {"role": "user", "content": text}]


def load_pair(models: ModelOptions, config: GenerationConfig, encode: "Encode | None" = None) -> "Pair":
    """Load what the options name, with a progress bar; a prompt that `encode` finds too long is refused first."""
    use_threads(models.threads, steer=True)
    announce(models.model)
    refuse_idle_assistant(models.assistant, config)
    from quasar_core.api import decoding

    if config.draft_from:
        decoding.read_texts(config.draft_from)  # what is no text is found before the pair is loaded, not after
    with console.progress_bar() as progress:
        pair = decoding.load(models.to_load(config.verify, config.draft), progress, encode)
    end_loading(pair, models)
    return pair


def make_generator(pair: "Pair", config: GenerationConfig) -> "Generator":
    """Prepare to generate, with a progress bar; what it says of streamed weights is said before it begins."""
    from quasar_core.api import decoding

    known = len(pair.notes)
    with console.progress_bar() as progress:
        generator = decoding.Generator(pair, config, progress=progress)
    _say(pair.notes[known:], "offload:")
    return generator


def refuse_idle_assistant(assistant: str | None, config: GenerationConfig) -> None:
    """UsageError for an assistant that nothing asks: loading it would take memory for nothing."""
    if assistant is not None and config.draft != "assistant":
        raise UsageError(f"--assistant goes with --draft assistant, not with --draft {config.draft}.")
    if assistant is None and config.draft == "assistant":
        raise UsageError("--draft assistant needs --assistant MODEL, a small model of the same vocabulary.")


def end_loading(pair: "Pair", models: ModelOptions) -> None:
    """Print on stderr what --check-digest found, since it was asked for, and what is not as one would expect.

    That is a context that was cut, and what makes it slow: no C++, streaming.

    Python's collector leaves alone what is there by now: looking through all of PyTorch takes a quarter of a second, in
    the midst of an answer.
    """
    gc.freeze()
    if models.check_digest:
        _say(pair.notes, "digest:")
    _say(pair.notes, ("context: cut", "kernels:", "offload:"))


def say_of_memory(pair: "Pair") -> None:
    """Print on stderr why answers of --draft-memory were not read or not kept, where that is so."""
    _say(pair.notes, ("draft memory: not kept", "draft memory: begun anew"))


def _say(notes: Sequence[str], kind: str | tuple[str, ...]) -> None:
    for note in notes:
        if note.startswith(kind):
            console.note_plain(note)


def as_document(pair: "Pair", config: GenerationConfig, result: "GenerationResult") -> dict[str, Any]:
    """The JSON form of one answer; in `quantized` mode, which is not lossless, with the measured agreement."""
    document: dict[str, Any] = {
        "model": pair.target_name,
        "verifier": pair.verifier_name,
        "verify": config.verify,
        "verified_by": result.verified_by,
        "draft": config.draft,
        "prompt_token_ids": list(result.prompt_token_ids),
        "token_ids": list(result.token_ids),
        "text": result.text,
        "finish_reason": result.finish_reason,
        "stats": result.stats.to_dict(),
    }
    if config.verify == "quantized":
        document["agreement"] = pair.fidelity.agreement if pair.fidelity else None
    return document


def show_notes(pair: "Pair") -> None:
    """Print on stderr what was chosen while loading, and why, and how many threads compute now."""
    from quasar_core.api import decoding

    for line in [*pair.notes, decoding.describe_threads()]:
        console.note_plain(f"- {line}")


def show_stats(pair: "Pair", config: GenerationConfig, result: "GenerationResult") -> None:
    """Print on stderr what an answer gained, and what it may have lost."""
    from quasar_cli.render.generation import promise, stats_table

    console.note(stats_table(result, config), promise(pair.fidelity, config, pair.rounds_alike))
