"""The card by which quasar knows a verifier that it wrote."""

import json
from pathlib import Path


def write_card(folder: Path, fingerprint: str = "f") -> None:
    """A quasar.json with the least that one holds."""
    card = {"format_version": 1, "target": {"name": "demo", "fingerprint": fingerprint}}
    (folder / "quasar.json").write_text(json.dumps(card))
