"""Part of a GPU bench: text from a target of which the GPU's memory may hold half, beside its verifier, by two arms.

The grown model, of fewer blocks, is written to files and loaded as `--max-device-memory` has it; then PyTorch's
allocator is held to that. Plain decoding and `exact` stream the same blocks, and their texts are compared with those of
the model with all of its weights there. The floor is what was copied ÷ the bandwidth at which the link gave it, and the
time of verify passes.
"""

import gc
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quasar_core.bench.datasets import load_datasets
from quasar_core.config import GenerationConfig, VerifyMode
from quasar_core.decode.generator import Generator
from quasar_core.models.cuda.graph_pass import CudaPass
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.memory.device_offload import DeviceBudget, DevicePlan, plan_within_device
from quasar_core.models.memory.estimate import LEAST_SLACK, pair_need, sweep_bytes
from quasar_core.models.memory.offload import Movable, movable_products
from quasar_core.models.pair import Pair
from quasar_core.models.weights.device_stream import DeviceStream
from quasar_core.models.weights.lean_weights import attach_verifier, load_target
from quasar_core.records import FidelityReport
from tools.demo.grow import DEMO, grow
from tools.gpu_bench.correctness import demo_pair
from tools.gpu_bench.end_to_end import agreement
from tools.gpu_bench.models import (
    GROUP,
    Bench,
    Plan,
    RoundedCopy,
    in_groups,
    kernel_for,
    with_fast_pass,
    with_untuned_pass,
)
from tools.measure_offload import answer, floor_seconds, rate

PART = "offload"
BLOCKS, BITS = 8, 4  # of the large shape, so that files are written in seconds
SHARE = 0.5  # of the blocks' bytes that the memory allowed holds
QUESTIONS = 2
ARMS: dict[str, tuple[VerifyMode, str, int]] = {"plain": ("full", "none", 8), "exact": ("exact", "none", 1)}


def run(bench: Bench) -> None:
    """A row of the plan, one for each arm."""
    bench.report.attempt(PART, "all", lambda: measure(bench))


def measure(bench: Bench) -> None:
    """Write the model, answer with all of it there, then within the memory allowed."""
    plan = bench.plan
    shape = plan.shape if plan.dry else {**plan.shape, "num_hidden_layers": BLOCKS}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        bench.report.say("writing the grown model")
        grow(DEMO, shape, folder, plan.dtype, device=plan.device)
        bench.report.say("written")
        whole = with_fast_pass(load_target(folder, plan.device, plan.dtype), bench.report.progress)
        bench.report.say("making the 4-bit copy")
        copy = RoundedCopy(whole, in_groups(BITS), None)
        verifier = with_untuned_pass(attach_verifier(whole, copy, kernel_for(whole, "triton")))
        reference = answer_whole(bench, whole, verifier)
        offloaded = plan_half(plan, folder, whole)
        target = load_target(
            folder, plan.device, plan.dtype, streamed=offloaded.streamed, link=offloaded.link(plan.device)
        )
        verifier = over(target, verifier)
    del whole, copy
    with held_to(offloaded, plan.device):
        with_fast_pass(target, bench.report.progress)
        with_fast_pass(verifier, bench.report.progress)
        measure_arms(bench, demo_pair(plan, target, verifier, reference.fidelity), offloaded, reference)


@dataclass(frozen=True)
class Reference:
    """What the model says with all of its weights there, and how often its verifier agrees."""

    texts: Sequence[list[int]]
    fidelity: FidelityReport


def prompts(plan: Plan) -> list[str]:
    """The first questions."""
    questions = load_datasets("demo", QUESTIONS)[0].questions
    return [question.turns[0] for question in questions[: min(QUESTIONS, plan.questions)]]


def over(target: LeanDecoder, verifier: LeanDecoder) -> LeanDecoder:
    """The same codes, over another one's embedding and head."""
    place = target.norm, target.head, target.ropes, target.inputs
    return LeanDecoder(target.config, target.embedding, verifier.layers, *place)


def answer_whole(bench: Bench, whole: LeanDecoder, verifier: LeanDecoder) -> Reference:
    """Plain decoding's texts."""
    pair = demo_pair(bench.plan, whole, verifier)
    found = agreement(bench, pair, load_datasets("demo", QUESTIONS)[0], PART)
    answers = answer_all(bench.plan, pair, "plain", divisor=1)
    return Reference([one["tokens"] for one in answers], found)


def answer_all(plan: Plan, pair: Pair, arm: str, divisor: int) -> list[dict[str, Any]]:
    """Answers of an arm, as `tools/measure_offload.py` has them."""
    verify, draft, _ = ARMS[arm]
    count = max(plan.new_tokens // divisor, 2)
    generator = Generator(pair, GenerationConfig(count, verify, draft, ignore_eos=True))
    source = getattr(pair.target, "source", None)
    stream = source if isinstance(source, DeviceStream) else None
    return [answer(generator, pair, prompt, stream) for prompt in prompts(plan)]


def plan_half(plan: Plan, folder: Path, whole: LeanDecoder) -> DevicePlan:
    """What is streamed where memory holds the verifier, all that is no block, and half of the blocks."""
    need = pair_need(folder, None, plan.dtype)
    assert need is not None
    movable = Movable(*movable_products(folder, None), plan.dtype)
    blocks = sum(movable.sizes.values())
    codes = int(blocks / plan.dtype.itemsize * (BITS + 16 / GROUP) / 8)
    workspace = 2 * need.workspace + sweep_bytes(whole.config, plan.dtype)
    need, tokens = replace(need, verifier=codes, workspace=workspace), 1024
    budget = DeviceBudget(need.total(tokens) - int((1 - SHARE) * blocks) + LEAST_SLACK, asked=True)
    found = plan_within_device(movable, need, tokens, budget, moves_all=False)
    return replace(found, pinned=frozenset(found.streamed))


@contextmanager
def held_to(offloaded: DevicePlan, device: torch.device) -> Iterator[None]:
    """Let PyTorch's allocator give no more than what was planned, and the reserve."""
    gc.collect()
    if device.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min((offloaded.held + LEAST_SLACK) / total, 1.0), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def measure_arms(bench: Bench, pair: Pair, offloaded: DevicePlan, reference: Reference) -> None:
    """A row of the plan and the link, then one for each arm."""
    target, on_cuda = pair.target, bench.plan.device.type == "cuda"
    assert isinstance(target, LeanDecoder)
    source = target.source
    assert isinstance(source, DeviceStream)
    source.start()
    note = offloaded.describe(source).removeprefix("offload: ")
    bench.report.add(
        PART, what="plan", note=note, link_gb_per_s=source.link_rate / 1e9, bytes_per_confirm=source.pass_bytes
    )
    is_sure = isinstance(target.fast, CudaPass) and target.fast.steps.name == "Triton"  # else near-ties may differ
    for arm, (_, _, divisor) in ARMS.items():
        answers = answer_all(bench.plan, pair, arm, divisor)
        texts = zip((one["tokens"] for one in answers), reference.texts, strict=True)
        equal = sum(text == whole[: len(text)] for text, whole in texts)
        found = {"answers": answers}
        floor = sum(one["decode_s"] for one in answers) / max(floor_seconds(found, source.link_rate), 1e-9)
        bench.report.add(
            PART,
            arm=arm,
            tokens_per_s=rate(found),
            floor=floor,
            sweeps=sum(one["target_passes"] for one in answers),
            verifies=sum(one["verify_passes"] for one in answers),
            answers=len(answers),
            equal=equal,
            peak_memory_bytes=torch.cuda.max_memory_allocated(bench.plan.device) if on_cuda else None,
            **({"ok": equal == len(answers)} if is_sure else {}),
        )
