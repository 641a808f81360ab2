"""Plan how the model writes its text: by which passes, in which dtype, in how much memory; and open what writes it.

The lean decoder holds a copy of the weights. Where memory has no room for one, the text is written by a copy whose
layers are rounded to few bits (`rounded_copy.py`), the most for which there is room. Where there is none for that
either, or the architecture has no place in the lean decoder, transformers runs on the mapped files. On a processor
without fast products in bfloat16, the copy is in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedModel

from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.models.config.decoder import DecoderConfig
from quasar_core.models.device import DTYPES, has_fast_bf16
from quasar_core.models.weights.lean_weights import load_target, load_verifier_alone, why_folder_not_lean
from quasar_core.quantize.blocks.streaming import StreamedModel
from quasar_core.quantize.rounded_copy import rounded_bytes, write_rounded
from quasar_core.quantize.text_writers import USUAL_ROOM, LeanWriter, TransformersWriter, Writer
from quasar_core.records import Progress, no_progress
from quasar_core.store.model_config import read_text_config

# Rows may take one part in so many of the memory that is free beside the weights, and, kept, of the disk.
SHARE_FOR_ROWS = 4
# A copy of the weights may take one part in so many of the memory that is free.
SHARE_FOR_WEIGHTS = 2
# A GPU writes the text where so much is left beside the weights.
LEAST_ON_DEVICE = 2_000_000_000
NO_ROOM = "memory has no room for a copy of its weights"
NO_COPIES: Mapping[int, int] = MappingProxyType({})
COPY_BITS = (8, 4)


@dataclass(frozen=True)
class TextPlan:
    """What was chosen: `weights` are the bytes of the lean decoder's copy, `room` what rows may take.

    `copy_bits` are those of a rounded copy that writes in the model's place.
    """

    on_device: bool
    why_not_lean: str | None
    dtype: str
    weights: int
    room: int
    copy_bits: int | None = None

    @property
    def by_target(self) -> bool:
        """Whether it is the target that writes, and not a rounded copy of it."""
        return self.copy_bits is None

    @property
    def remembers(self) -> bool:
        """Whether what the target leaves behind its last block is known of the text that it writes."""
        return self.by_target and self.why_not_lean is None

    @property
    def element(self) -> int:
        """Bytes of a number in the passes."""
        return DTYPES[self.dtype].itemsize

    def describe(self) -> str:
        """The plan in words, such as "by quasar's own decoder in bfloat16"."""
        if self.copy_bits is not None:
            copy = f"a copy of the model's own, its layers rounded to {self.copy_bits} bits"
            return f"by {copy}, in {self.dtype}, since {NO_ROOM}"
        if self.why_not_lean is None:
            return f"by quasar's own decoder in {self.dtype}"
        return f"by transformers in {self.dtype}, since {self.why_not_lean}"


@dataclass(frozen=True)
class Free:
    """Bytes that are free: of memory, of a GPU's, and of the disk. None: nobody has asked, or nobody can tell."""

    memory: int | None = None
    device: int | None = None
    disk: int | None = None


def choose_text(
    weights: int,
    passes: torch.dtype,
    why_not_lean: str | None,
    free: Free,
    fast_bf16: bool,
    copies: Mapping[int, int] = NO_COPIES,
) -> TextPlan:
    """Choose for a model of so many weights, whose passes are otherwise in that dtype; `free.device` only of a GPU.

    `copies` are the bytes of rounded copies by their bits.
    """
    if free.device is not None and weights * passes.itemsize + LEAST_ON_DEVICE <= free.device:
        taken = weights * passes.itemsize
        return TextPlan(True, why_not_lean, _name(passes), taken, (free.device - taken) // SHARE_FOR_ROWS)
    dtype = torch.bfloat16 if fast_bf16 and passes != torch.float32 else torch.float32
    copied, copy_bits = weights * dtype.itemsize, None
    if why_not_lean is None and free.memory is not None and copied * SHARE_FOR_WEIGHTS > free.memory:
        fitting = [bits for bits, size in copies.items() if size * SHARE_FOR_WEIGHTS <= free.memory]
        copy_bits = max(fitting, default=None)
        why_not_lean = None if fitting else NO_ROOM
    if copy_bits is not None:
        copied = copies[copy_bits]
    if why_not_lean is not None:
        dtype, copied = passes, 0
    room = USUAL_ROOM if free.memory is None else (free.memory - copied) // SHARE_FOR_ROWS
    if free.disk is not None:
        room = min(room, free.disk // SHARE_FOR_ROWS)
    return TextPlan(False, why_not_lean, _name(dtype), copied, room, copy_bits)


def plan_text(source: Path, target: StreamedModel, free: Free, rounds: bool = False) -> TextPlan:
    """Choose for the model in the folder `source` on this machine; a copy may write only where one `rounds`."""
    weights, obstacle = count_weights(target.skeleton), _why_not_lean(source, target)
    copies = copy_bytes(source, weights) if rounds and obstacle is None else NO_COPIES
    return choose_text(weights, target.dtype, obstacle, free, has_fast_bf16(), copies)


def count_weights(skeleton: PreTrainedModel) -> int:
    """Count a model's weights, tied ones once."""
    tied: Any = getattr(skeleton, "all_tied_weights_keys", None) or {}
    return sum(parameter.numel() for name, parameter in skeleton.named_parameters() if name not in tied)


def free_on(device: torch.device) -> int | None:
    """Bytes that are free on a GPU; None for the CPU."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type != "cpu" else None


def copy_bytes(source: Path, weights: int) -> dict[int, int]:
    """Bytes of rounded copies of a model with so many weights, by their bits, as the lean decoder holds them."""
    config, widest = DecoderConfig.parse(read_text_config(source)), torch.float32.itemsize
    return {bits: rounded_bytes(config, weights, bits, widest) for bits in COPY_BITS}


def _why_not_lean(source: Path, target: StreamedModel) -> str | None:
    if target.whole_because is not None:
        return target.whole_because
    if (obstacle := why_folder_not_lean(source)) is not None:
        return obstacle
    recurrent = DecoderConfig.parse(read_text_config(source)).is_recurrent
    return "some of its layers are recurrent" if recurrent else None


def open_writer(
    source: Path, target: StreamedModel, plan: TextPlan, progress: Progress = no_progress, copy: Path | None = None
) -> Writer:
    """What writes the text of the model in the folder `source`, as planned; a rounded copy is put into `copy`."""
    device = target.device if plan.on_device else torch.device("cpu")
    if plan.copy_bits is not None:
        assert copy is not None
        write_rounded(source, copy, plan.copy_bits, progress)
        decoder = load_verifier_alone(VerifierCheckpoint(copy), device, DTYPES[plan.dtype], progress=progress)
        return LeanWriter(decoder, plan.room, f"{plan.copy_bits} bits ")
    if plan.why_not_lean is None:
        return LeanWriter(load_target(source, device, DTYPES[plan.dtype], progress), plan.room)
    return TransformersWriter(target.whole(device), plan.room)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
