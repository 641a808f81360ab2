"""`quasar inspect`: what a verifier checkpoint holds and how faithful it is."""

from pathlib import Path
from typing import Annotated

import typer

from quasar_cli import console
from quasar_cli.help import examples
from quasar_cli.options import Device, Json, Threads, TrustRemoteCode, Verbose, use_threads
from quasar_core.errors import UsageError

EXAMPLES = examples(
    "quasar inspect",
    "quasar inspect Qwen3-0.6B-gptq-4bit-g128 --verify",
    "quasar inspect --plot fidelity.png",
    "quasar inspect FOLDER --against MODEL --text notes.txt",
)


def inspect(
    checkpoint: Annotated[
        str | None,
        typer.Argument(metavar="CHECKPOINT", help="A verifier's folder or a pair's name; default: the current pair."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="MODEL", help="Measure fidelity to this model, on --text; any checkpoint."),
    ] = None,
    text: Annotated[
        str | None, typer.Option("--text", metavar="FILE", help="A text or JSONL file, generic, wikitext2 or c4.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw fidelity into a PNG or SVG (needs matplotlib).")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all weights, and say whether they are as quantize wrote them.")
    ] = False,
    device: Device = "auto",
    threads: Threads = "auto",
    trust_remote_code: TrustRemoteCode = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint holds and how faithful it is; with --against and --text, measure it on a text."""
    if (against is None) != (text is None):
        raise UsageError("--against MODEL and --text FILE go together.")
    use_threads(threads)
    from quasar_core.api import measuring

    if plot is not None:
        measuring.new_figure(plot, "--plot")  # refused before minutes of measuring, not after
    with console.progress_bar() as progress:
        description = measuring.inspect(
            checkpoint,
            against=against,
            text=text,
            verify=verify,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if plot is not None:
        measuring.draw_fidelity(description, plot)
        console.note_plain(f"Drawn into {plot}.")
    if as_json:
        console.print_json(description)
        return

    from quasar_cli.render.doctor import speed_tables
    from quasar_cli.render.quantize import inspection_tables

    console.show(*inspection_tables(description, verbose), *speed_tables(description["speed"]))
    if "measured" in description:
        from quasar_cli.render.fidelity import measured_tables

        console.show(*measured_tables(description["measured"]))
