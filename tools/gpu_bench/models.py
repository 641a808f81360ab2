"""The models of a GPU bench, made in memory: the demo model grown to a large shape, and low-bit copies of a target."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quasar_core.checkpoint.compressed_tensors import FLOAT8, Float8Weight, PackedWeight
from quasar_core.checkpoint.compressed_tensors import LARGEST as LARGEST_FLOAT
from quasar_core.checkpoint.gptq_format import QuantizedWeight, trivial_groups
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.kernels.triton.adapters import why_not_triton
from quasar_core.models import loading
from quasar_core.models.config.decoder import DecoderConfig
from quasar_core.models.config.shapes import shape_named
from quasar_core.models.cuda.choose import choose_steps, why_not_mixed
from quasar_core.models.cuda.graph_pass import CudaPass
from quasar_core.models.decoder.layer import DenseLinear, Linear
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.decoder.linear import (
    Product,
    block_products,
    dense_rows,
    head_product,
    mixture_products,
    stored_shapes,
)
from quasar_core.models.weights.lean_weights import attach_verifier, build_target
from quasar_core.quantize.solve.eight_bit import channel_scales
from quasar_core.quantize.solve.grid import fit_grid
from quasar_core.records import Progress, no_progress
from quasar_core.store.model_config import read_config
from tools.demo.grow import CPU, DEMO, GrownTensors, Growth, grown_config
from tools.gpu_bench.report import Report

GROUP = 128
LARGEST_INTEGER = 127
AT_ONCE = 128_000_000  # weights whose grids are searched at once, in float32 and several copies


@dataclass(frozen=True)
class Plan:
    """How large a GPU bench is: on a GPU the 8B shape, in a dry run the smallest that holds the demo model."""

    device: torch.device
    dtype: torch.dtype
    shape: dict[str, Any]
    headline: tuple[int, ...]  # tokens of the passes that are timed first
    tokens: tuple[int, ...]
    contexts: tuple[int, ...]
    rounds: int
    questions: int
    new_tokens: int
    samples: int
    sample_length: int
    architectures: int  # of which tiny models are compared with transformers
    dry: bool

    @classmethod
    def full(cls, device: torch.device) -> "Plan":
        """What the first GPU is asked."""
        shape = shape_named("--shape", "qwen3-8b")
        tokens = (1, 2, 4, 6, 8, 16, 33)
        return cls(
            device, torch.bfloat16, shape, (1, 4, 8, 16, 33), tokens, (512, 8192), 20, 6, 192, 128, 512, 8, dry=False
        )

    @classmethod
    def dry_run(cls) -> "Plan":
        """Every step on the CPU."""
        sizes = {"num_hidden_layers": 5, "hidden_size": 1024, "intermediate_size": 512, "num_attention_heads": 4}
        shape = {**shape_named("--shape", "qwen3-0.6b"), **sizes, "num_key_value_heads": 2, "vocab_size": 2048}
        shape |= {"head_dim": 64}
        return cls(torch.device("cpu"), torch.bfloat16, shape, (1, 4), (1, 4), (16, 40), 2, 1, 12, 4, 32, 2, dry=True)

    @property
    def config(self) -> DecoderConfig:
        """The grown model's, in the decoder's words."""
        return DecoderConfig.parse(grown_config(read_config(DEMO), self.shape, self.dtype))


@dataclass(frozen=True)
class Bench:
    """One run: what is measured, where it is written, and the bytes per second that floors are computed from."""

    plan: Plan
    report: Report
    bandwidth: float


class GrownFiles(TensorFiles):
    """The grown model's tensors in the place of files, made part by part on the device."""

    def __init__(self, plan: Plan) -> None:
        self.folder = Path("the demo model, grown")
        small = DecoderConfig.parse(read_config(DEMO))
        self._shapes = stored_shapes(plan.config)
        self._tensors = GrownTensors(Growth(small, plan.config), TensorFiles(DEMO), plan.dtype, 0, plan.device)

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._shapes[name]

    def load_many(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors in the order in which they are made."""
        for part in self._tensors.parts():
            yield from ((name, tensor) for name, tensor in part.items() if name in names)


def grown_target(plan: Plan, progress: Progress = no_progress) -> LeanDecoder:
    """The demo model's function at the cost of the plan's shape."""
    return with_fast_pass(build_target(plan.config, GrownFiles(plan), plan.device, plan.dtype), progress)


def with_fast_pass(decoder: LeanDecoder, progress: Progress = no_progress, fast: bool = False) -> LeanDecoder:
    """The decoder with its fast pass; on the CPU with the steps of the CUDA pass, so that a dry run walks them."""
    if decoder.device.type != "cuda":
        return with_untuned_pass(decoder)
    loading.attach(decoder, progress, fast)
    return decoder


def with_untuned_pass(decoder: LeanDecoder) -> LeanDecoder:
    """The decoder with a pass whose block shapes are the rule of thumb's: right, and made at once.

    Experts have none without Triton.
    """
    steps, why = choose_steps(decoder.device, decoder.dtype)
    decoder.fast = None if why_not_mixed(decoder, steps, why) else CudaPass(decoder, steps)
    return decoder


Rounding = Callable[[torch.Tensor], PackedWeight]  # a weight [out, in] → its codes


class RoundedCopy(VerifierCheckpoint):
    """A target's own weights, rounded to nearest on the device, in the place of a stored checkpoint.

    Without a rounding, blocks or head stay as they are.
    """

    own_norms = False

    def __init__(self, target: LeanDecoder, body: Rounding | None, head: Rounding | None) -> None:
        self.folder = Path("rounded copy")
        self.tensors = OwnBiases(target)
        self._ways: dict[str, tuple[DenseLinear, Rounding]] = {}
        ways = [(*each, body) for each in block_parts(target)] + [(head_product(target.config), target.head, head)]
        for product, own, rounding in ways:
            if rounding:
                for index, name in enumerate(product.names):
                    part = dense_rows(own, product, product.part(index))
                    assert isinstance(part, DenseLinear)
                    self._ways[name] = part, rounding

    @property
    def layer_names(self) -> list[str]:
        """Modules whose weight is rounded."""
        return list(self._ways)

    def parts(self, layer: str) -> tuple[str, ...]:
        """Its layers have the model's names."""
        return (layer,)

    def layer(self, name: str, device: torch.device = CPU) -> PackedWeight:
        """One layer's codes, where its rounding puts them."""
        linear, rounding = self._ways[name]
        return rounding(linear.weight)


def block_parts(target: LeanDecoder) -> Iterator[tuple[Product, Linear]]:
    """The products of all blocks, with their layers; of a mixture those of its experts."""
    for index, layer in enumerate(target.layers):
        for field, product in block_products(target.config, index).items():
            yield product, getattr(layer, field)
        mixture = mixture_products(target.config, index)
        if mixture is not None and layer.experts is not None:
            yield from zip(mixture.of_experts, layer.experts.linears, strict=True)


class OwnBiases(TensorFiles):
    """The biases of a target, by the names that a checkpoint stores them under."""

    def __init__(self, target: LeanDecoder) -> None:
        self.folder = Path("rounded copy")
        self._biases: dict[str, torch.Tensor] = {}
        for product, own in block_parts(target):
            if isinstance(own, DenseLinear) and own.bias is not None:
                parts = own.bias.split(list(product.rows))
                self._biases |= {f"{name}.bias": part for name, part in zip(product.names, parts, strict=True)}

    def __contains__(self, name: str) -> bool:
        return name in self._biases

    def load(self, name: str) -> torch.Tensor:
        """One bias."""
        return self._biases[name]


def in_groups(bits: int, search: bool = False) -> Rounding:
    """Codes of so many bits in groups of 128; on grids that are searched, on a GPU, where what they say counts."""

    def rounded(weight: torch.Tensor) -> QuantizedWeight:
        out, columns = weight.shape
        parts = [_round_rows(rows, bits, search and rows.is_cuda) for rows in weight.split(max(1, AT_ONCE // columns))]
        codes, scales = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return QuantizedWeight(
            bits,
            GROUP,
            codes.view(out, columns).t().contiguous(),
            scales.view(out, -1).t().to(torch.float16).contiguous(),
            torch.full((columns // GROUP, out), 2 ** (bits - 1), dtype=torch.int32, device=weight.device),
            trivial_groups(columns, GROUP).to(weight.device),
        )

    return rounded


def _round_rows(weight: torch.Tensor, bits: int, search: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of some outputs: every group of every output is a row with a grid of its own."""
    rows = weight.reshape(-1, GROUP).float()
    grid = fit_grid(rows, bits, group_size=-1, sym=True, search=search)
    return grid.nearest_codes(rows, 0).to(torch.uint8), grid.scales


def to_integers(weight: torch.Tensor) -> QuantizedWeight:
    """8 bits around 128, one scale for each output: what `--method w8a8` stores of a weight that is not smoothed."""
    scales = channel_scales(weight, LARGEST_INTEGER)
    codes = torch.round(weight.float() / scales[:, None]).clamp(-LARGEST_INTEGER, LARGEST_INTEGER) + 128
    zeros = torch.full((1, len(weight)), 128, dtype=torch.int32, device=weight.device)
    groups = trivial_groups(weight.shape[1], -1).to(weight.device)
    return QuantizedWeight(8, -1, codes.t().to(torch.uint8).contiguous(), scales[None].half(), zeros, groups)


def to_floats(weight: torch.Tensor) -> Float8Weight:
    """e4m3, one scale for each output: the same of `--method fp8`."""
    scales = channel_scales(weight, LARGEST_FLOAT)
    return Float8Weight((weight.float() / scales[:, None]).clamp(-LARGEST_FLOAT, LARGEST_FLOAT).to(FLOAT8), scales)


@dataclass(frozen=True)
class Verifier:
    """How blocks are rounded, and the kernel that runs them on a GPU: the one that the bench asks about."""

    body: Rounding
    kernel: str = "auto"


VERIFIERS = {
    "4-bit": Verifier(in_groups(4)),
    "4-bit, searched": Verifier(in_groups(4, search=True)),
    "w8a16": Verifier(to_integers, "triton"),
    "w8a8": Verifier(to_integers, "triton-int8"),
    "fp8": Verifier(to_floats, "triton-float8"),
}


def rounded_verifier(target: LeanDecoder, name: str, progress: Progress = no_progress) -> LeanDecoder:
    """A low-bit copy of a target, over the target's own embedding and norms."""
    verifier = VERIFIERS[name]
    copy = RoundedCopy(target, verifier.body, None)
    return with_fast_pass(attach_verifier(target, copy, kernel_for(target, verifier.kernel), progress), progress)


def small_verifier(target: LeanDecoder) -> LeanDecoder:
    """A 4-bit copy that is made at once: no kernel is measured for it and none tuned."""
    copy = RoundedCopy(target, in_groups(4), None)
    return with_untuned_pass(attach_verifier(target, copy, kernel_for(target, "triton")))


def with_head_of(bits: int, verifier: LeanDecoder, target: LeanDecoder) -> LeanDecoder:
    """A verifier that shares another one's blocks and has a head of so many bits."""
    head = attach_verifier(target, RoundedCopy(target, None, in_groups(bits)), kernel_for(target)).head
    return with_fast_pass(
        LeanDecoder(target.config, target.embedding, verifier.layers, target.norm, head, target.ropes)
    )


def kernel_for(target: LeanDecoder, wanted: str = "auto") -> str:
    """The wanted one or the measured choice on a GPU, where Triton runs; a dry run measures no kernels."""
    if target.device.type != "cuda":
        return "dense"
    return "auto" if why_not_triton(target.device, target.dtype) else wanted
