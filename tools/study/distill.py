"""Fit the scales of a quantized model to the target's distribution: KL(target ‖ verifier) on calibration rows, by Adam.

The codes stay. A scale moves by a factor near 1, so that one learning rate serves all. Small models only: both models
and the gradients of all weights are in memory. Not a step of quantizing, since it gives little beyond scales that are
fitted layer by layer (dev/log.md); the study measures it. Letters: N rows of L tokens.
"""

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from quasar_core.checkpoint.gptq_format import QuantizedWeight
from quasar_core.quantize.fidelity import kl_divergence
from quasar_core.quantize.solve.grid import stored_scale
from quasar_core.records import Progress, no_progress

LEARNING_RATE = 1e-3


def distill_scales(
    target: PreTrainedModel,
    weights: Mapping[str, QuantizedWeight],
    samples: torch.Tensor,
    epochs: int = 1,
    progress: Progress = no_progress,
) -> dict[str, torch.Tensor]:
    """The dequantized weights [out, in] of every layer, with scales fitted on samples [N, L], a row a step."""
    factors = {name: torch.ones_like(weight.scales, dtype=torch.float32) for name, weight in weights.items()}
    for factor in factors.values():
        factor.requires_grad_()
    optimizer = torch.optim.Adam(factors.values(), lr=LEARNING_RATE)
    steps = epochs * len(samples)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    # Tensors may come out of inference mode, where gradients cannot use them.
    fixed = {name: tensor.detach().clone() for name, tensor in target.state_dict(keep_vars=True).items()}
    for step in range(steps):
        progress("fitting scales", step, steps)
        row = samples[step % len(samples)][None].clone()
        with torch.no_grad():
            wanted = target(input_ids=row, use_cache=False).logits[0].float()
        scaled = {f"{name}.weight": _scaled(weights[name], factor) for name, factor in factors.items()}
        inputs = {"input_ids": row, "use_cache": False}
        got = torch.func.functional_call(target, fixed | scaled, kwargs=inputs, tie_weights=False).logits[0]
        optimizer.zero_grad()
        kl_divergence(wanted, got.float()).mean().backward()
        optimizer.step()
        schedule.step()
    return {name: _stored(weights[name], factor.detach()) for name, factor in factors.items()}


def _scaled(weight: QuantizedWeight, factor: torch.Tensor) -> torch.Tensor:
    index = weight.g_idx.long()
    scales = weight.scales.float().clone() * factor
    return (scales[index] * (weight.codes.float() - weight.zeros.float()[index])).t()


def _stored(weight: QuantizedWeight, factor: torch.Tensor) -> torch.Tensor:
    """With scales as the checkpoint would hold them."""
    rounded = stored_scale(weight.scales.float() * factor) / weight.scales.float()
    return _scaled(weight, rounded)
