"""Which verifier is best on this device: passes against their floor, and the rates to expect."""

from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.text import Text

from quasar_cli.render import as_ratio, text_table

_TOKENS = "1, 4, 8"


def speed_tables(speed: dict[str, Any]) -> list[RenderableType]:
    """The target's passes and every verifier's; or why there is nothing to show."""
    if "unknown" in speed:
        return [Text(f"Speed: {speed['unknown']}")]
    title = f"Passes of {_TOKENS} tokens and tokens/s to expect; {speed['dtype']} on {speed['device']}"
    table = text_table(title, "model", "ms", "floor", "plain or quantized", "exact", "agreement", "how it is known")
    for column in table.columns[1:6]:
        column.justify = "right"
    target = speed["target"]
    rates = f"{speed['plain']:.1f}", f"{speed['full']:.1f} (full)"
    table.add_row("target", *_pass(target), *rates, "–", target["source"])
    for verifier in speed["verifiers"]:
        exact = as_ratio(verifier["exact"], 1)
        table.add_row(
            escape(verifier["name"]),
            *_pass(verifier["passes"]),
            f"{verifier['quantized']:.1f}",
            f"≥ {exact}" if verifier["exact_is_bound"] else exact,
            as_ratio(verifier["agreement"], 3),
            escape(f"{verifier['passes']['source']}; {verifier['passes']['products']}"),
        )
    best = {"quantized": speed["best_quantized"], "exact": speed["best_exact"]}
    said = "; ".join(f"{mode}: {name}" for mode, name in best.items() if name)
    return [table, Text(f"Best here, at a typical acceptance of n-gram drafts: {said or 'no verifier was measured'}")]


def _pass(figures: dict[str, Any]) -> tuple[str, str]:
    """Milliseconds, and the floor of memory, which weights that caches hold may pass under."""
    floor = figures["floor_ms"]
    in_cache = " (in cache)" if floor is not None and min(figures["ms"]) < floor else ""
    return ", ".join(f"{ms:.3g}" for ms in figures["ms"]), as_ratio(floor) + in_cache
