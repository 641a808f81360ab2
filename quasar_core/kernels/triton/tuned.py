"""Block shapes that were measured, kept in quasar's own folder: one file per device, Triton and PyTorch version."""

import re
from functools import cache
from pathlib import Path

import torch
import triton

from quasar_core.errors import QuasarError
from quasar_core.files import read_json_if_there, write_json
from quasar_core.store.home import home
from quasar_core.typed import build


def tuned_blocks(device: torch.device, key: str) -> dict[str, int] | None:
    """The measured shape of a product, or None where it has not been tuned on this device."""
    return _table(_path(device)).get(key) if _is_tunable(device) else None


def keep_tuned(device: torch.device, found: dict[str, dict[str, int]]) -> Path:
    """Add measured shapes to those in use, and to the device's file; QuasarError where that cannot be written."""
    path = _path(device)
    table = _table(path)
    table.update(found)
    write_json(path, table)
    return path


def _is_tunable(device: torch.device) -> bool:
    return device.type == "cuda"


@cache
def _table(path: Path) -> dict[str, dict[str, int]]:
    try:
        return build(dict[str, dict[str, int]], read_json_if_there(path) or {})
    except (QuasarError, ValueError) as error:
        raise QuasarError(f"{path} cannot be read ({error}): delete it, and blocks are tuned anew.") from error


@cache
def _path(device: torch.device) -> Path:
    name = torch.cuda.get_device_name(device)
    parts = f"{name} triton {triton.__version__} torch {torch.__version__}"
    return home() / "kernels" / f"blocks-{re.sub(r'[^A-Za-z0-9.]+', '-', parts)}.json"
