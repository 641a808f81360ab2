"""The model card of a verifier checkpoint."""

from typing import Any

from quasar_core.records import FidelityReport, QuantizeReport

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

Calibrated on `{calibration["name"]}` ({calibration["tokens"]:,} tokens, seed {calibration["seed"]},
sha256 `{calibration["sha256"][:16]}`).

| fidelity to the target, on text that the calibration did not see | |
|---|---|
| agreement on the target's greedy text | {fidelity.agreement:.4f} |
| agreement on `{fidelity.text}` text ({fidelity.tokens:,} tokens) | {fidelity.agreement_sampled:.4f} |
| mean KL(target, verifier), nats | {fidelity.kl_mean:.5f} |
| 99th percentile of KL, nats | {fidelity.kl_p99:.4f} |
| perplexity of the target | {fidelity.perplexity_target:.4f} |
| perplexity of the verifier | {fidelity.perplexity_verifier:.4f} |
{kernel_row(fidelity)}| bits per weight of the packed layers | {report.bits_per_weight:.3f} |
| bytes of weights, before and after | {report.bytes_before:,} → {report.bytes_after:,} |
"""


def kernel_row(fidelity: FidelityReport) -> str:
    """What the kernel of the machine that quantized adds; nothing where it is the unpacked product."""
    price = fidelity.in_use
    if price is None:
        return ""
    return (
        f"| mean KL on {price.tokens:,} of the tokens, by the kernel `{price.kernel}` and unpacked "
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
        codes = f"from 2 to 8 bits by layer, {group} or smaller ones"
    return f"GPTQ, {codes}, {symmetry}, in the AutoGPTQ format (version 1)"


def width(config: dict[str, Any]) -> str:
    """The width of the codes in a title."""
    if config.get("mean_bits") is None and config.get("target_agreement") is None:
        return f"{config['bits']}-bit"
    return MIXED


def quantize_command(report: QuantizeReport) -> str:
    """The command that makes this checkpoint again."""
    config = report.config
    gptq = config["method"] == "gptq"
    solved = gptq or config.get("rounding") == "gptq"
    options = [_width_option(config), f"--group-size {config['group_size']}"] if gptq else []
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
