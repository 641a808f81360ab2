"""The entry point of `quasar`: its commands, and what becomes of an error."""

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
        from importlib.metadata import version

        typer.echo(f"quasar {version('quasar-cli')}")
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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a character gets a ? for it
            stream.reconfigure(errors="replace")
    sys.exit(run())


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    Reporting.tracebacks = False
    # What it warns of is answered here in a sentence, or does not concern who types a command.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app(arguments, prog_name="quasar")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        return _report(error)
    return 0


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
    if isinstance(error, MemoryError):
        return "This machine's memory is too small for this: try a smaller model or a shorter context."
    what = " ".join(str(error).split())
    return f"Something unforeseen failed ({type(error).__name__}: {what}); run the command again with -v for details."


if __name__ == "__main__":
    main()
