"""JSON files in quasar's own folder: read strictly, written whole or not at all."""

import json
from pathlib import Path
from typing import Any

from quasar_core.errors import QuasarError
from quasar_core.store.files import write_text


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object that a file holds, None where there is no file; QuasarError for one that is damaged."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise QuasarError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise QuasarError(f"{path} is damaged.") from error
    if not isinstance(content, dict):
        raise QuasarError(f"{path} is damaged.")
    return content


def write_object(path: Path, content: dict[str, Any], alone: bool = False) -> None:
    """Indented JSON; what was there before stays until all of it is written. QuasarError where it cannot be.

    `alone` as in `written_whole`.
    """
    try:
        write_text(path, json.dumps(content, indent=2), alone)
    except OSError as error:
        raise QuasarError(f"{path} cannot be written: {error.strerror or error}.") from error
