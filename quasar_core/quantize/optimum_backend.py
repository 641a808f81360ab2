"""`--backend optimum`: GPTQ by optimum's GPTQQuantizer and GPTQModel, in place of our own solver.

Only their codes are taken. Packing, files, card and fidelity are the same as the native backend's, so that the two can
be compared and everything that reads one checkpoint reads the other. Letters: out and in the layer's sizes, G groups.
"""

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from quasar_core.checkpoint.gptq_format import QuantizedWeight
from quasar_core.config import QuantizeConfig
from quasar_core.errors import QuasarError, UsageError
from quasar_core.foreign_bars import hidden_bars
from quasar_core.quantize.blocks.activations import BATCH_TOKENS
from quasar_core.quantize.blocks.streaming import find_blocks
from quasar_core.quantize.commits import QuantizedBlock
from quasar_core.records import Progress, no_progress

REQUIRED = ("optimum", "gptqmodel")


def quantize_with_optimum(
    source: Path,
    tokenizer: PreTrainedTokenizerBase,
    samples: torch.Tensor,
    config: QuantizeConfig,
    progress: Progress = no_progress,
) -> list[QuantizedBlock]:
    """Quantize every block of the model in `source` on samples [N, L]; the blocks carry no losses.

    UsageError where the packages are missing and for a quantized head, which optimum does not make; QuasarError where
    they fail. On a machine with a GPU they use it.
    """
    check_optimum(config)
    # The codes are read off the rounded weights: bfloat16 has too few digits to tell 8-bit ones apart.
    with hidden_bars():
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    prefix, blocks = find_blocks(model)
    watch_blocks(blocks, progress)
    with quiet_packages():
        solutions = solve_with_optimum(model, tokenizer, samples, config, prefix)
    progress("quantizing", len(blocks), len(blocks))
    weights = {name: read_weight(model.get_submodule(name), *grid, config) for name, grid in solutions.items()}
    return [_block(weights, f"{prefix}.{index}.") for index in range(len(blocks))]


def check_optimum(config: QuantizeConfig) -> None:
    """UsageError for what optimum cannot do, and one that says how to install what is missing; cheap."""
    if config.lm_head_bits != 16:
        raise UsageError("--lm-head-bits needs --backend native: optimum leaves the head as it is.")
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"--backend optimum needs {' and '.join(missing)}: run pip install 'quasar-cli[gptqmodel]', "
            "or leave the option out."
        )


def watch_blocks(blocks: torch.nn.ModuleList, progress: Progress) -> None:
    """Report a block when a pass first enters it: optimum works on one block after the other."""
    reported: set[int] = set()

    def report(index: int, *_: Any) -> None:
        if index not in reported:
            reported.add(index)
            progress("quantizing", index, len(blocks))

    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(functools.partial(report, index))


@contextlib.contextmanager
def quiet_packages() -> Iterator[None]:
    """Keep the packages' banners off stdout, which is for results, and their bars and logs off the screen."""
    # With a single worker its thread pool raises.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, (os.cpu_count() or 1) // 2)))
    with contextlib.redirect_stdout(sys.stderr), hidden_bars():
        module: Any = _import("optimum.gptq.quantizer")
        level = module.logger.level
        module.logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            module.logger.setLevel(level)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise QuasarError(f"--backend optimum: {name} does not import here ({error}).") from error


def solve_with_optimum(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: torch.Tensor,
    config: QuantizeConfig,
    prefix: str,
) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Round the model's weights in place; per layer its scales [out, G], zeros [out, G] and g_idx [in]."""
    from optimum.gptq import GPTQQuantizer

    class UnpackedQuantizer(GPTQQuantizer):  # type: ignore[misc]
        """Leaves the rounded weights in the model: our own writer packs them."""

        def pack_model(self, model: PreTrainedModel, quantizers: dict[str, tuple[Any, ...]]) -> None:
            self.solutions = {name: solution[1:] for name, solution in quantizers.items()}

        def post_init_model(self, model: PreTrainedModel) -> PreTrainedModel:
            return model

    one_group = config.groups_of == -1
    quantizer = UnpackedQuantizer(
        bits=config.bits,
        dataset=[{"input_ids": [row], "attention_mask": [[1] * len(row)]} for row in samples.tolist()],
        group_size=config.groups_of,
        damp_percent=config.damp,
        # Group-aware order keeps g_idx trivial; with one group, so does any order.
        desc_act=config.act_order and one_group,
        act_group_aware=config.act_order and not one_group,
        sym=config.sym,
        model_seqlen=samples.shape[1],
        block_name_to_quantize=prefix,
        batch_size=max(1, BATCH_TOKENS // samples.shape[1]),
        pad_token_id=0,  # asked for by any batch, used by none: the samples are equally long
    )
    try:
        quantizer.quantize_model(model, tokenizer)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise QuasarError(f"optimum could not quantize the model: {first}") from error
    return quantizer.solutions


def read_weight(
    linear: torch.nn.Module, scales: torch.Tensor, zeros: torch.Tensor, g_idx: torch.Tensor, config: QuantizeConfig
) -> QuantizedWeight:
    """The codes of a weight [out, in] that lies on the grid of `scales` [out, G] and `zeros` [out, G]."""
    index = g_idx.cpu().long()
    scales, zeros = scales.float().cpu(), zeros.float().cpu().round()
    weight = cast(torch.Tensor, linear.weight).detach().float().cpu()
    # Version 1 stores zero − 1: where the zero is 0, move the codes up by one, the highest excepted.
    raised = zeros.clamp(min=1)
    codes = (torch.round(weight / scales[:, index]) + raised[:, index]).clamp(0, 2**config.bits - 1)
    return QuantizedWeight(
        config.bits,
        config.groups_of,
        codes.t().to(torch.uint8).contiguous(),
        scales.t().to(torch.float16).contiguous(),
        raised.t().to(torch.int32).contiguous(),
        index.to(torch.int32),
    )


def _block(weights: dict[str, QuantizedWeight], prefix: str) -> QuantizedBlock:
    return QuantizedBlock({name: weight for name, weight in weights.items() if name.startswith(prefix)}, losses={})
