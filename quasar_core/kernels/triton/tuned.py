"""Block shapes that were measured on a GPU, kept in quasar's own folder."""

from functools import cache
from typing import Any

import torch
import triton

from quasar_core.kernels.identity import sources_hash
from quasar_core.store.measured import Measured, measured_file
from quasar_core.typed import build

KIND, FIELDS = "blocks", ("outputs", "inputs", "splits", "stages")


def tuned_blocks(device: torch.device, key: str) -> dict[str, int] | None:
    """The measured shape of a product, or None where it has not been tuned on this device."""
    known = _kept(device).get(key) if _is_tunable(device) else None
    return known.value if known else None


def keep_tuned(device: torch.device, found: dict[str, dict[str, int]]) -> None:
    """Add measured shapes to those in use, and to the device's file."""
    _kept(device).keep(found)


def trouble_with_file(device: torch.device) -> str | None:
    """Why the device's file could not be read or written; None where nothing was wrong."""
    return _kept(device).trouble if _is_tunable(device) else None


def _is_tunable(device: torch.device) -> bool:
    return device.type == "cuda"


@cache
def _kept(device: torch.device) -> Measured[dict[str, int]]:
    versions = {"triton": triton.__version__, "torch": torch.__version__, "kernels": sources_hash()}
    conditions = {"device": _device_name(device), **versions}
    return Measured(measured_file(KIND, conditions), conditions, _parse)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _parse(content: Any) -> dict[str, int]:
    blocks = build(dict[str, int], content)
    if blocks.keys() != set(FIELDS) or min(blocks.values()) < 1:
        raise ValueError("no blocks")
    return blocks
