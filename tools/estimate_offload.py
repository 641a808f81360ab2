"""Estimate by counts what streaming a target to a GPU would give: nothing of it was measured.

    python -m tools.estimate_offload [--link 25GB]

The plan is that of `--offload auto` (`models/memory/device_offload.py`), with a cache of 4,096 tokens and a verifier of
4 bits in groups of 128 whose head stays in 16. A confirm takes what it copies ÷ the link's bandwidth, a verify what it
reads ÷ four fifths of the bandwidth on the GPU's data sheet. How many tokens a second that makes depends on how often
the target takes the verifier's word: a column for each chance, of the best window without drafts.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from quasar_cli.options import parse_bytes
from quasar_core.models.config.decoder import DecoderConfig
from quasar_core.models.config.shapes import shape_named
from quasar_core.models.decoder.linear import block_products
from quasar_core.models.memory.device_offload import DeviceBudget, DevicePlan, plan_within_device
from quasar_core.models.memory.estimate import MemoryNeed, sweep_bytes, tensor_elements, token_bytes, workspace_bytes
from quasar_core.models.memory.offload import PLANNED_CONTEXT, Movable
from tools.measure_offload import most_gained

DTYPE = torch.bfloat16
CODE_BITS = 4 + 16 / 128  # of a weight, its group's scale included
READ_SHARE = 0.8  # of the bandwidth on paper, by a verify
CHANCES = (0.91, 0.95, 0.98)
GEMMA_3_27B: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "num_hidden_layers": 62,
    "hidden_size": 5376,
    "intermediate_size": 21_504,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "vocab_size": 262_208,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "query_pre_attn_scalar": 168,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


@dataclass(frozen=True)
class Case:
    """A model beside a GPU: its memory in bytes, and its bandwidth on paper in bytes a second."""

    name: str
    shape: dict[str, Any]
    memory: int
    bandwidth: float


CASES = (
    Case("Qwen3-8B, 16 GB at 700 GB/s", shape_named("--shape", "qwen3-8b"), 16 * 10**9, 7e11),
    Case("Gemma 3 27B, 24 GB at 1,000 GB/s", GEMMA_3_27B, 24 * 10**9, 1e12),
)


@dataclass(frozen=True)
class Estimate:
    """A plan, the bytes that a confirm copies, seconds of a confirm and of a verify."""

    plan: DevicePlan
    moved: int
    confirm: float
    verify: float

    @property
    def plain(self) -> float:
        """Tokens a second of plain decoding over the same link."""
        return 1 / self.confirm

    def exact(self, chance: float) -> float:
        """Tokens a second where the target takes the verifier's word with this chance."""
        return self.plain * most_gained(chance, self.confirm / self.verify)


def estimate(case: Case, link: float) -> Estimate:
    """By what `--offload auto` would plan over a link of so many bytes a second."""
    config = DecoderConfig.parse(case.shape)
    movable = Movable(
        {block: list(block_products(config, block).values()) for block in range(config.num_layers)},
        config.num_layers,
        DTYPE,
    )
    sizes, elements = movable.sizes, tensor_elements(config)
    target, codes = sum(elements.values()) * DTYPE.itemsize, int(elements["blocks"] * CODE_BITS / 8)
    workspace = workspace_bytes(config, DTYPE, models=2) + sweep_bytes(config, DTYPE)
    need = MemoryNeed(target, codes, workspace, token_bytes(config, DTYPE))
    budget = DeviceBudget(case.memory, asked=False)
    plan = plan_within_device(movable, need, PLANNED_CONTEXT, budget, moves_all=False)
    moved, head = sum(sizes[block] for block in plan.streamed), config.vocab_size * config.hidden_size * DTYPE.itemsize
    reading = READ_SHARE * case.bandwidth
    return Estimate(plan, moved, max(moved / link, target / reading), (codes + head) / reading)


def page(link: float) -> Iterator[str]:
    """The table in Markdown."""
    chances = " | ".join(f"{chance} agree" for chance in CHANCES)
    yield f"Estimates by counts over a link of {link / 1e9:g} GB/s; nothing of them was measured."
    yield ""
    yield f"| | blocks that move | GB a confirm | s a confirm | ms a verify | plain, tokens/s | {chances} |"
    yield f"|{'---|' * (6 + len(CHANCES))}"
    for case in CASES:
        found = estimate(case, link)
        rates = " | ".join(f"{found.exact(chance):.1f}" for chance in CHANCES)
        yield (
            f"| {case.name} | {len(found.plan.streamed)} of {found.plan.count} | {found.moved / 1e9:.1f} "
            f"| {found.confirm:.2f} | {1000 * found.verify:.1f} | {found.plain:.2f} | {rates} |"
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Estimate what streaming a target to a GPU would give.")
    parser.add_argument("--link", default="25GB", help="bytes a second from main memory to the GPU")
    print("\n".join(page(parse_bytes("--link", parser.parse_args().link))))


if __name__ == "__main__":
    main()
