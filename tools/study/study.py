"""Measure what each option of quantizing gives: `python -m tools.study.study MODEL… [--only WORDS]`.

Every variant of a model reads the same calibration rows and is measured on the same held-out ones, in float32, so that
a difference is the option's. Models must be small: both copies are in memory. Letters: N rows of L tokens.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel

from quasar_core.checkpoint.gptq_format import QuantizedWeight
from quasar_core.config import QuantizeConfig
from quasar_core.models.hf.causal_lm import TransformersLM, load_target
from quasar_core.models.pair import load_tokenizer
from quasar_core.quantize.blocks.activations import CONTEXT_EVERY, capture_first_inputs
from quasar_core.quantize.blocks.layerwise import quantize_blocks, quantize_head
from quasar_core.quantize.calibration import GREEDY_FROM, Calibration, load_calibration
from quasar_core.quantize.fidelity import measure_fidelity
from quasar_core.quantize.layer_plan import HEAD, LayerPlan
from quasar_core.quantize.mixed_precision import ROWS, measure_widths, spend
from quasar_core.quantize.solve.gptq import SolverConfig
from quasar_core.quantize.solve.hessian import HessianAccumulator
from quasar_core.quantize.text_writers import TransformersWriter
from quasar_core.store.names import resolve_model
from tools.study.distill import distill_scales
from tools.study.lowrank import low_rank_part, rank_of_bytes

USUAL = SolverConfig()
PLAIN = SolverConfig(act_order=False, scale_search=False, sweeps=0)


@dataclass(frozen=True)
class Variant:
    """A way to quantize: the solver's options, its calibration text, and other options."""

    name: str
    solver: SolverConfig = USUAL
    asymmetric: bool = True
    context_every: int = CONTEXT_EVERY  # one of so many rows reads the target's keys and values; 0: none
    samples: int | None = None  # of those there are
    length: int | None = None  # cut from the samples, of which there are more then
    text: str = "self"
    mean_bits: float | None = None
    head_bits: int = 16
    distill: bool = False
    low_rank: bool = False  # a correction in 16 bits, in the bytes that one bit more would take


@dataclass(frozen=True)
class Outcome:
    """How faithful a variant is, its bytes of packed tensors, and the seconds it took."""

    model: str
    variant: str
    kl_mean: float
    kl_p99: float
    agreement_sampled: float
    agreement: float
    packed_bytes: int
    seconds: float


def variants(foreign: str | None) -> list[Variant]:
    """The table's rows: options added one by one, the defaults, then departures from them."""
    ordered = replace(PLAIN, act_order=True)
    searched = replace(ordered, scale_search=True)
    return [
        Variant("in order, no scale search", PLAIN, asymmetric=False),
        Variant("+ act-order", ordered, asymmetric=False),
        Variant("+ scale search", searched, asymmetric=False),
        Variant("+ asymmetric calibration", searched),
        Variant("+ two sweeps (the defaults)", USUAL),
        Variant("keys and values the verifier's own", context_every=0),
        Variant("keys and values all the target's", context_every=1),
        Variant("four sweeps", replace(USUAL, sweeps=4)),
        *(Variant(f"damping {damp:g}", replace(USUAL, damp=damp)) for damp in (0.01, 0.1)),
        *(Variant(f"{count} samples", samples=count) for count in (16, 32, 64)),
        Variant("samples of 128 tokens", length=128),
        *([Variant("foreign text", text=foreign)] if foreign else []),
        Variant("asymmetric codes (--no-sym)", replace(USUAL, sym=False)),
        Variant("groups of 32", replace(USUAL, group_size=32)),
        *(Variant(f"{bits} bits", replace(USUAL, bits=bits)) for bits in (2, 3, 8)),
        *(Variant(f"widths by layer, {bits:g} bits", mean_bits=bits) for bits in (4.0, 4.25)),
        Variant("head at 8 bits", head_bits=8),
        Variant("scales distilled", distill=True),
        Variant("3 bits + low rank, in the bytes of 4", replace(USUAL, bits=3), low_rank=True),
    ]


@dataclass
class Study:
    """A model, and the texts that its variants share."""

    name: str
    target: TransformersLM
    texts: dict[str, Calibration]

    @classmethod
    def open(cls, model: str, samples: int, seed: int, foreign: str | None) -> "Study":
        """Load a model and write, or read, its texts."""
        source = resolve_model(model)
        target = load_target(source.folder, torch.device("cpu"), torch.float32)
        tokenizer, texts = load_tokenizer(source.folder), {}
        for name in ["self", *([foreign] if foreign else [])]:
            config = QuantizeConfig(calibration=name, samples=samples, seq_len=512, seed=seed)
            texts[name] = load_calibration(TransformersWriter(target.model), tokenizer, config, 512)
        return cls(source.label, target, texts)

    def run(self, variant: Variant) -> Outcome:
        """Quantize and measure."""
        begin = time.perf_counter()
        weights = self.quantize(variant)
        dense = {name: weight.dequantize() for name, weight in weights.items()}
        if variant.distill:
            dense = distill_scales(self.target.model, weights, self.texts["self"].samples)
        if variant.low_rank:
            dense = corrected(self.target.model, weights, self.texts["self"].samples)
        seconds = time.perf_counter() - begin
        own = self.texts["self"]
        verifier = TransformersLM(with_weights(self.target.model, dense))
        cache = self.target.new_cache(max(own.held_out.shape[1], own.greedy.shape[1]))
        report = measure_fidelity(self.target, verifier, cache, own.held_out, own.greedy, GREEDY_FROM, own.name)
        size = sum(t.numel() * t.element_size() for weight in weights.values() for t in weight.pack().values())
        return Outcome(
            self.name,
            variant.name,
            report.kl_mean,
            report.kl_p99,
            report.agreement_sampled,
            report.agreement,
            size,
            round(seconds, 1),
        )

    def quantize(self, variant: Variant) -> dict[str, QuantizedWeight]:
        """Every layer's codes."""
        model, samples = self.target.model, self.texts[variant.text].samples[: variant.samples]
        samples = samples if variant.length is None else samples.reshape(-1, variant.length)
        plan = LayerPlan(variant.solver)
        if variant.head_bits < 16:
            plan = LayerPlan(variant.solver, {HEAD: replace(variant.solver, bits=variant.head_bits)})
        if variant.mean_bits is not None:
            groups = measure_widths(model, capture_first_inputs(model, samples[:ROWS]), variant.solver)
            plan = spend(plan, groups, variant.mean_bits)
        activations = capture_first_inputs(model, samples)
        if variant.asymmetric:
            activations.keep_reference(context_every=variant.context_every)
        with tempfile.TemporaryDirectory() as commits:
            blocks = list(quantize_blocks(model, activations, plan, Path(commits)))
            if plan.quantizes_head:
                blocks.append(quantize_head(model, activations, plan, Path(commits)))
        return {
            name: weight
            for block in blocks
            for name, weight in block.weights.items()
            if isinstance(weight, QuantizedWeight)
        }


@torch.no_grad()
def corrected(
    model: PreTrainedModel, weights: Mapping[str, QuantizedWeight], samples: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The dequantized weights with the low-rank part of their errors, in the bytes of one more bit a weight."""
    layers = {name: cast(torch.nn.Linear, model.get_submodule(name)) for name in weights}
    seen = {name: HessianAccumulator(weight.in_features, model.device) for name, weight in weights.items()}
    handles = [
        layers[name].register_forward_pre_hook(lambda _, args, name=name: seen[name].add(args[0])) for name in layers
    ]
    for rows in samples.split(8):
        model(input_ids=rows, use_cache=False)
    for handle in handles:
        handle.remove()
    fixed = {}
    for name, weight in weights.items():
        dense = weight.dequantize()
        rank = rank_of_bytes(weight.codes.numel() // 8, weight.in_features, weight.out_features)
        fixed[name] = dense + low_rank_part(layers[name].weight - dense, seen[name].finish(name), rank)
    return fixed


def with_weights(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """A copy of the model with other weights [out, in] in these layers."""
    copied = copy.deepcopy(model)
    for name, weight in weights.items():  # replaced, not written to: an embedding that is tied keeps its own
        copied.get_submodule(name).weight = torch.nn.Parameter(weight.to(model.dtype), requires_grad=False)
    return copied


def run_study(models: list[str], samples: int, seed: int, foreign: str | None, words: Sequence[str]) -> None:
    """Print a Markdown table of the variants whose names hold one of these words, a row as soon as it is known."""
    print("| model | variant | mean KL | 99th percentile | agreement, sampled | greedy | bytes | s |")
    print("|---|---|---|---|---|---|---|---|")
    for model in models:
        study = Study.open(model, samples, seed, foreign)
        for variant in variants(foreign):
            if any(word in variant.name for word in words):
                print(as_row(study.run(variant)), flush=True)


def as_row(outcome: Outcome) -> str:
    """One line of the table."""
    figures = [f"{value:.4f}" for value in (outcome.kl_p99, outcome.agreement_sampled, outcome.agreement)]
    cells = [outcome.model, outcome.variant, f"{outcome.kl_mean:.5f}", *figures, f"{outcome.packed_bytes:,}"]
    return f"| {' | '.join(cells)} | {outcome.seconds:.0f} |"


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a folder, or demo")
    parser.add_argument("--samples", type=int, default=128, help="rows of 512 tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--foreign", metavar="FILE", help="a text that the model did not write")
    parser.add_argument("--only", default="", help="variants whose name holds one of these, by commas")
    options = parser.parse_args()
    run_study(options.models, options.samples, options.seed, options.foreign, options.only.split(","))


if __name__ == "__main__":
    main()
