"""Fidelity beside GPTQModel: both quantize a model on the same text, in as many bytes, and one measure reads both.

    python -m tools.compare_gptqmodel text MODEL VERIFIER FOLDER [--samples 128] [--quick]
    quasar quantize MODEL --bits 4 --samples 128 [--quick] --output VERIFIER
    python -m tools.compare_gptqmodel theirs MODEL FOLDER SETTING [--dtype float32]
    python -m tools.compare_gptqmodel measure MODEL FOLDER CHECKPOINT… [--rows 32]
    python -m tools.compare_gptqmodel table FOLDER
    python -m tools.compare_gptqmodel blocks MODEL FOLDER SETTING… [--blocks 8] [--samples 16] [--rows 8]

The first begins the run of the second: the model writes its text, which is copied to FOLDER. The third needs gptqmodel
(`make interop` makes an environment that has it), takes groups as VERIFIER has them, and writes FOLDER/SETTING. The
fourth measures each checkpoint on rows that no quantizer read, and keeps what it found in FOLDER. Each goes on after
what is finished, so a slow machine may take them one by one. The last is for less time: both sides quantize the first
blocks alone, in float32, in one process that has gptqmodel; the others stay as they are.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from quasar_core.api import quantizing
from quasar_core.checkpoint.formats import PACKED_SUFFIXES
from quasar_core.checkpoint.gptq_format import QuantizedWeight
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.config import QUICK, QuantizeConfig
from quasar_core.files import read_json, write_json
from quasar_core.load_pair import dtype_of_source
from quasar_core.models.hf.causal_lm import TransformersLM, load_target
from quasar_core.models.pair import load_tokenizer
from quasar_core.quantize.blocks.activations import capture_first_inputs
from quasar_core.quantize.blocks.layerwise import quantize_blocks
from quasar_core.quantize.blocks.streaming import open_target, open_verifier
from quasar_core.quantize.calibration import GREEDY_FROM, Calibration
from quasar_core.quantize.estimate import plan_here
from quasar_core.quantize.fidelity import measure_fidelity
from quasar_core.quantize.job import working_folder
from quasar_core.quantize.layer_plan import LayerPlan
from quasar_core.quantize.measure_fidelity import measure
from quasar_core.quantize.run import calibrate
from quasar_core.quantize.solve.gptq import SolverConfig
from quasar_core.records import FidelityReport
from quasar_core.store.names import resolve_model
from tools.study.study import with_weights

TEXT, CHOSEN = "text.safetensors", "groups.json"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Measured:
    """A checkpoint's fidelity, and the bytes of its packed layers: codes, scales, zeros, groups of inputs."""

    name: str
    packed_bytes: int
    fidelity: FidelityReport


def their_settings() -> dict[str, dict[str, Any]]:
    """GPTQModel's options that its documentation has for fidelity: order of inputs, search for scales, GPTAQ, FOEM."""
    from gptqmodel.quantization.config import FOEMConfig, GPTAQConfig

    usual = {"sym": True, "desc_act": True, "act_group_aware": False, "damp_percent": 0.05, "mse": 2.4}
    return {
        "act-order": usual,
        "gptaq-quarter": {**usual, "gptaq": GPTAQConfig(alpha=0.25)},
        "gptaq": {**usual, "gptaq": GPTAQConfig(alpha=1.0)},
        "gptaq-asymmetric": {**usual, "sym": False, "gptaq": GPTAQConfig(alpha=1.0)},
        "foem": {**usual, "foem": FOEMConfig(alpha=0.0, beta=0.2)},
        "group-aware": {**usual, "desc_act": False, "act_group_aware": True},
    }


def quantize_by_gptqmodel(
    model: str,
    rows: torch.Tensor,
    out: Path,
    options: dict[str, Any],
    group_size: int,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 8,
) -> float:
    """Write GPTQModel's checkpoint at 4 bits, calibrated on rows [N, L]; the seconds that quantizing took."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with a single worker its thread pool raises
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=4, group_size=group_size, offload_to_disk=False, **options)
    theirs = GPTQModel.load(model, config, device="cpu", dtype=dtype)
    begin = time.perf_counter()
    theirs.quantize(
        [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows.tolist()], batch_size=batch_size
    )
    seconds = time.perf_counter() - begin
    theirs.save(str(out))
    return seconds


def write_text(model: str, verifier: Path, folder: Path, config: QuantizeConfig) -> None:
    """Let the run of `quasar quantize` that writes `verifier` begin with its text, and copy that to `folder`."""
    source, job, target = quantizing.open_job(model, config, verifier, "cpu", False, print)
    plan = plan_here(source.folder, target, job.config, job.output, None)
    with working_folder(job, resume=True):
        calibrate(job, target, load_tokenizer(source.folder, False), plan.text)
        shutil.copyfile(job.calibration, folder / TEXT)
    write_json(folder / CHOSEN, {"group_size": job.config.group_size})


def run_theirs(model: str, folder: Path, setting: str, dtype: torch.dtype) -> None:
    """Quantize by GPTQModel on the text in `folder`, in groups as ours."""
    source, rows = str(resolve_model(model).folder.resolve()), load_file(folder / TEXT)["samples"]
    group_size = read_json(folder / CHOSEN)["group_size"]
    torch.compiler.set_stance("force_eager")  # it compiles its dequantization, which takes half a minute a model
    os.chdir(folder)  # where it writes its logs
    options = their_settings()[setting]
    # Row by row: GPTAQ fails on Gemma 3 with several at once.
    seconds = quantize_by_gptqmodel(source, rows, Path(setting), options, group_size, dtype, batch_size=1)
    print(f"{setting}: {seconds:.0f} s")


def measure_checkpoint(model: str, folder: Path, checkpoint: Path, rows: int) -> Measured:
    """Compare a checkpoint with the model on the held-out rows and on the greedy rows of the text."""
    source, text = resolve_model(model), load_file(folder / TEXT)
    target = open_target(source.folder, CPU, dtype_of_source(source.folder, "auto", CPU)[0])
    found = VerifierCheckpoint(checkpoint)
    held_out = {name: part[:rows] for name, part in text.items() if name.startswith(("held_out", "greedy"))}
    calibration = Calibration.of_tensors("self", {**text, **held_out}, 0)
    report = measure(target, open_verifier(found, target), calibration)
    return Measured(checkpoint.name, packed_bytes(found), report)


def compare_blocks(
    model: str, folder: Path, settings: Sequence[str], blocks: int, samples: int, rows: int
) -> Iterator[Measured]:
    """Quantize the first blocks by ours and by GPTQModel's settings, on the same texts in groups of the same size."""
    source, text = resolve_model(model).folder.resolve(), load_file(folder / TEXT)
    target = load_target(source, CPU, torch.float32)
    texts = Calibration("self", text["samples"][:samples], text["held_out"][:rows], text["greedy"][:rows], 0)
    group_size = read_json(folder / CHOSEN)["group_size"]
    weights = first_blocks(target.model, texts.samples, group_size, blocks)
    packed = sum(part.numel() * part.element_size() for one in weights.values() for part in one.pack().values())
    dense = {name: one.dequantize() for name, one in weights.items()}
    yield Measured("quasar", packed, measure_weights(target, dense, texts))
    torch.compiler.set_stance("force_eager")
    os.chdir(folder)  # where it writes its logs
    last = target.model.config.get_text_config().num_hidden_layers
    others: dict[str, dict[str, int]] = {f"-:.*layers\\.{index}\\..*": {} for index in range(blocks, last)}
    for setting in settings:
        options, out = {**their_settings()[setting], "dynamic": others}, Path(f"blocks-{setting}")
        quantize_by_gptqmodel(str(source), texts.samples, out, options, group_size, batch_size=1)
        found = VerifierCheckpoint(out)
        dense = {name: found.layer(name).dequantize() for name in found.layer_names}
        assert dense.keys() == weights.keys(), "the same layers on both sides"
        yield Measured(setting, packed_bytes(found), measure_weights(target, dense, texts))


def first_blocks(
    model: PreTrainedModel, samples: torch.Tensor, group_size: int, blocks: int
) -> dict[str, QuantizedWeight]:
    """Our codes of the first blocks, as quantize makes them by default."""
    activations = capture_first_inputs(model, samples)
    activations.keep_reference()
    with tempfile.TemporaryDirectory() as commits:
        plan = LayerPlan(SolverConfig(group_size=group_size))
        made = list(islice(quantize_blocks(model, activations, plan, Path(commits)), blocks))
    return {n: w for block in made for n, w in block.weights.items() if isinstance(w, QuantizedWeight)}


def measure_weights(target: TransformersLM, dense: dict[str, torch.Tensor], texts: Calibration) -> FidelityReport:
    """Compare the model that has these weights [out, in] in its layers with the model."""
    verifier = TransformersLM(with_weights(target.model, dense))
    cache = target.new_cache(max(texts.held_out.shape[1], texts.greedy.shape[1]))
    return measure_fidelity(target, verifier, cache, texts.held_out, texts.greedy, GREEDY_FROM, texts.name)


def packed_bytes(checkpoint: VerifierCheckpoint) -> int:
    """Count the bytes that the quantized layers take in the checkpoint's files."""
    parts = [f"{layer}.{suffix}" for layer in checkpoint.layer_names for suffix in PACKED_SUFFIXES]
    return sum(checkpoint.tensors.entry(part).size for part in parts if part in checkpoint.tensors)


def keep(folder: Path, found: Measured) -> None:
    """Write what was measured into the folder, and say it."""
    write_json(folder / f"measured-{found.name}.json", asdict(found))
    print(json.dumps({"name": found.name, "kl_mean": found.fidelity.kl_mean}), flush=True)


def table(folder: Path) -> str:
    """Tabulate, as Markdown, all that was measured, the least divergence first."""
    found = [read_json(path) for path in folder.glob("measured-*.json")]
    lines = [
        "| | mean KL | 99th percentile | agreement, sampled | greedy | perplexity | bytes of packed layers |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in sorted(found, key=lambda one: one["fidelity"]["kl_mean"]):
        fidelity = one["fidelity"]
        figures = [f"{fidelity[name]:.4f}" for name in ("kl_mean", "kl_p99", "agreement_sampled", "agreement")]
        figures += [f"{fidelity['perplexity_verifier']:.3f}", f"{one['packed_bytes']:,}"]
        lines.append(f"| {one['name']} | {' | '.join(figures)} |")
    if found:
        lines.append(f"\nThe target's perplexity: {found[0]['fidelity']['perplexity_target']:.3f}.")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Do the one step that the command line names."""
    options = parse(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.step == "text":
        config = QuantizeConfig(samples=options.samples, seq_len=options.seq_len)
        if options.quick:
            config = replace(config, fidelity_rows=QUICK["fidelity_rows"])
        write_text(options.model, options.verifier, options.folder, config)
    elif options.step == "theirs":
        run_theirs(options.model, options.folder, options.setting, getattr(torch, options.dtype))
    elif options.step == "measure":
        for checkpoint in options.checkpoints:
            found = measure_checkpoint(options.model, options.folder, checkpoint, options.rows)
            keep(options.folder, found)
    elif options.step == "blocks":
        folder = options.folder.resolve()
        asked = options.settings, options.blocks, options.samples, options.rows
        for found in compare_blocks(options.model, folder, *asked):
            keep(folder, found)
    else:
        print(table(options.folder))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    names = ("text", "theirs", "measure", "table", "blocks")
    text, theirs, measured, shown, blocks = (steps.add_parser(name) for name in names)
    for step in (text, theirs, measured, blocks):
        step.add_argument("model")
    text.add_argument("verifier", type=Path)
    for step in (text, theirs, measured, shown, blocks):
        step.add_argument("folder", type=Path)
    text.add_argument("--samples", type=int, default=QuantizeConfig().samples)
    text.add_argument("--seq-len", type=int, help="as quantize has it, without")
    text.add_argument("--quick", action="store_true", help="as quantize has it: fidelity on fewer rows")
    theirs.add_argument("setting", help="a name of `their_settings`")
    theirs.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    measured.add_argument("checkpoints", type=Path, nargs="+")
    measured.add_argument("--rows", type=int, default=32, help="of held-out and of greedy text")
    blocks.add_argument("settings", nargs="+", help="names of `their_settings`")
    for name, usual in (("--blocks", 8), ("--samples", 16), ("--rows", 8)):
        blocks.add_argument(name, type=int, default=usual)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
