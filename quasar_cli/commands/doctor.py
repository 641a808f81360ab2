"""`quasar doctor`: what this machine can do, and why."""

from typing import Annotated

import typer

from quasar_cli import console
from quasar_cli.help import examples
from quasar_cli.options import Json, Threads, Verbose, use_threads

EXAMPLES = examples("quasar doctor", "quasar doctor --remeasure", "quasar doctor --json")


def doctor(
    remeasure: Annotated[
        bool, typer.Option("--remeasure", help="Measure kernels and the current pair's passes again, and keep that.")
    ] = False,
    threads: Threads = "auto",
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Check this machine: versions, processor, memory and its bandwidth, GPU, kernels, the current pair."""
    use_threads(threads)
    from quasar_core.api import measuring

    with console.progress_bar() as progress:
        findings = measuring.doctor(remeasure, progress)
    if as_json:
        console.print_json(findings)
        return

    from quasar_cli.render.doctor import findings_tables

    console.show(*findings_tables(findings))
