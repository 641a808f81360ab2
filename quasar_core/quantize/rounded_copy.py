"""Make a low-bit copy of a model in minutes: every layer of its blocks rounded to the nearest code.

It needs no text and holds one layer at a time. It is no verifier to keep: what it writes is nearly what the model would
write, and that serves to quantize the model well (`text_plan.py`).
"""

from pathlib import Path

from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.checkpoint.writer import ShardWriter, copy_kept_files
from quasar_core.config import GROUP_CHOICES
from quasar_core.files import write_json
from quasar_core.models.config.decoder import DecoderConfig
from quasar_core.models.decoder.linear import block_products, mixture_products
from quasar_core.quantize.blocks.rounding import rounded
from quasar_core.quantize.group_size import largest_dividing
from quasar_core.quantize.solve.gptq import SolverConfig
from quasar_core.records import Progress, no_progress
from quasar_core.store.model_config import read_config

BITS = 4
PACKED = 32  # sizes that GPTQ's format packs are a multiple of it, in any number of bits


def write_rounded(model: Path, folder: Path, bits: int = BITS, progress: Progress = no_progress) -> None:
    """Write a checkpoint whose blocks' layers are rounded to `bits`; the folder must not exist."""
    folder.mkdir(parents=True)
    files, writer, config = TensorFiles(model), ShardWriter(folder), read_config(model)
    layers = layers_of_blocks(DecoderConfig.parse(config))
    group = largest_dividing(layers) or GROUP_CHOICES[-1]
    names = files.names()
    for done, name in enumerate(names):
        progress("rounding a copy", done, len(names))
        weight, layer = files.load(name), name.removesuffix(".weight")
        if layer not in layers:
            writer.add(name, weight)
            continue
        for part, tensor in rounded(weight.float(), SolverConfig(bits, group)).pack().items():
            writer.add(f"{layer}.{part}", tensor)
    writer.close()
    copy_kept_files(model, folder)
    section = {"quant_method": "gptq", "bits": bits, "group_size": group, "checkpoint_format": "gptq", "sym": True}
    write_json(folder / "config.json", {**config, "quantization_config": section})
    progress("rounding a copy", len(names), len(names))


def layers_of_blocks(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of the layers of all blocks, experts among them, that GPTQ's format can pack."""
    sizes = dict[str, tuple[int, int]]()
    for block in range(config.num_layers):
        products = [*block_products(config, block).values()]
        experts = mixture_products(config, block)
        products += [*experts.gate_up, *experts.down] if experts else []
        for product in products:
            sizes |= {name: (rows, product.columns) for name, rows in zip(product.names, product.rows, strict=True)}
    return {name: (out, columns) for name, (out, columns) in sizes.items() if out % PACKED == 0 == columns % PACKED}


def rounded_bytes(config: DecoderConfig, weights: int, bits: int, element: int) -> int:
    """Bytes of a copy in memory: codes, a scale and a zero for each group, all else in numbers of so many bytes."""
    coded = sum(out * columns for out, columns in layers_of_blocks(config).values())
    return (coded * bits + coded // PACKED * (16 + bits)) // 8 + (weights - coded) * element
