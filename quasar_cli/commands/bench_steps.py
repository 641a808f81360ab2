"""`quasar bench steps`: what a pass of T tokens costs, against the floor."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from quasar_cli import console
from quasar_cli.commands.models import announce
from quasar_cli.help import examples
from quasar_cli.option_groups import takes_groups
from quasar_cli.options import Device, Fast, Json, Kernel, Model, Precision, Threads, Verbose, Verifier, use_threads
from quasar_core.config import LoadOptions, Method, QuantizeConfig, default_codes
from quasar_core.errors import UsageError

if TYPE_CHECKING:
    from quasar_core.api.measuring import RandomShape, StepConfig, StepReport

_SHAPE = "Random weights"
EXAMPLES = examples(
    "quasar bench steps --model demo --plot steps.png",
    "quasar bench steps --shape qwen3-8b --layers 2",
)


@dataclass(frozen=True)
class Placement:
    """Which stored pair, where and how models run."""

    model: Model = None
    verifier: Verifier = None
    device: Device = "auto"
    dtype: Precision = "auto"
    kernel: Kernel = "auto"
    fast: Fast = False
    threads: Threads = "auto"

    def to_load(self) -> LoadOptions:
        """The pair, with both its models."""
        return LoadOptions(
            self.model, self.verifier, device=self.device, dtype=self.dtype, kernel=self.kernel, fast=self.fast
        )


@dataclass(frozen=True)
class Timing:
    """The options that make a StepConfig, and what is timed beside the pair."""

    tokens: Annotated[str, typer.Option("--tokens", help="Lengths of the passes.")] = "1,2,4,6,8,12,16"
    context: Annotated[int, typer.Option("--context", help="Positions before a pass.")] = 256
    rounds: Annotated[int, typer.Option("--rounds", help="How often each pass is timed; the median counts.")] = 7
    reference: Annotated[
        Literal["none", "transformers"], typer.Option("--reference", help="What else is timed (not compiled).")
    ] = "none"

    def config(self) -> "StepConfig":
        """The checked config; UsageError for a value that cannot be."""
        from quasar_core.api.measuring import StepConfig

        parts = self.tokens.split(",")
        counts = tuple(int(part) for part in parts if part.strip().isdecimal())
        return StepConfig(counts if len(counts) == len(parts) else (), self.context, self.rounds)


@dataclass(frozen=True)
class RandomOptions:
    """Random weights of a shape instead of a stored pair."""

    shape: Annotated[
        str | None,
        typer.Option(
            "--shape",
            metavar="NAME",
            help="qwen3-8b, -4b, -1.7b, -0.6b, llama3-8b, openpangu-7b.",
            rich_help_panel=_SHAPE,
        ),
    ] = None
    layers: Annotated[
        int | None, typer.Option("--layers", help="Fewer layers than the shape has.", rich_help_panel=_SHAPE)
    ] = None
    method: Annotated[Method, typer.Option("--method", help="The verifier's codes.", rich_help_panel=_SHAPE)] = "gptq"
    bits: Annotated[
        int | None, typer.Option("--bits", help="Of the verifier's codes; default: 4.", rich_help_panel=_SHAPE)
    ] = None
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size", help="Inputs that share a scale, -1 for all; by default 128.", rich_help_panel=_SHAPE
        ),
    ] = None
    lm_head_bits: Annotated[
        int, typer.Option("--lm-head-bits", help="Of the verifier's head.", rich_help_panel=_SHAPE)
    ] = 16

    def parse(self) -> "RandomShape | None":
        """The checked shape, if one is asked for; UsageError for a value that cannot be."""
        if self.shape is None:
            return None
        from quasar_core.api.measuring import RandomShape

        bits, group_size = default_codes(self.method)
        codes = QuantizeConfig(
            method=self.method,
            bits=bits if self.bits is None else self.bits,
            group_size=group_size if self.group_size is None else self.group_size,
            lm_head_bits=self.lm_head_bits,
        )
        return RandomShape(self.shape, self.layers, codes)


@takes_groups
def steps(
    placement: Placement,
    timing: Timing,
    random: RandomOptions,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A JSON file of everything measured.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="A PNG or SVG file.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Time the passes of target and verifier over T tokens, and compare them with the floor.

    The floor is the bytes that a pass must read ÷ the bandwidth measured in the same run, before and after.
    """
    config, shape = timing.config(), random.parse()
    if shape is not None and placement.model is not None:
        raise UsageError("--shape makes a model of its own: leave out --model.")
    use_threads(placement.threads)
    announce(placement.model)
    from quasar_core.api import measuring

    if plot is not None:
        measuring.new_figure(plot, "--plot")  # refused before minutes of timing, not after
    if output is not None:
        measuring.refuse_foreign_report(output)
    with console.progress_bar() as progress:
        report, notes = measuring.bench_steps(placement.to_load(), config, shape, timing.reference != "none", progress)
    if output is not None:
        report.write(output)
    if plot is not None:
        measuring.draw_steps(report, plot)
    if verbose:
        for line in notes:
            console.note_plain(f"- {line}")
    _present(report, markdown, as_json)


def _present(report: "StepReport", markdown: bool, as_json: bool) -> None:
    from quasar_cli.render import grids as tables
    from quasar_cli.render import steps as render

    if as_json:
        console.print_json(report.to_dict())
        return
    grids = render.step_grids(report)
    if markdown:
        console.stream_text("\n".join(tables.as_markdown(grid) for grid in grids))
    else:
        console.show(*map(tables.as_table, grids))
    console.note_plain(f"{render.LEGEND}\n{render.describe_run(report)}.")
