"""`quasar bench steps`: what a pass of T tokens costs, against the floor."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from quasar_cli import console
from quasar_cli.commands.models import announce
from quasar_cli.options import Device, Dtype, Json, Kernel, Model, Threads, Verbose, Verifier, takes_groups, use_threads
from quasar_core import store
from quasar_core.config import Method, QuantizeConfig, default_codes
from quasar_core.errors import UsageError
from quasar_core.records import Progress

if TYPE_CHECKING:
    from quasar_core.bench.steps import Candidates, RandomShape, StepConfig, StepReport

_SHAPE = "Random weights"
_REFERENCES = ("none", "transformers")


@dataclass(frozen=True)
class Placement:
    """Which stored pair, where and how models run."""

    model: Model = None
    verifier: Verifier = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    kernel: Kernel = "auto"
    threads: Threads = "auto"


@dataclass(frozen=True)
class Timing:
    """The options that make a StepConfig, and what is timed beside the pair."""

    tokens: Annotated[str, typer.Option("--tokens", help="Lengths of the passes.")] = "1,2,4,6,8,12,16"
    context: Annotated[int, typer.Option("--context", help="Positions before a pass.")] = 256
    rounds: Annotated[int, typer.Option("--rounds", help="How often each pass is timed; the median counts.")] = 7
    reference: Annotated[
        str, typer.Option("--reference", help=f"What else is timed: {' or '.join(_REFERENCES)} (not compiled).")
    ] = "none"

    def config(self) -> "StepConfig":
        """The checked config; UsageError for a value that cannot be."""
        from quasar_core.bench.steps import StepConfig

        if self.reference not in _REFERENCES:
            raise UsageError(f"--reference must be {' or '.join(_REFERENCES)}, not {self.reference}.")
        parts = self.tokens.split(",")
        counts = tuple(int(part) for part in parts if part.strip().isdecimal())
        return StepConfig(counts if len(counts) == len(parts) else (), self.context, self.rounds)


@dataclass(frozen=True)
class RandomOptions:
    """Random weights of a shape instead of a stored pair."""

    shape: Annotated[
        str | None,
        typer.Option("--shape", help="qwen3-8b, -4b, -1.7b, -0.6b, llama3-8b, openpangu-7b.", rich_help_panel=_SHAPE),
    ] = None
    layers: Annotated[
        int | None, typer.Option("--layers", help="Fewer layers than the shape has.", rich_help_panel=_SHAPE)
    ] = None
    method: Annotated[
        str, typer.Option("--method", help="gptq, w8a8 or fp8: the verifier's codes.", rich_help_panel=_SHAPE)
    ] = "gptq"
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

    def parse(self) -> "RandomShape":
        """The checked shape; UsageError for a value that cannot be."""
        from quasar_core.bench.steps import RandomShape

        bits, group_size = default_codes(self.method)
        codes = QuantizeConfig(
            method=cast(Method, self.method),
            bits=bits if self.bits is None else self.bits,
            group_size=group_size if self.group_size is None else self.group_size,
            lm_head_bits=self.lm_head_bits,
        )
        return RandomShape(self.shape or "", self.layers, codes)


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
    config = timing.config()
    use_threads(placement.threads)
    if plot is not None:
        from quasar_core.bench.plots import new_figure

        new_figure(plot, "--plot")  # refused before minutes of timing, not after
    from quasar_core.bench.steps import measure_steps, refuse_foreign_report

    if output is not None:
        refuse_foreign_report(output)
    with console.progress_bar() as progress:
        candidates = _gather(placement, random, timing.reference != "none", progress)
        report = measure_steps(candidates, config, progress)
    if output is not None:
        report.write(output)
    if plot is not None:
        from quasar_core.bench.plots import draw_steps

        draw_steps(report, plot)
    if verbose:
        for line in candidates.notes:
            console.note_plain(f"- {line}")
    _present(report, markdown, as_json)


def _gather(placement: Placement, random: RandomOptions, with_reference: bool, progress: Progress) -> "Candidates":
    """The models of --shape, or of --model, or of the current pair."""
    from quasar_core.bench.steps import pair_candidates, random_candidates

    place: dict[str, Any] = {"device": placement.device, "dtype": placement.dtype, "kernel": placement.kernel}
    if random.shape is not None:
        if placement.model is not None:
            raise UsageError("--shape makes a model of its own: leave out --model.")
        return random_candidates(random.parse(), with_reference=with_reference, progress=progress, **place)
    announce(placement.model)
    from quasar_core import api

    pair = api.load_pair(placement.model, placement.verifier, progress=progress, **place)
    return pair_candidates(pair, _target_folder(placement.model) if with_reference else None)


def _target_folder(model: str | None) -> Path:
    """Of the model named, or of the current pair, which is known to exist once it is loaded."""
    current = store.current_pair()
    name = model or (current.target if current else "")
    return store.resolve_model(name).folder


def _present(report: "StepReport", markdown: bool, as_json: bool) -> None:
    from quasar_cli.render import bench as tables
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
