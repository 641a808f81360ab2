"""The entry point of `quasar`: its commands, and how errors are shown."""

import errno
import io
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any

import typer

from quasar_cli import INTERRUPTED
from quasar_cli.commands import bench, chat, deploy, doctor, generate, inspect, models, quantize, serve
from quasar_cli.console import print_error, print_traceback
from quasar_cli.help import TYPED, Command, Group, examples
from quasar_cli.options import Reporting
from quasar_core.errors import QuasarError, UsageError
from quasar_core.openmp import sleep_soon

app = typer.Typer(
    name="quasar",
    cls=Group,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "quasar quantize Qwen/Qwen3-0.6B",
        "quasar generate 'Why is the sky blue?'",
        "quasar generate --help",
        "quasar --install-completion",
    ),
)
app.command("quantize", cls=Command, epilog=quantize.EXAMPLES)(quantize.quantize)
app.command("generate", cls=Command, epilog=generate.EXAMPLES)(generate.generate)
app.command("chat", cls=Command, epilog=chat.EXAMPLES)(chat.chat)
app.command("serve", cls=Command, epilog=serve.EXAMPLES)(serve.serve)
app.command("deploy", cls=Command, epilog=deploy.EXAMPLES)(deploy.deploy)
app.add_typer(bench.app, name="bench")
app.add_typer(models.app, name="models")
app.command("inspect", cls=Command, epilog=inspect.EXAMPLES)(inspect.inspect)
app.command("doctor", cls=Command, epilog=doctor.EXAMPLES)(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        from quasar_core import __version__

        typer.echo(f"quasar {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def quasar(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Quantize a language model once, then generate with it fast."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Run the command line and exit."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started the process
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115 - until the end
    sys.exit(run())


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    Reporting.tracebacks = False
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a character gets a ? for it
            stream.reconfigure(errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper):  # bytes that are no text are refused where the text is used
        with suppress(io.UnsupportedOperation):  # an earlier run in this process has read it, with this
            sys.stdin.reconfigure(errors="surrogateescape")
    # What it warns of is answered here in a sentence, or does not concern who types a command.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sleep_soon()
    try:
        _check_variables()
        ended = app(arguments, prog_name="quasar", standalone_mode=False)
        return ended if isinstance(ended, int) else 0
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        return _report(error)


def _check_variables() -> None:
    """UsageError for a variable that is no number, where a library reads it as one while it is imported."""
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        value = os.environ.get(name, "").strip()
        if value and not value.isdecimal():
            raise UsageError(f"{name} must be a whole number of seconds, not {value}.")
    threads = os.environ.get("OMP_NUM_THREADS", "").strip()
    if threads and not re.fullmatch(r"0*[1-9]\d*(\s*,\s*0*[1-9]\d*)*", threads):
        raise UsageError(f"OMP_NUM_THREADS must be a number of threads, not {threads}.")


def _report(error: Exception) -> int:
    """One sentence on stderr, the traceback only with `-v`."""
    if Reporting.tracebacks:
        print_traceback(error)
    print_error(_sentence(error))
    return 2 if isinstance(error, UsageError) or _is_of_click(error) else 1


def _is_of_click(error: Exception) -> bool:
    """Whether typer refuses what was typed; later versions carry click inside, so its class has no one name."""
    return hasattr(error, "format_message") and hasattr(error, "ctx")


def _sentence(error: Exception) -> str:
    if isinstance(error, QuasarError):
        return str(error)
    if _is_of_click(error):
        return _refusal(error)
    # Named, not imported: torch may not have been loaded at all.
    if type(error).__name__ == "OutOfMemoryError":
        return (
            "The GPU's memory is too small for this: try a shorter context (--max-context), the verifier alone "
            "(--verify quantized --no-target), best made with --lm-head-bits 4, or --device cpu."
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
        return f"The output cannot be written: {error.strerror}."
    if isinstance(error, MemoryError):
        return "This machine's memory is too small for this: try a smaller model or a shorter context."
    what = " ".join(str(error).split())
    return f"Internal error: {type(error).__name__}: {what}; run again with -v and report it."


# What click says of a value that is no number, and what later versions of typer say.
_NUMBER = re.compile(
    r"(?P<flag>--\S+): (?:'(?P<value>.*)' is not a valid|Input should be a valid) (?P<kind>integer|float|number)\b"
)


def _refusal(error: Any) -> str:
    """Click's sentence in our style: one line that begins with the flag, and where to read on."""
    sentence = " ".join(error.format_message().split()).rstrip(".")
    sentence = re.sub(r"^Invalid value for '([^']+)'(?: / '[^']+')*: (?:Value error, )?", r"\1: ", sentence)
    if choice := re.match(r"(\S+): '(.*)' is not one of (.*)", sentence):
        flag, value, choices = choice.groups()
        return f"{flag} must be one of {choices.replace(chr(39), '')}, not {value}."
    if (number := _NUMBER.match(sentence)) and error.ctx:
        wanted = "a whole number" if number["kind"] == "integer" else "a number"
        name = number["flag"].removeprefix("--").replace("-", "_")
        typed = error.ctx.meta.get(TYPED, {}).get(name, number["value"])
        return f"{number['flag']} must be {wanted}{'' if typed is None else f', not {typed}'}."
    command = error.ctx.command_path if error.ctx else "quasar"
    return f"{sentence}; see {command} --help."
