"""`quasar quantize`: write a model's low-bit copy, once."""

from dataclasses import asdict, dataclass
from typing import Annotated, Literal, cast

import typer

from quasar_cli import console
from quasar_cli.commands.models import announce
from quasar_cli.options import Device, Folder, Json, TrustRemoteCode, Verbose, takes_groups
from quasar_core.config import QuantizeConfig

_CALIBRATION = "Calibration"


@dataclass(frozen=True)
class QuantizeOptions:
    """The options that make a QuantizeConfig."""

    bits: Annotated[int, typer.Option("--bits", "-b", help="Bits of a weight: 2, 3, 4 or 8.")] = 4
    group_size: Annotated[
        int, typer.Option("--group-size", help="Weights that share a scale: 32, 64, 128, or -1 for a whole row.")
    ] = 128
    sym: Annotated[bool, typer.Option("--sym/--no-sym", help="Codes symmetric around zero, or with a zero point.")] = (
        True
    )
    act_order: Annotated[
        bool, typer.Option("--act-order/--no-act-order", help="Quantize the most active inputs first.")
    ] = True
    method: Annotated[str, typer.Option("--method", help="gptq.")] = "gptq"
    lm_head_bits: Annotated[int, typer.Option("--lm-head-bits", help="Bits of the output head; 16 leaves it.")] = 16
    calibration: Annotated[
        str,
        typer.Option(
            "--calibration",
            help="self (the model's own text), a text or JSONL file, wikitext2 or c4.",
            rich_help_panel=_CALIBRATION,
        ),
    ] = "self"
    samples: Annotated[int, typer.Option("--samples", help="Calibration texts.", rich_help_panel=_CALIBRATION)] = 128
    seq_len: Annotated[
        int | None,
        typer.Option(
            "--seq-len", help="Tokens of a text; default: 512 for self, else 2048.", rich_help_panel=_CALIBRATION
        ),
    ] = None
    damp: Annotated[float, typer.Option("--damp", help="Damping, as a share of the Hessian's mean diagonal.")] = 0.05
    seed: Annotated[int, typer.Option("--seed", help="Fixes the calibration text.", rich_help_panel=_CALIBRATION)] = 0
    backend: Annotated[str, typer.Option("--backend", help="native, or optimum (needs the extra gptqmodel).")] = (
        "native"
    )

    def config(self) -> QuantizeConfig:
        """The checked config; UsageError for a value that cannot be."""
        return QuantizeConfig(
            bits=self.bits,
            group_size=self.group_size,
            sym=self.sym,
            act_order=self.act_order,
            method=cast(Literal["gptq"], self.method),
            lm_head_bits=self.lm_head_bits,
            calibration=self.calibration,
            samples=self.samples,
            seq_len=self.seq_len,
            damp=self.damp,
            seed=self.seed,
            backend=cast(Literal["native", "optimum"], self.backend),
        )


@takes_groups
def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, hub id, bare name, or demo.")],
    options: QuantizeOptions,
    output: Folder = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Go on after the last finished layer.")] = True,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Quantize a model once: the verifier checkpoint is written beside it, and the pair becomes the current one."""
    config = options.config()
    announce(model)

    from quasar_core import api

    with console.progress_bar() as progress:
        report = api.quantize(
            model,
            config,
            output=output,
            force=force,
            resume=resume,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        console.print_json(asdict(report))
        return

    from quasar_cli.render.checkpoint import report_tables

    console.show(*report_tables(report, verbose))
    console.note_plain('Next: quasar generate --prompt "..."')
