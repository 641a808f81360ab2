"""JSON files in quasar's own folder: read strictly, written whole or not at all."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from quasar_core.errors import QuasarError


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


def write_object(path: Path, content: dict[str, Any]) -> None:
    """Indented JSON; what was there before stays until all of it is written. QuasarError where it cannot be."""
    partial: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".partial-", delete=False) as stream:
            partial = stream.name
            json.dump(content, stream, indent=2)
        os.replace(partial, path)
    except OSError as error:
        if partial is not None:
            Path(partial).unlink(missing_ok=True)
        raise QuasarError(f"{path} cannot be written: {error.strerror or error}.") from error
