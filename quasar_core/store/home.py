"""The one folder that quasar keeps things in."""

import os
from pathlib import Path

from platformdirs import user_cache_path


def home() -> Path:
    """$QUASAR_HOME, or the platform's cache folder for quasar; nothing is created."""
    chosen = os.environ.get("QUASAR_HOME")
    return Path(chosen).expanduser().absolute() if chosen else user_cache_path("quasar", appauthor=False)
