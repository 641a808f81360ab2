"""A part of a GPU bench: passes of a mixture of experts, of random weights at the shape of Qwen3-30B-A3B's blocks.

A few blocks of it, and its head: what a pass reads grows with its tokens, as they choose different experts. The floor
counts as many experts as tokens choose that favour none.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

from quasar_core.bench.steps import layer_bytes
from quasar_core.bench.synthetic_models import RandomTensors
from quasar_core.models.config.decoder import DecoderConfig
from quasar_core.models.decoder.cache import DecoderCache
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.decoder.linear import Product, block_products, head_product, mixture_products
from quasar_core.models.weights.lean_weights import attach_verifier, build_target
from tools.gpu_bench.models import GROUP, Bench, Plan, RoundedCopy, in_groups, kernel_for, with_fast_pass
from tools.gpu_bench.passes import ROOM, time_length

PART = "mixtures"
BITS = 4
SHAPE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": 4,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "dtype": "bfloat16",
}
DRY = {"num_hidden_layers": 2, "hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 8, "vocab_size": 2048}


def run(bench: Bench) -> None:
    """The target, then its copy of 4 bits, at the shorter context, each length in an attempt of its own.

    The models are made by every process anew: another one that goes on has to have them too.
    """
    plan, report = bench.plan, bench.report
    config = config_of(plan)
    target = build_target(config, RandomTensors(config, plan.dtype, report.progress), plan.device, plan.dtype)
    with_fast_pass(target, report.progress)
    cache = target.new_cache(min(plan.contexts) + ROOM)
    time_model(bench, "target", target, cache)
    copy = RoundedCopy(target, in_groups(BITS), None)
    verifier = attach_verifier(target, copy, kernel_for(target), report.progress)
    time_model(bench, "4-bit", with_fast_pass(verifier, report.progress), cache)


def config_of(plan: Plan) -> DecoderConfig:
    """The shape, a tiny one in a dry run."""
    return DecoderConfig.parse({**SHAPE, **(DRY if plan.dry else {})})


def time_model(bench: Bench, name: str, model: LeanDecoder, cache: DecoderCache) -> None:
    """A row of how its passes run, and one for each number of tokens."""
    bench.report.add(PART, model=name, note=getattr(model.fast, "note", "not recorded"))
    context, bits = min(bench.plan.contexts), BITS if name == "4-bit" else 16
    for count in bench.plan.headline:
        size = pass_bytes(model.config, count, bits)
        measure = partial(time_length, bench, name, model, cache, count, context, PART, weight_bytes=size)
        bench.report.attempt(PART, f"{name}, {count} tokens", measure)


def experts_read(config: DecoderConfig, tokens: int) -> float:
    """Experts of a block that so many tokens choose, on average, where each chooses any k of them alike."""
    assert config.mixture is not None
    return config.mixture.count * (1 - (1 - config.mixture.chosen / config.mixture.count) ** tokens)


def pass_bytes(config: DecoderConfig, tokens: int, bits: int) -> int:
    """Weights that a pass of so many tokens reads; router and head are of 16 bits."""
    total = product_bytes([head_product(config)], 16)
    for index in range(config.num_layers):
        total += product_bytes(block_products(config, index).values(), bits)
        mixture = mixture_products(config, index)
        if mixture is not None:
            one = product_bytes((mixture.gate_up[0], mixture.down[0]), bits)
            total += product_bytes([mixture.router], 16) + int(experts_read(config, tokens) * one)
    return total


def product_bytes(products: Iterable[Product], bits: int) -> int:
    """Weights of products in 16 bits, or in groups of codes."""
    sizes = [(sum(product.rows), product.columns) for product in products]
    if bits == 16:
        return sum(2 * outputs * inputs for outputs, inputs in sizes)
    return sum(layer_bytes(inputs, outputs, bits, GROUP) for outputs, inputs in sizes)
