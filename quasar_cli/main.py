"""The entry point of `quasar`: its commands, and what becomes of an error."""

import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from quasar_cli.commands import bench, chat, doctor, generate, inspect, models, quantize
from quasar_cli.console import print_error, print_traceback
from quasar_cli.options import Reporting
from quasar_core.errors import QuasarError, UsageError

INTERRUPTED = 130

app = typer.Typer(
    name="quasar",
    help="Quantize a language model once, then generate with it fast.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)
app.command("quantize")(quantize.quantize)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.add_typer(bench.app, name="bench")
app.add_typer(models.app, name="models")
app.command("inspect")(inspect.inspect)
app.command("doctor")(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"quasar {version('quasar-cli')}")
        except PackageNotFoundError:
            typer.echo("quasar from a source tree that is not installed")
        raise typer.Exit


@app.callback()
def quasar(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Quantize a language model once, then generate with it fast."""


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
    # What it warns of is answered here in a sentence, or does not concern who types a command.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        _check_variables()
        app(arguments, prog_name="quasar")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        return _report(error)
    return 0


def _check_variables() -> None:
    """UsageError for a variable that the hub's client reads as a number while it is imported, where it is none."""
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        value = os.environ.get(name, "").strip()
        if value and not value.isdecimal():
            raise UsageError(f"{name} must be a whole number of seconds, not {value}.")


def _report(error: Exception) -> int:
    """One sentence on stderr, the traceback only with `-v`."""
    if Reporting.tracebacks:
        print_traceback(error)
    print_error(_sentence(error))
    return 2 if isinstance(error, UsageError) else 1


def _sentence(error: Exception) -> str:
    if isinstance(error, QuasarError):
        return str(error)
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


if __name__ == "__main__":
    main()
