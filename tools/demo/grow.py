"""Write a model of a published shape that computes the demo model's function: `python -m tools.demo.grow`.

The result costs what the large model costs and writes what the small one writes, so that quantizing, generating and
benching can be timed end to end without a download. Its weights are the demo's times powers of two, which bf16 holds
exactly. All else is random rather than zero, and multiplied by zero:

- residual stream: blocks of the demo's width. The first holds 2·x (four times the squares), others x, three none: so
  the mean square is the demo's. Norm weights undo the 2 in the first block and are zero elsewhere.
- heads: channel d of the demo's D stands at d·D'/D, where the rotary angles are the same. A query's other channels
  are zero, so that its norm gives √(D'/D) times the demo's, as scores ÷ √D' need; a key's other channels repeat it.
- further key-value heads, MLP channels and layers: their values and their up products are zero.
- further tokens: a free channel holds a small constant, which their rows of the head multiply by −2^15, so that their
  logits lie far below all others.

Letters: D head size; primes mark the grown model.
"""

import argparse
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import quasar_core.demo
from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.checkpoint.writer import ShardWriter, copy_kept_files
from quasar_core.errors import QuasarError, UsageError
from quasar_core.files import write_json, write_text
from quasar_core.models.config.decoder import DecoderConfig
from quasar_core.models.config.shapes import SHAPES, shape_named
from quasar_core.models.decoder.linear import block_products
from quasar_core.store.folders import begin_work, end_work, partial_folder, refuse_place
from quasar_core.store.model_config import read_config

DEMO = Path(quasar_core.demo.__file__).parent / "model"
SHARD_BYTES = 1_000_000_000
CPU = torch.device("cpu")
FREE_BLOCKS = 3
RANDOM_STD = 0.02
# Powers of two within float16, so that any dtype holds them and a quantized head can scale to them. The logits of
# further tokens are their product ÷ the stream's RMS: −8192 ÷ RMS. Tied, the demo's logits rise by 2^−16 ÷ RMS.
CONSTANT, CONSTANT_NORM, FURTHER_TOKEN = 2.0**-14, 2.0**12, -(2.0**15)
# What the grown model's config.json takes from the shape; the rest, such as rope and end of text, is the demo's.
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)
DERIVED = ("layer_types", "max_window_layers")  # by transformers, from the number of layers


@dataclass(frozen=True)
class Growth:
    """Two shapes, and where the channels of the small one's heads stand in the large one."""

    small: DecoderConfig
    large: DecoderConfig

    @property
    def plain_blocks(self) -> int:
        """Blocks of the residual stream that hold x as it is."""
        return self.large.hidden_size // self.small.hidden_size - FREE_BLOCKS - 1

    @property
    def stretch(self) -> int:
        """D'/D."""
        return self.large.head_size // self.small.head_size

    @property
    def group(self) -> int:
        """Large query heads per key-value head."""
        return self.large.num_heads // self.large.num_kv_heads

    def query_heads(self) -> torch.Tensor:
        """The large query heads that stand for the small ones: the first of each group."""
        first = torch.arange(self.small.num_kv_heads)[:, None] * self.group
        return (first + torch.arange(self.small.num_heads // self.small.num_kv_heads)).flatten()

    def channels(self, heads: torch.Tensor, step: int) -> torch.Tensor:
        """Every `step`-th channel of these large heads, head after head."""
        return (heads[:, None] * self.large.head_size + torch.arange(0, self.large.head_size, step)).flatten()


def why_not_grown(small: DecoderConfig, large: DecoderConfig) -> str | None:
    """Why no model of the large shape can compute the small one's function in our way, or None where one can."""
    if not large.head_norms:
        return f"{large.architecture} has no norms of queries and keys, which the demo model needs"
    if large.hidden_size % small.hidden_size or large.hidden_size <= FREE_BLOCKS * small.hidden_size:
        return f"the width {large.hidden_size} must be at least 4 times {small.hidden_size}, and a multiple of it"
    if large.head_size % small.head_size:
        return f"the head size {large.head_size} is not a multiple of {small.head_size}"
    if large.num_heads // large.num_kv_heads < small.num_heads // small.num_kv_heads:
        return "it has fewer query heads per key-value head"
    for name in ("num_kv_heads", "num_layers", "intermediate_size", "vocab_size"):
        if getattr(large, name) < getattr(small, name):
            return f"its {name} is {getattr(large, name)}, and the demo model's {getattr(small, name)}"
    return None


class GrownTensors:
    """The large model's tensors, made part by part on a device (whose random numbers are its own)."""

    def __init__(
        self, growth: Growth, source: TensorFiles, dtype: torch.dtype, seed: int, device: torch.device = CPU
    ) -> None:
        self.growth, self.source, self.dtype, self.device = growth, source, dtype, device
        self.width = growth.small.hidden_size
        self._generator = torch.Generator(device).manual_seed(seed)

    def parts(self) -> Iterator[dict[str, torch.Tensor]]:
        """Embedding, blocks, final norm and head; one part for each layer, and two."""
        yield {"model.embed_tokens.weight": self._embedding()}
        for index in range(self.growth.large.num_layers):
            yield self._layer(f"model.layers.{index}.", index)
        yield self._ending()

    def _embedding(self) -> torch.Tensor:
        """Rows of further tokens, which no text holds, are those of a tied head."""
        known = self.growth.small.vocab_size
        rows = self._random(self.growth.large.vocab_size, self.growth.large.hidden_size)
        rows[:known] = self._to_stream(self._load("model.embed_tokens.weight").t()).t()
        rows[:known, -1], rows[known:, -1] = CONSTANT, FURTHER_TOKEN
        return rows

    def _ending(self) -> dict[str, torch.Tensor]:
        """The head's rows are doubled, as tied ones are, and the norm is halved once more."""
        norm = self._stream_norm(self._load("model.norm.weight") / 2)
        norm[-1] = CONSTANT_NORM
        ending = {"model.norm.weight": norm}
        if not self.growth.large.tied:
            known = self.growth.small.vocab_size
            name = "model.embed_tokens.weight" if self.growth.small.tied else "lm_head.weight"
            rows = self._random(self.growth.large.vocab_size, self.growth.large.hidden_size)
            rows[:known, : self.width] = self._load(name) * 2
            rows[:known, -1], rows[known:, -1] = 0, FURTHER_TOKEN
            ending["lm_head.weight"] = rows
        return ending

    def _layer(self, prefix: str, index: int) -> dict[str, torch.Tensor]:
        """A block whose values and up products are zero, with the demo's own in it where the demo has that block."""
        products = block_products(self.growth.large, index).values()
        layer = {
            f"{name}.weight": self._random(rows, product.columns)
            for product in products
            for name, rows in zip(product.names, product.rows, strict=True)
        }
        for name in ("self_attn.v_proj", "mlp.up_proj"):
            layer[f"{prefix}{name}.weight"][:, : self.width] = 0
        own = index < self.growth.small.num_layers
        for name in ("input_layernorm", "post_attention_layernorm"):
            stored = f"{prefix}{name}.weight"
            layer[stored] = self._stream_norm(self._load(stored) if own else torch.ones(self.width))
        for name in ("q_norm", "k_norm"):
            layer[f"{prefix}self_attn.{name}.weight"] = 1 + self._random(self.growth.large.head_size)
        if own:
            self._place_attention(layer, f"{prefix}self_attn.")
            self._place_mlp(layer, f"{prefix}mlp.")
        return layer

    def _place_attention(self, layer: dict[str, torch.Tensor], prefix: str) -> None:
        growth, width = self.growth, self.width
        q, k, v, out, q_norm, k_norm = (
            self._load(f"{prefix}{name}.weight")
            for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
        )
        queries, states = growth.query_heads(), torch.arange(growth.small.num_kv_heads)
        asking = growth.channels(queries, growth.stretch)
        # All query heads of a group mix its values; those that the demo does not have must not be heard.
        mixing = growth.channels(torch.arange(growth.small.num_kv_heads * growth.group), growth.stretch)
        layer[f"{prefix}q_proj.weight"][growth.channels(queries, 1), :width] = 0
        layer[f"{prefix}q_proj.weight"][asking, :width] = q.to(self.dtype)
        repeated = k.repeat_interleave(growth.stretch, 0)
        layer[f"{prefix}k_proj.weight"][growth.channels(states, 1), :width] = repeated.to(self.dtype)
        layer[f"{prefix}v_proj.weight"][growth.channels(states, growth.stretch), :width] = v.to(self.dtype)
        layer[f"{prefix}o_proj.weight"][:, mixing] = 0
        layer[f"{prefix}o_proj.weight"][:, asking] = self._to_stream(out)
        layer[f"{prefix}q_norm.weight"][:: growth.stretch] = q_norm
        layer[f"{prefix}k_norm.weight"][:: growth.stretch] = k_norm

    def _place_mlp(self, layer: dict[str, torch.Tensor], prefix: str) -> None:
        inner = self.growth.small.intermediate_size
        for name in ("gate_proj", "up_proj"):
            layer[f"{prefix}{name}.weight"][:inner, : self.width] = self._load(f"{prefix}{name}.weight")
        down = self._load(f"{prefix}down_proj.weight")
        layer[f"{prefix}down_proj.weight"][:, :inner] = self._to_stream(down)

    def _to_stream(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [demo's width, n] that write to the residual stream → [width', n]: doubled, plain, none."""
        silent = rows.new_zeros(FREE_BLOCKS * self.width, rows.shape[1])
        return torch.cat([2 * rows, rows.repeat(self.growth.plain_blocks, 1), silent]).to(self.dtype)

    def _stream_norm(self, weight: torch.Tensor) -> torch.Tensor:
        """A norm of the residual stream, which reads the doubled block alone."""
        norm = torch.zeros(self.growth.large.hidden_size, dtype=self.dtype, device=self.device)
        norm[: self.width] = weight / 2
        return norm

    def _load(self, name: str) -> torch.Tensor:
        return self.source.load(name).to(self.device)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_(
            0, RANDOM_STD, generator=self._generator
        )


def grow(
    source: Path,
    shape: Mapping[str, Any],
    output: Path,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    device: torch.device = CPU,
) -> None:
    """Write into `output` a model of the sizes in `shape` (a config.json) that computes the function of `source`.

    One part is in memory at a time, and one shard that waits to be written. Raises UsageError where the shape cannot
    hold the function or the output exists.
    """
    if os.path.lexists(output):
        raise UsageError(f"{output} exists; name another folder.")
    refuse_place(output, source)
    config = read_config(source)
    small = DecoderConfig.parse(config)
    grown = grown_config(config, shape, dtype)
    obstacle = why_not_grown(small, DecoderConfig.parse(shape))
    if obstacle:
        raise UsageError(f"The demo model's function cannot have this shape: {obstacle}.")
    tensors = GrownTensors(Growth(small, DecoderConfig.parse(grown)), TensorFiles(source), dtype, seed, device)
    partial = partial_folder(output)
    begin_work(partial)
    writer = ShardWriter(partial, SHARD_BYTES)
    for part in tqdm(tensors.parts(), total=shape["num_hidden_layers"] + 2, unit="part", desc="growing"):
        for name, tensor in part.items():
            writer.add(name, tensor.cpu())
    writer.close()
    write_json(partial / "config.json", grown)
    copy_kept_files(source, partial)
    write_text(partial / "README.md", model_card(small, tensors.growth.large))
    end_work(partial, output)


def grown_config(config: Mapping[str, Any], shape: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of the grown model."""
    kept = {key: value for key, value in config.items() if key not in DERIVED}
    return {**kept, **{key: shape[key] for key in SIZES}, "dtype": str(dtype).removeprefix("torch.")}


def model_card(small: DecoderConfig, large: DecoderConfig) -> str:
    """What the folder holds."""
    return f"""# quasar demo model, grown

The quasar demo model at the cost of a larger one: {large.num_layers} layers of width {large.hidden_size} and
{large.vocab_size:,} tokens compute the function of {small.num_layers} layers of width {small.hidden_size} on its
{small.vocab_size:,} tokens. It is made for timing: it writes what the demo model writes.
"""


def main() -> None:
    """Parse the command line and grow."""
    parser = argparse.ArgumentParser(
        description="Write a model of a published shape that computes the demo's function."
    )
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--like", required=True, help=f"the shape: {', '.join(SHAPES)}")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        grow(DEMO, shape_named("--like", options.like), options.output, seed=options.seed)
    except QuasarError as error:
        parser.exit(2 if isinstance(error, UsageError) else 1, f"Error: {error}\n")


if __name__ == "__main__":
    main()
