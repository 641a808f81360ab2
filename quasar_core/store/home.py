"""Find the one folder that quasar keeps its files in."""

import os
from pathlib import Path

from quasar_core.files import absolute


def home() -> Path:
    """$QUASAR_HOME, or the platform's cache folder for quasar; nothing is created."""
    chosen = os.environ.get("QUASAR_HOME")
    if chosen:
        return absolute(Path(chosen))
    from platformdirs import user_cache_path  # where the folder is named, a bare checkout runs without this package

    return user_cache_path("quasar", appauthor=False)
