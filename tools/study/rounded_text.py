"""Compare verifiers calibrated on text of the model with those on text of a rounded copy of it, each made anew.

    python -m tools.study.rounded_text MODEL FOLDER [--samples 32] [--seq-len 256] [--seeds 3]

All are measured on what the model itself writes, so the figures compare. It is the price of quantizing a model that
memory does not hold (`quasar_core/quantize/text_plan.py`).
"""

import argparse
from dataclasses import replace
from pathlib import Path

from quasar_core.api import quantizing
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.config import QuantizeConfig
from quasar_core.models.pair import load_tokenizer
from quasar_core.quantize.assemble import assemble
from quasar_core.quantize.blocks.streaming import StreamedModel, open_verifier
from quasar_core.quantize.calibration import Calibration
from quasar_core.quantize.job import Job, clear_all_but_commits, working_folder
from quasar_core.quantize.measure_fidelity import measure
from quasar_core.quantize.run import calibrate, quantize_layers
from quasar_core.quantize.text_plan import COPY_BITS, Free, TextPlan, plan_text
from quasar_core.records import FidelityReport


def main() -> None:
    """Parse the command line, and print a line for each verifier."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    print(f"{'seed':<6}{'written by':<14}{'KL':>9}{'greedy':>9}{'sampled':>9}")
    for seed in range(options.seeds):
        own = None
        for bits in (None, *COPY_BITS):
            config = QuantizeConfig(samples=options.samples, seq_len=options.seq_len, seed=seed)
            output = options.folder / f"seed-{seed}-{bits or 'model'}"
            own, found = measured(options.model, config, output, bits, own)
            by = f"{bits} bits" if bits else "the model"
            figures = found.kl_mean, found.agreement, found.agreement_sampled
            print(f"{seed:<6}{by:<14}" + "".join(f"{figure:>9.4f}" for figure in figures), flush=True)


def measured(
    model: str, config: QuantizeConfig, output: Path, bits: int | None, own: Calibration | None
) -> tuple[Calibration, FidelityReport]:
    """A verifier whose samples a copy of so many bits has written, or the model; measured on the model's `own` text."""
    source, job, target = quantizing.open_job(model, config, output, "cpu", False, lambda said: None)
    tokenizer = load_tokenizer(source.folder, False)
    with working_folder(job, resume=False):
        written = calibrate(job, target, tokenizer, planned(job, target, bits))
        own = own or written
        text = replace(written, held_out=own.held_out, greedy=own.greedy)
        quantize_layers(job, target, tokenizer, text, spill=False)
        clear_all_but_commits(job)
        assemble(job, target.weights)
        verifier = open_verifier(VerifierCheckpoint(job.partial), target, "dense")
        return own, measure(target, verifier, own)


def planned(job: Job, target: StreamedModel, bits: int | None) -> TextPlan:
    """The plan of a text that is written by a copy of so many bits, or by the model."""
    return replace(plan_text(job.source, target, Free()), copy_bits=bits)


if __name__ == "__main__":
    main()
