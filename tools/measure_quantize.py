"""Quantizing a model, stage by stage: seconds, CPU seconds, tokens of text per second, fidelity, and what was promised.

    python -m tools.measure_quantize MODEL [--samples 128] [--seq-len 512] [--calibration self] [--threads 2]
    python -m tools.measure_quantize MODEL --text-only --rows 160 --seq-len 512

The first quantizes in a temporary folder and compares the time with what a dry run said before. The second writes text
alone, by quasar's own decoder and by transformers, the same rows. Run it on a machine that does nothing else; CPU
seconds tell more than seconds on one that does.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from quasar_core.api import quantizing
from quasar_core.config import QuantizeConfig
from quasar_core.models.pair import load_tokenizer
from quasar_core.quantize.blocks.streaming import open_target
from quasar_core.quantize.self_text import write_self_text
from quasar_core.quantize.text_plan import Free, open_writer, plan_text
from quasar_core.store.names import resolve_model
from quasar_core.system import free_memory


class Clock:
    """Seconds and CPU seconds, of all threads, since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """Both, up to now."""
        return time.perf_counter() - self._wall, time.process_time() - self._cpu


@contextmanager
def own_home() -> Iterator[Path]:
    """Let quasar keep what it records in a temporary folder."""
    before = os.environ.get("QUASAR_HOME")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["QUASAR_HOME"] = folder
        try:
            yield Path(folder)
        finally:
            del os.environ["QUASAR_HOME"]
            if before is not None:
                os.environ["QUASAR_HOME"] = before


def measure_whole(model: str, config: QuantizeConfig) -> None:
    """Quantize; print each stage, the fidelity, and the estimate beside the time."""
    with own_home() as home:
        plan = quantizing.estimate(model, config, output=home / "verifier", device="cpu")
        clock = Clock()
        report = quantizing.quantize(model, config, output=home / "verifier", device="cpu", tell=print)
        wall, cpu = clock.read()
    for stage, seconds in report.seconds.items():
        print(f"{stage:<20} {seconds:8.1f} s")
    print(f"{'whole':<20} {wall:8.1f} s, {cpu:.1f} CPU s; the dry run said {plan.seconds or 0:.1f} s")
    found = report.fidelity
    print(f"KL {found.kl_mean:.4f}, agreement {found.agreement:.4f} greedy, {found.agreement_sampled:.4f} sampled")


def measure_text(model: str, rows: int, length: int) -> None:
    """Write the same text by either; print tokens per second and CPU time per token."""
    source = resolve_model(model)
    tokenizer = load_tokenizer(source.folder, False)
    dtype = torch.bfloat16
    target = open_target(source.folder, torch.device("cpu"), dtype)
    planned = plan_text(source.folder, target, Free(free_memory()))
    for plan in (planned, replace(planned, why_not_lean="it is compared", dtype="bfloat16", weights=0)):
        writer = open_writer(source.folder, target, plan)
        clock = Clock()
        tokens = write_self_text(writer, tokenizer, rows, length, seed=0).tokens.numel()
        wall, cpu = clock.read()
        print(f"{plan.describe()}: {tokens / wall:.1f} tokens/s, {1e3 * cpu / tokens:.3f} ms of CPU a token")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--samples", type=int, default=QuantizeConfig().samples)
    parser.add_argument("--seq-len", type=int, default=QuantizeConfig().calibration_length)
    parser.add_argument("--calibration", default="self")
    parser.add_argument("--threads", type=int, help="as PyTorch has it, without")
    parser.add_argument("--text-only", action="store_true")
    parser.add_argument("--rows", type=int, default=160)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.text_only:
        measure_text(options.model, options.rows, options.seq_len)
        return
    config = QuantizeConfig(samples=options.samples, seq_len=options.seq_len, calibration=options.calibration)
    measure_whole(options.model, config)


if __name__ == "__main__":
    main()
