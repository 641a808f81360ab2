"""Plan a quantization before it begins: bytes of memory and disk by one formula, against what is free here.

Each figure is the sum of what is there at the worst moment. Weights in the files are memory-mapped and count as no
memory on the CPU, since the system may drop their pages. Letters: N rows of L tokens, H hidden, G groups.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quasar_core.config import QuantizeConfig
from quasar_core.draft.successors import width_of
from quasar_core.quantize.blocks.activations import batch_tokens
from quasar_core.quantize.calibration import GREEDY_LENGTH, held_out_rows
from quasar_core.quantize.commits import SHARD_BYTES
from quasar_core.quantize.fidelity import piece_of
from quasar_core.quantize.layer_plan import HEAD, LayerPlan
from quasar_core.quantize.solve.factor import BLOCK as FACTOR_COLUMNS
from quasar_core.quantize.solve.gptq import solver_rows
from quasar_core.quantize.text_plan import Free, TextPlan, choose_text
from quasar_core.quantize.text_writers import LOGIT_BYTES, batch_rows
from quasar_core.system import refuse_too_little

# Measured with the packages of pyproject.toml: the interpreter with torch and transformers, before any weight.
INTERPRETER_BYTES = 350_000_000
# float32 copies at the solver's worst moment: of matrices [in, in] (the Hessian, and the drift or its factor), and of
# the outputs and the factor's columns at work, the reserve included.
SQUARE_COPIES, ROW_COPIES = 2, 12
# Of what the solver's tensors take at their worst moment, at least so much again is planned beside them: for workspaces
# of linear algebra libraries and freed memory that the C library keeps.
SOLVER_RESERVE = 0.1
LIKELY_BYTES = 12  # of a likely token: its id, and its chance
# 32-bit values per token of a batch, in units of the widest layer's inputs and outputs.
BATCH_COPIES = 6
# Of a piece's logits: each model's in the dtype of the passes and in 32 bits, and what comparing them makes.
LOGIT_COPIES = 11


@dataclass(frozen=True)
class Shape:
    """What a plan reads of a model: its layers by name (out, in), and its other weights.

    `stored` and `element` are the bytes of a weight in the files and in the passes, `token` those of a token's keys and
    values. `routed` is the share of a text that
    an expert reads. `whole_because` says why the model is loaded as a whole, where it is.
    """

    layers: Mapping[str, tuple[int, int]]
    other_weights: int
    ends_weights: int
    hidden: int
    vocabulary: int
    stored: int = 2
    element: int = 2
    routed: float = 1.0
    whole_because: str | None = None
    token: int = 0

    @property
    def weights(self) -> int:
        """All of them."""
        return self.other_weights + sum(out * columns for out, columns in self.layers.values())


@dataclass(frozen=True)
class Plan:
    """Bytes, and seconds. `host` and `device` are peaks; on the CPU the device is the host and `device` is 0."""

    checkpoint: int
    bits_per_weight: float
    activations: int
    spilled: bool
    host: int
    device: int
    disk: int
    text: TextPlan
    text_rows: int  # that are written at once
    writes_calibration: bool = True  # else the model writes its greedy text alone
    whole_because: str | None = None
    free_host: int | None = None
    free_disk: int | None = None
    free_device: int | None = None
    seconds: float | None = None  # of the whole run, where they were estimated
    others: float | None = None  # the share of the cores that other programs took while they were

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def make_plan(
    shape: Shape,
    config: QuantizeConfig,
    on_device: bool = False,
    max_memory: int | None = None,
    free_device: int | None = None,
    text: TextPlan | None = None,
) -> Plan:
    """The figures for one model; with `on_device`, blocks run on a GPU with so much memory free.

    The text is written as `text` plans; without one, by transformers, in the room that is usual.
    """
    text = text or _usual_text(shape, free_device if on_device else None)
    solvers = LayerPlan.of(config)
    blocks: dict[str, int] = {}
    for name, (out, columns) in shape.layers.items():
        solver = solvers.solver(name)
        bits = solver.bits if name == HEAD else config.mean_bits or solver.bits
        block = block_of(name)
        blocks[block] = blocks.get(block, 0) + packed_bytes(out, columns, bits, solver.group_size)
    packed = sum(blocks.values())
    written_again = sum(size for size in blocks.values() if size < SHARD_BYTES)
    plain, states = shape.stored * shape.other_weights, activation_bytes(shape, config, on_device)
    spilled = max_memory is not None and states > max_memory
    held = 0 if spilled else states
    quantized = packed + written_again + plain + (states if spilled else 0)
    host = host_stages(shape, config, held, on_device, text)
    return Plan(
        checkpoint=packed + plain,
        bits_per_weight=round(8 * packed / (shape.weights - shape.other_weights), 3),
        activations=states,
        spilled=spilled,
        host=INTERPRETER_BYTES + max(host),
        device=max(device_stages(shape, config, text)) if on_device else 0,
        disk=text_bytes(shape, config, text) + max(written_bytes(shape, config, text) + copy_on_disk(text), quantized),
        text=text,
        text_rows=rows_written(shape, config, text),
        writes_calibration=config.calibration == "self" and not config.reads_no_text,
        whole_because=shape.whole_because,
        free_device=free_device,
    )


def _usual_text(shape: Shape, free_device: int | None) -> TextPlan:
    passes = {2: torch.bfloat16, 4: torch.float32}[shape.element]
    return choose_text(shape.weights, passes, "nobody has asked what is free", Free(device=free_device), True)


def host_stages(
    shape: Shape, config: QuantizeConfig, held: int, on_device: bool, text: TextPlan
) -> tuple[int, int, int]:
    """Bytes of memory while the text is written, blocks are quantized, and fidelity is measured.

    The files are mapped where the passes run in their dtype; a converted model is a copy.
    """
    whole = shape.element * shape.weights
    copied = shape.element != shape.stored or shape.whole_because is not None
    kept, read = whole if shape.whole_because else 0, held_out_bytes(shape, config)
    found = found_bytes(shape, config, text)
    own = text.weights if text.why_not_lean is None else whole if copied else 0
    writing = found + (0 if text.on_device else rows_bytes(shape, config, text) + own)
    if on_device:
        return writing, found + kept + held + block_bytes(shape), kept + read
    ends = 2 * shape.element * shape.ends_weights if copied else 0
    block = block_bytes(shape) + batch_bytes(shape, config, False)
    quantizing = found + kept + held + block + smoothed_bytes(shape, config) + solver_bytes(shape, on_device)
    return writing, quantizing, kept + read + ends + max(block, logit_bytes(shape, config))


def device_stages(shape: Shape, config: QuantizeConfig, text: TextPlan) -> tuple[int, int, int]:
    """Bytes of a GPU's memory in the same stages."""
    writing = text.weights + rows_bytes(shape, config, text) if text.on_device else 0
    batch = batch_bytes(shape, config, True)
    quantizing = block_bytes(shape) + smoothed_bytes(shape, config) + solver_bytes(shape, True) + batch
    ends = 2 * shape.element * shape.ends_weights  # of both models
    return writing, quantizing, ends + max(block_bytes(shape) + batch, logit_bytes(shape, config))


def packed_bytes(out_features: int, in_features: int, bits: float, group_size: int) -> int:
    """Codes, scales, zeros and g_idx of a layer in GPTQ's layout; `bits` may be a mean over layers."""
    groups = 1 if group_size == -1 else -(-in_features // group_size)
    return int(out_features * in_features * bits + groups * out_features * (16 + bits)) // 8 + 4 * in_features


def activation_bytes(shape: Shape, config: QuantizeConfig, on_device: bool = False) -> int:
    """Hidden states of the calibration text, twice: the full-precision model's beside the verifier's.

    On the CPU also the outputs of a block's finished modules (`blocks/activations.py`): of attention and MLP, the
    output of the last layer; the verifier's take the room of its inputs.
    """
    kept: dict[str, int] = {}
    for (block, _), (out, columns) in ({} if on_device else last_layers(shape)).items():
        kept[block] = kept.get(block, 0) + max(out, columns) + out
    tokens = config.texts * config.calibration_length
    return tokens * shape.element * (2 * shape.hidden + max(kept.values(), default=0))


def last_layers(shape: Shape) -> dict[tuple[str, str], tuple[int, int]]:
    """(out, in) of the last layer of every module, by block and module; experts left out."""
    last: dict[tuple[str, str], tuple[int, int]] = {}
    for name, sizes in shape.layers.items():
        parts = re.match(r"(.*?\.\d+)\.(.+)\.", name)  # such as model.layers.0, self_attn
        if parts and ".experts." not in name:
            last[parts[1], parts[2]] = sizes
    return last


def text_bytes(shape: Shape, config: QuantizeConfig, text: TextPlan) -> int:
    """The calibration's token ids, 64 bits each, as they are committed, and what was found beside them."""
    tokens = (config.texts + held_out_rows(config)) * config.calibration_length + held_out_rows(config) * GREEDY_LENGTH
    return 8 * tokens + found_bytes(shape, config, text)


def found_bytes(shape: Shape, config: QuantizeConfig, text: TextPlan) -> int:
    """What the target's passes have found while it wrote: likeliest tokens, and hidden states of what is held out."""
    length = config.calibration_length if config.calibration == "self" else 0  # beside greedy rows
    likeliest = LIKELY_BYTES * width_of(shape.vocabulary) * config.texts * length if text.by_target else 0
    hidden = text.element * shape.hidden * held_out_rows(config) * length if text.remembers else 0
    return likeliest + hidden


def copy_on_disk(text: TextPlan) -> int:
    """Bytes of the copy that writes the text, where one does."""
    return text.weights if text.copy_bits is not None else 0


def rows_written(shape: Shape, config: QuantizeConfig, text: TextPlan) -> int:
    """Rows of the longest text that the model writes at once."""
    length, rows = _longest_text(config)
    return batch_rows(text.room, row_bytes(shape, text, length), rows)


def row_bytes(shape: Shape, text: TextPlan, length: int) -> int:
    """What a row that is being written takes."""
    return shape.token * text.element // shape.element * length + LOGIT_BYTES * shape.vocabulary


def _longest_text(config: QuantizeConfig) -> tuple[int, int]:
    """Tokens of a row, and rows."""
    if config.calibration != "self":
        return GREEDY_LENGTH, held_out_rows(config)
    return config.calibration_length, config.texts + held_out_rows(config)


def rows_bytes(shape: Shape, config: QuantizeConfig, text: TextPlan) -> int:
    """Keys, values and logits of the rows that are written at once."""
    return rows_written(shape, config, text) * row_bytes(shape, text, _longest_text(config)[0])


def written_bytes(shape: Shape, config: QuantizeConfig, text: TextPlan) -> int:
    """Keys and values of the rows that are written at once, which are kept beside them (`text_log.py`)."""
    return rows_bytes(shape, config, text) - rows_written(shape, config, text) * LOGIT_BYTES * shape.vocabulary


def held_out_bytes(shape: Shape, config: QuantizeConfig) -> int:
    """Hidden states of the text that fidelity is measured on, in both models, of greedy text twice in each of them.

    They are always in memory.
    """
    tokens = held_out_rows(config) * (2 * config.calibration_length + 4 * GREEDY_LENGTH)
    return tokens * shape.hidden * shape.element


def block_bytes(shape: Shape) -> int:
    """The largest block as it was and as it becomes, and its codes, a byte each."""
    return (2 * shape.element + 1) * block_weights(shape)


def smoothed_bytes(shape: Shape, config: QuantizeConfig) -> int:
    """The largest block's smoothed weights, in float32 and as the block holds them (`blocks/eight_bit.py`)."""
    return 0 if config.method == "gptq" else (4 + shape.element) * block_weights(shape)


def block_weights(shape: Shape) -> int:
    """Weights of the largest block."""
    blocks: dict[str, int] = {}
    for name, (out, columns) in shape.layers.items():
        if name != HEAD:
            blocks[block_of(name)] = blocks.get(block_of(name), 0) + out * columns
    return max(blocks.values(), default=0)


def block_of(name: str) -> str:
    """Return the number of a layer's block; the head is its own."""
    return name.split(".layers.")[-1].split(".")[0]


def solver_bytes(shape: Shape, on_device: bool) -> int:
    """The solver's workspace for the layers that need most: those of one module that read as many inputs, at once."""
    groups: dict[tuple[str, int], int] = {}
    for name, (out, columns) in shape.layers.items():
        key = name.rpartition(".")[0], columns
        groups[key] = groups.get(key, 0) + out
    needs = []
    for (_, columns), out in groups.items():  # of every output the error correlation, beside the rows at work
        copies = out + ROW_COPIES * (min(out, solver_rows(columns, on_device)) + FACTOR_COLUMNS)
        needs.append(4 * columns * (SQUARE_COPIES * columns + copies))
    return max(needs, default=0)


def batch_bytes(shape: Shape, config: QuantizeConfig, on_device: bool) -> int:
    """What a batch of tokens takes inside a block."""
    most = max(batch_tokens(shape.hidden, on_device), config.calibration_length)
    rows = config.texts or held_out_rows(config)  # the fidelity is read in any case
    tokens = min(most, rows * config.calibration_length)
    widest = max((out + columns for name, (out, columns) in shape.layers.items() if name != HEAD), default=0)
    return 4 * BATCH_COPIES * tokens * widest


def logit_bytes(shape: Shape, config: QuantizeConfig) -> int:
    """Logits of a piece of held-out text in both models, and the copies that comparing them makes."""
    return 4 * shape.vocabulary * LOGIT_COPIES * min(piece_of(shape.vocabulary), config.calibration_length)


def refuse_what_cannot_fit(plan: Plan, output: Path | None) -> None:
    """QuasarError, one sentence, where disk or memory found here are too small."""
    beside = f" beside {output}" if output else ""
    spilled = " or use fewer --samples" if plan.spilled else ""
    for what, need, free, remedy in (
        ("of disk", plan.disk, plan.free_disk, f"free some{beside}, or name another --output{spilled}"),
        ("of memory", plan.host, plan.free_host, "use fewer --samples, a shorter --seq-len or a smaller --max-memory"),
        ("of GPU memory", plan.device, plan.free_device, "use --device cpu, or a GPU with more memory"),
    ):
        refuse_too_little(what, need, free, remedy)
