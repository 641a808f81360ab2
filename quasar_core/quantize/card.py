"""The model card of a verifier checkpoint."""

from typing import Any

from quasar_core.records import QuantizeReport


def model_card(report: QuantizeReport, card: dict[str, Any]) -> str:
    """Markdown: what the checkpoint is, how it was made, how faithful it is."""
    config, fidelity, calibration = report.config, report.fidelity, card["calibration"]
    group = "one group per output" if config["group_size"] == -1 else f"groups of {config['group_size']}"
    symmetry = "symmetric" if config["sym"] else "asymmetric"
    return f"""---
base_model: {report.target}
library_name: transformers
tags: [gptq, quasar, speculative-decoding]
---
# {report.target}, {config["bits"]}-bit verifier

A low-bit copy of `{report.target}` for self-speculative decoding with `quasar`: GPTQ, {config["bits"]} bits, {group},
{symmetry}, in the AutoGPTQ format (version 1). Target fingerprint `{card["target"]["fingerprint"][:16]}`.

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
| bits per weight of the packed layers | {report.bits_per_weight:.3f} |
| bytes of weights, before and after | {report.bytes_before:,} → {report.bytes_after:,} |
"""


def quantize_command(report: QuantizeReport) -> str:
    """The command that makes this checkpoint again."""
    config = report.config
    options = [f"--bits {config['bits']}", f"--group-size {config['group_size']}"]
    options += [] if config["sym"] else ["--no-sym"]
    options += [] if config["act_order"] else ["--no-act-order"]
    options += [f"--lm-head-bits {config['lm_head_bits']}"] if config["lm_head_bits"] != 16 else []
    options += [f"--calibration {config['calibration']}", f"--samples {config['samples']}"]
    options += [f"--seq-len {config['seq_len']}", f"--damp {config['damp']}", f"--seed {config['seed']}"]
    options += [f"--backend {config['backend']}"] if config["backend"] != "native" else []
    return f"quasar quantize {report.target} {' '.join(options)}"
