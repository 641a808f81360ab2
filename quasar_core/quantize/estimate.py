"""The plan for a model: its shape read off the skeleton, and what is free on this machine."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from quasar_core.config import QuantizeConfig
from quasar_core.kernels.threads import one_thread
from quasar_core.models.experts import SeparateExperts
from quasar_core.models.shapes import shape_named
from quasar_core.models.skeleton import build_skeleton
from quasar_core.quantize.blocks import find_blocks, quantized_layers
from quasar_core.quantize.calibration import HELD_OUT_ROWS
from quasar_core.quantize.duration import count_work, measure_rates
from quasar_core.quantize.eta import WholeRun, stage_seconds
from quasar_core.quantize.layer_plan import LayerPlan
from quasar_core.quantize.plan import Plan, Shape, make_plan
from quasar_core.quantize.self_text import rows_at_once, token_bytes
from quasar_core.quantize.streaming import StreamedModel
from quasar_core.records import Progress
from quasar_core.store.safetensors_header import read_headers
from quasar_core.system import LoadMeter, free_disk, free_memory

SHARE_OF_MEMORY = 2  # hidden states may fill one part in so many of what is free, unless --max-memory says otherwise


def plan_here(
    source: Path, target: StreamedModel, config: QuantizeConfig, output: Path, max_memory: int | None = None
) -> Plan:
    """The plan for a model on this machine, with what is free here."""
    stored = stored_element(source)
    shape = shape_of(target.skeleton, config, stored, target.dtype.itemsize, target.whole_because)
    on_device, memory = target.device.type != "cpu", free_memory()
    allowed = max_memory or (memory // SHARE_OF_MEMORY if memory else None)
    device_memory = torch.cuda.mem_get_info(target.device)[0] if on_device else None
    plan = make_plan(shape, config, on_device, allowed, device_memory)
    return replace(plan, free_host=memory, free_disk=free_disk(output))


def with_seconds(target: StreamedModel, config: QuantizeConfig, plan: Plan) -> Plan:
    """A plan that says how long it would take here; not where that is not counted: widths by layer, another backend."""
    if config.mixed or config.backend != "native":
        return plan
    shape = shape_of(target.skeleton, config, element=target.dtype.itemsize)
    writer = target.device if plan.text_on_device else torch.device("cpu")
    rows = _rows_written(target, config, plan)
    meter = LoadMeter()
    rates = measure_rates(shape, config, target.device, target.dtype, rows)
    if writer != target.device:
        steps = measure_rates(shape, config, writer, target.dtype, rows)
        rates = replace(rates, steps=steps.steps, launch=steps.launch)
    load = meter.read()
    if load.is_busy and target.device.type == "cpu":  # threads that wait for one another are slowed many times over
        with one_thread():
            rates = rates.at_least(measure_rates(shape, config, target.device, target.dtype, rows))
    return replace(plan, seconds=rates.seconds_of(count_work(shape, config, rows)), others=load.others)


def over_whole_run(target: StreamedModel, config: QuantizeConfig, plan: Plan, progress: Progress) -> Progress:
    """A progress that also tells how far the whole run has come; the one given where that is not counted."""
    if config.mixed or config.backend != "native":
        return progress
    shape = shape_of(target.skeleton, config, element=target.dtype.itemsize)
    return WholeRun(progress, stage_seconds(shape, config, _rows_written(target, config, plan)))


def _rows_written(target: StreamedModel, config: QuantizeConfig, plan: Plan) -> int:
    """Rows of text that the model writes at once."""
    fitting = rows_at_once(target.skeleton, config.calibration_length, plan.text_on_device)
    return min(fitting, config.samples + HELD_OUT_ROWS)


def published_shape(name: str, config: QuantizeConfig) -> Shape:
    """The shape of that name in `models/shapes.py`, in 16 bits."""
    content = shape_named("--like", name)
    options = {key: value for key, value in content.items() if key not in ("model_type", "dtype")}
    return shape_of(build_skeleton(AutoConfig.for_model(content["model_type"], **options), torch.bfloat16), config)


def shape_of(
    skeleton: PreTrainedModel,
    config: QuantizeConfig,
    stored: int = 2,
    element: int = 2,
    whole_because: str | None = None,
) -> Shape:
    """What a plan reads of a model: names and sizes, no weights."""
    quantized = quantized_layers(skeleton, LayerPlan.of(config))
    layers = {name: (linear.out_features, linear.in_features) for name, linear in quantized.items()}
    tied: Any = getattr(skeleton, "all_tied_weights_keys", None) or {}
    sizes = {name: parameter.numel() for name, parameter in skeleton.named_parameters() if name not in tied}
    prefix = find_blocks(skeleton)[0]
    return Shape(
        layers=layers,
        other_weights=sum(size for name, size in sizes.items() if name.removesuffix(".weight") not in layers),
        ends_weights=sum(size for name, size in sizes.items() if not name.startswith(f"{prefix}.")),
        hidden=int(skeleton.config.get_text_config().hidden_size),
        vocabulary=int(skeleton.config.get_text_config().vocab_size),
        stored=stored,
        element=element,
        routed=_routed_share(skeleton),
        token=token_bytes(skeleton, element),
        whole_because=whole_because,
    )


def _routed_share(skeleton: PreTrainedModel) -> float:
    """The share of a text that the router sends to an expert, if it favours none; 1 without experts."""
    experts = [len(module) for module in skeleton.modules() if isinstance(module, SeparateExperts)]
    taken = getattr(skeleton.config.get_text_config(), "num_experts_per_tok", None)
    return taken / experts[0] if experts and taken else 1.0


def stored_element(source: Path) -> int:
    """Bytes of a weight in the files: of the widths that occur, the one that most bytes have."""
    sizes: dict[int, int] = {}
    for entry in read_headers(source):
        element = entry.size // max(1, math.prod(entry.shape))
        sizes[element] = sizes.get(element, 0) + entry.size
    return max(sizes, key=lambda element: sizes[element])
