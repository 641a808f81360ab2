"""Part 4 of a GPU bench: quantizing one block of the large shape, and what that makes for the whole model."""

import tempfile
import time
from pathlib import Path

import torch

from quasar_core.bench.synthetic_models import random_transformers_model
from quasar_core.quantize.blocks.activations import capture_first_inputs
from quasar_core.quantize.blocks.layerwise import quantize_blocks
from quasar_core.quantize.solve.gptq import SolverConfig
from tools.gpu_bench.models import Bench

PART = "quantizing"


def run(bench: Bench) -> None:
    """One block on random text: seconds and peak memory."""
    bench.report.attempt(PART, "one block", lambda: quantize_one_block(bench))


def quantize_one_block(bench: Bench) -> None:
    """The block's four products, solved on as much text as `quasar quantize` takes by default."""
    plan = bench.plan
    on_cuda = plan.device.type == "cuda"
    if on_cuda:
        torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated(plan.device) if on_cuda else 0
    model = random_transformers_model({**plan.shape, "num_hidden_layers": 1}, plan.device, plan.dtype).model
    generator = torch.Generator().manual_seed(0)
    samples = torch.randint(plan.shape["vocab_size"], (plan.samples, plan.sample_length), generator=generator)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(plan.device)
    start = time.perf_counter()
    activations = capture_first_inputs(model, samples)
    captured = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        (block,) = quantize_blocks(model, activations, SolverConfig(), Path(folder))
    seconds = time.perf_counter() - captured
    bench.report.add(
        PART,
        what="one block, 4 bits in groups of 128",
        tokens=samples.numel(),
        capture_s=captured - start,
        block_s=seconds,
        layers=plan.shape["num_hidden_layers"],
        model_s=seconds * plan.shape["num_hidden_layers"],
        peak_memory_bytes=torch.cuda.max_memory_allocated(plan.device) - held if on_cuda else None,
        largest_loss=max(block.losses.values()),
    )
