"""A small model's shape, a config, and ways to write the text, for what is counted of a run of quantizing."""

from dataclasses import replace

from quasar_core.config import QuantizeConfig
from quasar_core.quantize.plan import Shape
from quasar_core.quantize.text_plan import TextPlan

CONFIG = QuantizeConfig(samples=8, seq_len=64)
BLOCK = {"q_proj": (32, 32), "k_proj": (16, 32), "o_proj": (32, 32), "up_proj": (64, 32), "down_proj": (32, 64)}


def shape(blocks: int = 2) -> Shape:
    """Blocks of five layers, a vocabulary of 100."""
    layers = {f"model.layers.{i}.{name}": size for i in range(blocks) for name, size in BLOCK.items()}
    return Shape(layers, other_weights=1000, ends_weights=800, hidden=32, vocabulary=100)


LEAN = TextPlan(False, None, "bfloat16", weights=0, room=0)
BY_TRANSFORMERS = replace(LEAN, why_not_lean="of another family")
BY_A_COPY = replace(LEAN, copy_bits=8)
