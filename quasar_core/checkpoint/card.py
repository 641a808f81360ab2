"""Read a verifier's card, quasar.json: what it was made from, and how faithful it is."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quasar_core.errors import QuasarError
from quasar_core.files import read_json_if_there
from quasar_core.records import FidelityReport
from quasar_core.typed import build, known_part

CARD_VERSION = 1  # of quasar.json


@dataclass(frozen=True)
class _Target:
    """The model that a verifier was made from."""

    name: str
    fingerprint: str


@dataclass(frozen=True)
class _Report:
    """The fields of quantizing's report that are read."""

    fidelity: FidelityReport
    layer_errors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Card:
    """The fields of quasar.json that are read; one that was written by hand may have none of them."""

    format_version: int = CARD_VERSION
    target: _Target | None = None
    calibration: dict[str, Any] | None = None
    versions: dict[str, Any] | None = None
    report: _Report | None = None


def parse_card(path: Path) -> tuple[dict[str, Any], Card]:
    """The content of quasar.json, and what is read of it; empty where there is none."""
    content = read_json_if_there(path) or {}
    version = content.get("format_version", CARD_VERSION)
    if version != CARD_VERSION:
        raise QuasarError(f"{path} has format version {version}, which this version of quasar does not read.")
    parts = {**content}
    for name, kind in (("target", _Target), ("report", _Report)):
        parts[name] = known_part(kind, content.get(name) or None)
    try:
        return content, build(Card, known_part(Card, parts))
    except ValueError as error:
        raise QuasarError(f"{path} is damaged: {error}.") from error
