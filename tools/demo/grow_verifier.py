"""Write the verifier of a grown model: `python -m tools.demo.grow_verifier VERIFIER GROWN OUTPUT`.

VERIFIER is one of the demo model, as `quasar quantize demo` makes it; GROWN is what `tools.demo.grow` has made of that
model. The codes of VERIFIER stand where `grow` puts the weights that they are of, their scales doubled where those are;
all else is zero. So OUTPUT computes VERIFIER's function as GROWN computes the demo's, it agrees with its target as
often, and the fidelity that was measured of the small pair, margin table included, is that of the large one. Writing it
takes seconds; two cores would quantize 1.7 billion parameters for hours.

Letters: D head size; primes mark the grown model.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from quasar_core.checkpoint.card import CARD_VERSION
from quasar_core.checkpoint.checks import KEY as DIGESTS
from quasar_core.checkpoint.compressed_tensors import PackedWeight
from quasar_core.checkpoint.gptq_format import QuantizedWeight, trivial_groups
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.checkpoint.writer import ShardWriter, copy_kept_files
from quasar_core.errors import QuasarError, UsageError
from quasar_core.files import exists, write_json
from quasar_core.models.config.decoder import DecoderConfig
from quasar_core.models.decoder.linear import block_products
from quasar_core.store.fingerprint import fingerprint
from quasar_core.store.folders import CARD, begin_work, end_work, partial_folder, refuse_place
from quasar_core.store.model_config import read_config
from tools.demo.grow import SHARD_BYTES, Growth

NONE = -1  # of an output or input that the small model does not have


@dataclass(frozen=True)
class Places:
    """Of each output [out'] and input [in'] of a grown layer the one that it stands for, or NONE; outputs' factors."""

    outputs: torch.Tensor
    inputs: torch.Tensor
    factors: torch.Tensor


def places_of(growth: Growth, layer: str, outputs: int, inputs: int) -> Places:
    """Where `grow` puts the weights of a layer of the demo's blocks, such as `self_attn.q_proj`; see there."""
    small, width = growth.small, growth.small.hidden_size
    states = torch.arange(small.num_kv_heads)
    asking = growth.channels(growth.query_heads(), growth.stretch)
    own_states = torch.arange(small.num_kv_heads * small.head_size)
    standing: dict[str, Callable[[], tuple[torch.Tensor, torch.Tensor]]] = {
        "self_attn.q_proj": lambda: (_at(outputs, asking), _first(inputs, width)),
        "self_attn.k_proj": lambda: (
            _at(outputs, growth.channels(states, 1), own_states.repeat_interleave(growth.stretch)),
            _first(inputs, width),
        ),
        "self_attn.v_proj": lambda: (_at(outputs, growth.channels(states, growth.stretch)), _first(inputs, width)),
        "self_attn.o_proj": lambda: (_in_stream(growth, outputs), _at(inputs, asking)),
        "mlp.gate_proj": lambda: (_first(outputs, small.intermediate_size), _first(inputs, width)),
        "mlp.up_proj": lambda: (_first(outputs, small.intermediate_size), _first(inputs, width)),
        "mlp.down_proj": lambda: (_in_stream(growth, outputs), _first(inputs, small.intermediate_size)),
    }
    factors = torch.ones(outputs)
    if layer in ("self_attn.o_proj", "mlp.down_proj"):
        factors[:width] = 2
    return Places(*standing[layer](), factors)


def _at(size: int, places: torch.Tensor, own: torch.Tensor | None = None) -> torch.Tensor:
    """[size], where `own`, or 0, 1, 2, …, stand at these places."""
    found = torch.full((size,), NONE)
    found[places] = torch.arange(len(places)) if own is None else own
    return found


def _first(size: int, count: int) -> torch.Tensor:
    return _at(size, torch.arange(count))


def _in_stream(growth: Growth, size: int) -> torch.Tensor:
    """Outputs that write to the residual stream: the doubled block, the plain ones, and those that hold nothing."""
    filled = (1 + growth.plain_blocks) * growth.small.hidden_size
    return _at(size, torch.arange(filled), torch.arange(filled) % growth.small.hidden_size)


def grown_layer(weight: PackedWeight, places: Places) -> QuantizedWeight:
    """The codes at their places, and zeros elsewhere.

    QuasarError where a group would need two scales, or where weights are floats.
    """
    if not isinstance(weight, QuantizedWeight):
        raise QuasarError("the verifier's weights are 8-bit floats: make it in GPTQ's format.")
    count = len(places.inputs)
    size = count if weight.group_size == -1 else weight.group_size
    outputs, groups = places.outputs.clamp(min=0), _groups(weight, places.inputs, size)
    g_idx = trivial_groups(count, size)
    zeros = weight.zeros[groups][:, outputs]
    codes = weight.codes[places.inputs.clamp(min=0)][:, outputs]
    outside = (places.inputs == NONE)[:, None] | (places.outputs == NONE)
    codes = torch.where(outside, zeros[g_idx.long()].to(torch.uint8), codes)
    scales = weight.scales[groups][:, outputs] * places.factors.half()
    return QuantizedWeight(weight.bits, size, codes, scales, zeros, g_idx)


def _groups(weight: QuantizedWeight, inputs: torch.Tensor, size: int) -> torch.Tensor:
    """Of each grown group [G'] the small one whose inputs stand in it; any where none do."""
    if len(inputs) % size:
        raise QuasarError(f"{len(inputs)} inputs are not a multiple of the verifier's groups of {size}.")
    own = torch.where(inputs == NONE, NONE, weight.g_idx[inputs.clamp(min=0)].long()).view(-1, size)
    found = own.amax(1)
    if ((own != found[:, None]) & (own != NONE)).any():
        raise QuasarError(
            "inputs of two of the verifier's groups would share one: make it with a smaller --group-size."
        )
    return found.clamp(min=0)


class GrownVerifier:
    """The packed layers of a grown verifier, in order."""

    def __init__(self, verifier: VerifierCheckpoint, grown: Path) -> None:
        self.verifier = verifier
        self.growth = Growth(DecoderConfig.parse(verifier.config), DecoderConfig.parse(read_config(grown)))
        self._empty: dict[str, dict[str, torch.Tensor]] = {}  # by the layer's name in its block: they are alike

    def layers(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Each layer's name, and its tensors by their suffix."""
        for block in range(self.growth.large.num_layers):
            for product in block_products(self.growth.large, block).values():
                for name, outputs in zip(product.names, product.rows, strict=True):
                    yield name, self._layer(block, name, outputs, product.columns)

    def _layer(self, block: int, name: str, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
        prefix = f"model.layers.{block}."
        layer = name.removeprefix(prefix)
        if block < self.growth.small.num_layers:
            return grown_layer(self.verifier.layer(name), places_of(self.growth, layer, outputs, inputs)).pack()
        if layer not in self._empty:
            nothing = Places(torch.full((outputs,), NONE), torch.full((inputs,), NONE), torch.ones(outputs))
            self._empty[layer] = grown_layer(self.verifier.layer(f"model.layers.0.{layer}"), nothing).pack()
        return self._empty[layer]


def grow_verifier(source: Path, grown: Path, output: Path) -> None:
    """Write into `output` the verifier of the grown model. UsageError where the output exists."""
    if exists(output):
        raise UsageError(f"{output} exists; name another folder.")
    for place in (source, grown):
        refuse_place(output, place)
    verifier = VerifierCheckpoint(source)
    small = DecoderConfig.parse(verifier.config)
    in_blocks = {
        name for block in range(small.num_layers) for p in block_products(small, block).values() for name in p.names
    }
    if set(verifier.layer_names) != in_blocks:
        raise QuasarError(f"{source} must have codes for all layers of its blocks, and for no other layer.")
    partial = partial_folder(output)
    begin_work(partial)
    writer, packed = ShardWriter(partial, SHARD_BYTES), set[str]()
    for name, tensors in GrownVerifier(verifier, grown).layers():
        packed.add(f"{name}.weight")
        for suffix, tensor in tensors.items():
            writer.add(f"{name}.{suffix}", tensor)
    files = TensorFiles(grown)
    for name, tensor in files.load_many([name for name in files.names() if name not in packed]):
        writer.add(name, tensor)
    digests = writer.close()
    copy_kept_files(grown, partial)
    write_json(
        partial / "config.json", {**read_config(grown), "quantization_config": verifier.config["quantization_config"]}
    )
    card = {"target": {"name": grown.name, "fingerprint": fingerprint(grown)}, DIGESTS: digests}
    write_json(partial / CARD, {"format_version": CARD_VERSION, **card, "report": verifier.card.get("report")})
    end_work(partial, output)


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in (("verifier", "of the demo model"), ("grown", "the model"), ("output", "folder to write")):
        parser.add_argument(name, type=Path, help=what)
    options = parser.parse_args()
    try:
        grow_verifier(options.verifier, options.grown, options.output)
    except QuasarError as error:
        parser.exit(2 if isinstance(error, UsageError) else 1, f"Error: {error}\n")


if __name__ == "__main__":
    main()
