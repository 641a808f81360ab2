"""Assemble the checkpoint's folder from finished blocks and the target's files: shards, configs, report, card."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any, Literal

import torch

from quasar_core.checkpoint import compressed_tensors
from quasar_core.checkpoint.card import CARD_VERSION
from quasar_core.checkpoint.checks import KEY as DIGESTS
from quasar_core.checkpoint.checks import file_digest
from quasar_core.checkpoint.fused_names import dynamic_rules, listed_layers
from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.checkpoint.writer import ShardWriter, copy_kept_files
from quasar_core.config import BITS, QuantizeConfig
from quasar_core.files import write_json, write_whole
from quasar_core.models.hf.skeleton import Weights
from quasar_core.quantize.calibration import Calibration
from quasar_core.quantize.commits import Width, commit_files, committed_tensors, is_shard, read_summary, tensor_names
from quasar_core.quantize.job import Job
from quasar_core.quantize.layer_plan import HEAD, KEPT_RULE, is_kept
from quasar_core.records import FidelityReport, QuantizeReport
from quasar_core.store.folders import CARD
from quasar_core.store.model_config import read_config
from quasar_core.store.safetensors_header import weight_bytes
from quasar_core.store.text_part import BESIDE
from quasar_core.system import package_versions

MIXED = "mixed-width"


def model_card(report: QuantizeReport, card: dict[str, Any], smoothed: bool) -> str:
    """Markdown: what the checkpoint is, how it was made, how faithful it is; `smoothed` before it was rounded."""
    config, fidelity, calibration = report.config, report.fidelity, card["calibration"]
    tag = "gptq" if config["method"] == "gptq" else "compressed-tensors"
    return f"""---
base_model: {report.target}
library_name: transformers
tags: [{tag}, quasar, speculative-decoding]
---
# {report.target}, {width(config)} verifier

A low-bit copy of `{report.target}` for self-speculative decoding with `quasar`: {describe_codes(config, smoothed)}.
Target fingerprint `{card["target"]["fingerprint"][:16]}`.

    {quantize_command(report)}

{describe_text(calibration)}

| fidelity to the target, on text that the calibration did not see | |
|---|---|
| agreement on the target's greedy text | {fidelity.agreement:.4f} |
{beside_row(fidelity)}\
| agreement on `{fidelity.text}` text ({fidelity.tokens:,} tokens) | {fidelity.agreement_sampled:.4f} |
| mean KL(target, verifier), nats | {fidelity.kl_mean:.5f} |
| 99th percentile of KL, nats | {fidelity.kl_p99:.4f} |
| perplexity of the target | {fidelity.perplexity_target:.4f} |
| perplexity of the verifier | {fidelity.perplexity_verifier:.4f} |
{kernel_row(fidelity)}| bits per weight of the packed layers | {report.bits_per_weight:.3f} |
| bytes of weights, before and after | {report.bytes_before:,} → {report.bytes_after:,} |
"""


def describe_text(calibration: dict[str, Any]) -> str:
    """What the codes were fitted on."""
    if not calibration["tokens"]:
        return "No text was read for the codes: every weight was rounded to the nearest."
    return (
        f"Calibrated on `{calibration['name']}` ({calibration['tokens']:,} tokens, seed {calibration['seed']},\n"
        f"sha256 `{calibration['sha256'][:16]}`)."
    )


def beside_row(fidelity: FidelityReport) -> str:
    """Return the agreement as `exact` reads, where it was measured."""
    if fidelity.agreement_beside is None:
        return ""
    return f"| the same beside the target, as `exact` decodes | {fidelity.agreement_beside:.4f} |\n"


def kernel_row(fidelity: FidelityReport) -> str:
    """Return the divergence of this machine's kernel; nothing where weights are dequantized."""
    price = fidelity.in_use
    if price is None:
        return ""
    return (
        f"| mean KL on {price.tokens:,} of the tokens, by the kernel `{price.kernel}` and dequantized "
        f"| {price.kl_mean:.5f}, {price.kl_mean_exact:.5f} |\n"
    )


def describe_codes(config: dict[str, Any], smoothed: bool) -> str:
    """Method, bits, groups and format, as a part of a sentence."""
    if config["method"] != "gptq":
        name, number = ("W8A8", "integers") if config["method"] == "w8a8" else ("fp8", "e4m3 numbers")
        rounded = "by GPTQ" if config.get("rounding") == "gptq" else "to nearest"
        scaled = f"{number} of 8 bits per output ({rounded}) and per token"
        return f"{name}, {'' if smoothed else 'not '}smoothed, {scaled}, in the compressed-tensors format"
    group = "one group per output" if config["group_size"] == -1 else f"groups of {config['group_size']}"
    symmetry = "symmetric" if config["sym"] else "asymmetric"
    codes = f"{config['bits']} bits, {group}"
    if width(config) == MIXED:
        few, many = min(config.get("widths", BITS)), max(config.get("widths", BITS))
        bits = f"from {few} to {many} bits by layer" if few < many else f"{few} bits"
        codes = f"{bits}, {group} or smaller ones"
    method = "rounded to nearest" if config.get("rounding") == "nearest" else "GPTQ"
    return f"{method}, {codes}, {symmetry}, in the AutoGPTQ format (version 1)"


def width(config: dict[str, Any]) -> str:
    """The width of the codes in a title."""
    if config.get("mean_bits") is None and config.get("target_agreement") is None:
        return f"{config['bits']}-bit"
    return MIXED


def quantize_command(report: QuantizeReport) -> str:
    """The command that makes this checkpoint again."""
    config = report.config
    gptq = config["method"] == "gptq"
    solved = config.get("rounding", "gptq") == "gptq"
    options = [_width_option(config), f"--group-size {config['group_size']}"] if gptq else []
    options += _widths_option(config)
    options += [] if gptq else [f"--method {config['method']}"]
    options += [] if solved else ["--rounding nearest"]
    options += [] if config["sym"] else ["--no-sym"]
    options += ["--no-act-order"] if solved and not config["act_order"] else []
    options += [f"--lm-head-bits {config['lm_head_bits']}"] if config["lm_head_bits"] != 16 else []
    options += [f"--calibration {config['calibration']}", f"--samples {config['samples']}"]
    options += [f"--seq-len {config['seq_len']}"]
    options += [f"--damp {config['damp']}"] if solved else []
    options += [f"--seed {config['seed']}"]
    options += [f"--backend {config['backend']}"] if config["backend"] != "native" else []
    return f"quasar quantize {report.target} {' '.join(options)}"


def _width_option(config: dict[str, Any]) -> str:
    """What chose the bits."""
    if config.get("target_agreement") is not None:
        return f"--target-agreement {config['target_agreement']:g}"
    mean = config.get("mean_bits")
    return f"--bits {config['bits']}" if mean is None else f"--bits {mean:g} --mixed"


def _widths_option(config: dict[str, Any]) -> list[str]:
    """The widths that layers may have, where not all were allowed."""
    widths = tuple(config.get("widths", BITS))
    return [] if widths == BITS else [f"--widths {','.join(map(str, widths))}"]


def assemble(job: Job, names: Weights) -> dict[str, str]:
    """Complete the shards: packed layers in place of their weights, every other tensor of the source as it is.

    Large blocks are shards already; the other tensors pass through memory one by one. Returns the SHA-256 (hex) of each
    shard by its file's name.
    """
    writer = ShardWriter(job.partial)
    for commit in filter(is_shard, commit_files(job.commits)):
        writer.add_file(commit, file_digest(commit))
    for name, tensor in unwritten_tensors(job, names):
        writer.add(name, tensor)
    digests = writer.close()
    copy_kept_files(job.source, job.partial)
    gptq = job.config.method == "gptq"
    number: Literal["int", "float"] = "int" if job.config.method == "w8a8" else "float"
    section = (
        quantization_section(job.config, stored_widths(job, names))
        if gptq
        else compressed_tensors.quantization_section(number)
    )
    rules = rules_of_kept(TensorFiles(job.source))
    if gptq and KEPT_RULE in rules:
        section |= listed_for_optimum(section, list(stored_widths(job, names)))
    for rule in rules:
        if gptq:
            section.setdefault("dynamic", {})[f"-:{rule}"] = {}
        else:
            section["ignore"].append(f"re:{rule}")
    config = read_config(job.source)
    config["quantization_config"] = section
    if job.config.lm_head_bits < 16:
        for part in (config, config.get("text_config") or {}):
            part["tie_word_embeddings"] = False  # the packed head stands on its own
    write_json(job.partial / "config.json", config)
    if gptq:
        write_json(job.partial / "quantize_config.json", section)
    return digests


def listed_for_optimum(section: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """`modules_in_block_to_quantize` where layers of a block have no codes: optimum reads no rules of such.

    vLLM takes from the list what it would find in the files. Optimum reads no codes of experts, listed or not.
    """
    if "modules_in_block_to_quantize" in section or any(".experts." in name for name in names):
        return {}
    return {"modules_in_block_to_quantize": [names]}


def rules_of_kept(files: TensorFiles) -> list[str]:
    """Patterns, for other loaders, of layers that keep the target's precision: some rows, towers, further heads."""
    rules = [KEPT_RULE] if any(is_kept(name.removesuffix(".weight")) for name in files.names()) else []
    further = [name for name in files.names() if name.startswith(BESIDE)]
    roots = sorted({name.removeprefix("model.").partition(".")[0] for name in (*files.beside, *further)})
    return rules + [rf"(.*\.)?{root}(\..*)?$" for root in roots]


def unwritten_tensors(job: Job, names: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """Read what no block's shard holds, under the names of the source's files; memory-mapped."""
    replaced = {f"{names.stored(layer)}.weight" for layer in quantized_names(job)}
    for commit in commit_files(job.commits):
        replaced.update(tensor_names(commit))
        if not is_shard(commit):
            yield from committed_tensors(commit)
    source = TensorFiles(job.source)
    stored = [*map(source.stored, source.names()), *source.beside]
    yield from source.load_many([name for name in stored if name not in replaced])
    for name, kept in names.tied.items():  # an embedding that is stored as the head alone, which has codes now
        if names.stored(kept) in replaced and names.stored(name) not in source:
            yield name, source.load(names.stored(kept))


def quantized_names(job: Job) -> list[str]:
    """The model's names of the layers that have codes."""
    return [name for path in commit_files(job.commits) for name in read_summary(path).losses]


def stored_widths(job: Job, names: Weights) -> dict[str, Width]:
    """Bits and group size of every layer that has codes, under the names of the source's files."""
    summaries = [read_summary(path) for path in commit_files(job.commits)]
    return {names.stored(name): width for summary in summaries for name, width in summary.widths.items()}


def quantization_section(config: QuantizeConfig, widths: Mapping[str, Width]) -> dict[str, Any]:
    """`quantization_config` in AutoGPTQ's words; `dynamic`, GPTQModel's, names the layers of another width, fused too.

    Groups are static, so g_idx is trivial and `desc_act` is false, whatever order the solver took.
    """
    in_blocks = Counter(width for name, width in widths.items() if name != HEAD)
    usual = in_blocks.most_common(1)[0][0]
    others = {name: width for name, width in widths.items() if width != usual}
    section: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": usual.bits,
        "group_size": usual.group_size,
        "desc_act": False,
        "sym": config.sym,
        "lm_head": config.lm_head_bits < 16,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "true_sequential": True,
        "damp_percent": config.damp,
        "meta": {
            "quantizer": [f"quasar:{package_versions()['quasar-cli']}"],
            "act_order": config.act_order,
            "static_groups": True,
        },
    }
    if listed := listed_layers(list(widths)):
        section["modules_in_block_to_quantize"] = [listed]  # optimum wants lists in a list
    if others:
        section["dynamic"] = dynamic_rules({name: width._asdict() for name, width in others.items()})
    return section


def make_report(job: Job, seconds: dict[str, float], fidelity: FidelityReport) -> QuantizeReport:
    """Sizes, losses, seconds, fidelity."""
    summaries = [read_summary(path) for path in commit_files(job.commits)]
    packed_bytes = sum(summary.packed_bytes for summary in summaries)
    return QuantizeReport(
        checkpoint=str(job.output),
        target=job.target_name,
        config=asdict(replace(job.config, seq_len=job.config.calibration_length, calibration=fidelity.text)),
        bytes_before=weight_bytes(job.source),
        bytes_after=weight_bytes(job.partial),
        bits_per_weight=round(8 * packed_bytes / sum(summary.packed_weights for summary in summaries), 3),
        layer_errors={name: loss for summary in summaries for name, loss in summary.losses.items() if loss is not None},
        rounded_layers=[name for summary in summaries for name in summary.rounded],
        seconds={**seconds, "total": round(sum(seconds.values()), 3)},
        fidelity=fidelity,
    )


def describe(job: Job, report: QuantizeReport, calibration: Calibration, digests: Mapping[str, str]) -> None:
    """Write the model card, and then quasar.json with the digests, whose presence says that the folder is whole."""
    card = {
        "format_version": CARD_VERSION,
        "target": {"name": job.target_name, "fingerprint": job.fingerprint},
        "calibration": calibration.identity(),
        "versions": package_versions(),
        DIGESTS: dict(digests),
        "run": job.digest(),
        "report": {**asdict(report), "checkpoint": job.output.name},
    }
    smoothed = any(read_summary(path).own_tensors for path in commit_files(job.commits))
    write_whole(job.partial / "README.md", model_card(report, card, smoothed).encode("utf-8"))
    write_json(job.partial / CARD, card)
