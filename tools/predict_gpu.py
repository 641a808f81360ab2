"""Predict what a pass takes on a GPU from counts alone, to be held against the first measurements.

    PYTHONPATH=. python -m tools.predict_gpu [--shape qwen3-8b] > docs/results/gpu-predictions.md

Of each launch: the bytes that it reads ÷ the bandwidth that its programs can keep busy (Little's law: bytes under way ÷
latency), or the instructions that it issues ÷ what the multiprocessors issue, whichever is longer; then what a launch
costs in a graph. Counts of registers, shared memory and instructions are those of the compiled kernels. Nothing here
was measured on a GPU.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from quasar_core.models.config.decoder import DecoderConfig
from quasar_core.models.config.shapes import shape_named
from quasar_core.models.decoder.linear import block_products, head_product

CONTEXT = 512
TOKENS = 1
LATENCY_S = 0.9e-6  # of a read under load, from memory
LAUNCH_S = 1.3e-6  # in a graph (Hazy Research, 2025, on an H100)
SMALL_S = 2.0e-6  # a kernel of a few microseconds that reads next to nothing
JOINED_READS = 3  # one after the other, of attention that rotates and merges: heads, a counter, shares
MOST_PROGRAMS = 4  # of a multiprocessor, by their registers
READ = 0.93  # of the bandwidth on paper, by a kernel that does nothing but read


@dataclass(frozen=True)
class Gpu:
    """A device, by its maker's data sheet."""

    name: str
    gb_per_s: float
    multiprocessors: int
    shared_kb: int  # of a multiprocessor
    ghz: float
    capability: str  # whose code it runs


GPUS = (
    Gpu("H200", 4800, 132, 228, 1.755, "9.0"),
    Gpu("H100 SXM", 3350, 132, 228, 1.755, "9.0"),
    Gpu("RTX 5090", 1792, 170, 100, 2.41, "12.0"),
    Gpu("RTX 4090", 1008, 128, 100, 2.52, "8.x"),
    Gpu("RTX 3060", 360, 28, 100, 1.78, "8.x"),
)


@dataclass(frozen=True)
class Compiled:
    """A product's kernel as it was compiled: of a program's step, and how many steps are read ahead."""

    name: str
    bits: float  # that are read for each weight, scales included
    step_bytes: int
    shared_kb: int
    stages: int
    instructions: float  # of a lane, for each weight

    def programs(self, gpu: Gpu) -> int:
        """Of a multiprocessor at once; one at least, since the tuner drops what does not fit."""
        return min(max(gpu.shared_kb // self.shared_kb, 1), MOST_PROGRAMS)

    def seconds(self, weights: int, gpu: Gpu) -> float:
        """Of one product."""
        under_way = gpu.multiprocessors * self.programs(gpu) * (self.stages - 1) * self.step_bytes
        rate = min(READ * gpu.gb_per_s * 1e9, under_way / LATENCY_S)
        issued = gpu.multiprocessors * 128 * gpu.ghz * 1e9  # lanes: four schedulers of a warp each
        reading, computing = weights * self.bits / 8 / rate, weights * self.instructions / issued
        return max(reading, computing) + LATENCY_S


DENSE = Compiled("16 bits", 16, 16384, 80, 4, 0.6)
CODES = {
    "9.0": Compiled("4 bits", 4.125, 16896, 49, 3, 2.46),
    "8.x": Compiled("4 bits", 4.125, 16896, 25, 2, 2.92),
    "12.0": Compiled("4 bits", 4.125, 16896, 25, 2, 2.29),
}
EIGHT = {
    "9.0": Compiled("8 bits", 8.125, 16640, 41, 3, 4.41),
    "8.x": Compiled("8 bits", 8.125, 16640, 21, 2, 5.40),
    "12.0": Compiled("8 bits", 8.125, 16640, 21, 2, 4.30),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Predict the passes of a shape on GPUs that are not here.")
    parser.add_argument("--shape", default="qwen3-8b")
    options = parser.parse_args()
    config = DecoderConfig.parse({**shape_named("--shape", options.shape), "dtype": "bfloat16"})
    print("\n".join(page(config, options.shape)))


def page(config: DecoderConfig, shape: str) -> Iterator[str]:
    """The predictions as a page of Markdown."""
    yield "# What passes on GPUs should take: predictions"
    yield ""
    yield f"Made by `tools/predict_gpu.py` from counts, for {shape} after {CONTEXT} positions, one token"
    yield "a pass. Nothing here was measured: it was written down before the first run, to be held against it."
    yield ""
    kinds = ("16 bits", "4 bits, head of 16", "4 bits, head of 8 (the default)")
    yield "Milliseconds; the floor is the bytes ÷ the bandwidth of the data sheet. An 8B pair does not fit into 12 GB:"
    yield "the figures of the RTX 3060 are of its arithmetic alone."
    yield ""
    columns = " | ".join(f"{kind}: floor | predicted" for kind in kinds)
    yield f"| GPU | {columns} | verify ÷ confirm |"
    yield f"|{'---|' * (2 * len(kinds) + 2)}"
    yield from (row(config, gpu) for gpu in GPUS)
    yield ""
    yield "With `--fast`, heads of 8 bits: seven launches a layer where norms join the products around them, five where"
    yield "attention rotates and merges too, whose last program then reads its shares when the others are done."
    yield ""
    yield "| GPU | 16 bits: of seven | of five | 4 bits: of seven | of five | verify ÷ confirm, of five |"
    yield "|---|---|---|---|---|---|"
    yield from (joined_row(config, gpu) for gpu in GPUS)


def row(config: DecoderConfig, gpu: Gpu) -> str:
    """One GPU's, in ms."""
    codes, head = CODES[gpu.capability], EIGHT[gpu.capability]
    kinds = ((DENSE, DENSE), (codes, DENSE), (codes, head))
    floors = [1000 * floor(config, gpu, *kind) for kind in kinds]
    times = [1000 * predicted(config, gpu, *kind) for kind in kinds]
    cells = " | ".join(f"{least:.2f} | {time:.2f}" for least, time in zip(floors, times, strict=True))
    return f"| {gpu.name} | {cells} | {times[2] / times[0]:.2f} |"


def joined_row(config: DecoderConfig, gpu: Gpu) -> str:
    """One GPU's with norms that have no launches, then with rotation and merge that have none either, in ms."""
    kinds = ((DENSE, DENSE), (CODES[gpu.capability], EIGHT[gpu.capability]))
    times = [[1000 * predicted(config, gpu, *kind, launches=count) for count in (7, 5)] for kind in kinds]
    (_, confirm), (_, verify) = times
    cells = " | ".join(f"{time:.2f}" for pair in times for time in pair)
    return f"| {gpu.name} | {cells} | {verify / confirm:.2f} |"


def weights_of(config: DecoderConfig) -> list[int]:
    """Of the products of all blocks, in order."""
    products = (product for index in range(config.num_layers) for product in block_products(config, index).values())
    return [sum(product.rows) * product.columns for product in products]


def head_weights(config: DecoderConfig) -> int:
    """Of the head."""
    product = head_product(config)
    return sum(product.rows) * product.columns


def states_bytes(config: DecoderConfig) -> int:
    """Keys and values that a pass reads."""
    return sum(2 * block.kv_heads * block.head_size * 2 * CONTEXT for block in config.blocks)


def floor(config: DecoderConfig, gpu: Gpu, body: Compiled, head: Compiled) -> float:
    """Seconds that the bytes take at the bandwidth on paper."""
    size = sum(weights_of(config)) * body.bits / 8 + head_weights(config) * head.bits / 8 + states_bytes(config)
    return size / (gpu.gb_per_s * 1e9)


def predicted(config: DecoderConfig, gpu: Gpu, body: Compiled, head: Compiled, launches: int = 9) -> float:
    """Seconds of all launches: nine a layer are four products, two norms, rotation, attention and its merge.

    Of seven the norms join products; of five rotation and merge join attention.
    """
    gates = 0 if body is DENSE or launches < 9 else 1  # in 16 bits, and where norms join products, it ends its product
    small = launches - 4 + gates
    waits = config.num_layers * JOINED_READS * LATENCY_S if launches == 5 else 0.0
    all_launches = config.num_layers * (4 + small) + 8
    products = sum(body.seconds(weights, gpu) for weights in weights_of(config))
    attention = states_bytes(config) / (READ * gpu.gb_per_s * 1e9)
    rest = config.num_layers * small * SMALL_S + attention + waits
    return products + head.seconds(head_weights(config), gpu) + rest + all_launches * LAUNCH_S


if __name__ == "__main__":
    main()
