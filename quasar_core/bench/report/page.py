"""Write one self-contained page that shows a run: plain HTML, SVG, and a small script for the texts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from quasar_core.bench.report.html import chapter, tag
from quasar_core.bench.report.run_chapters import heading, run_chapters
from quasar_core.bench.report.traces import of_results, of_trace, trace_chapter
from quasar_core.bench.results import Results, read_results
from quasar_core.errors import UsageError, foreign_errors
from quasar_core.files import read_json, read_text, refuse_foreign, write_text
from quasar_core.trace import Trace, is_trace, trace_from_dict

MARK = '<meta name="generator" content="quasar bench report">'
TEXTS_AT = 2  # chapters before the texts
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Sources:
    """What a page shows: a run, or none, and traces."""

    results: Results | None
    traces: list[Trace]


def read_sources(files: Sequence[Path]) -> Sources:
    """A result file, and traces; UsageError for anything else, and for several result files."""
    results, traces = [], []
    for path in files:
        content = read_json(path, UsageError)
        if is_trace(content):
            traces.append(trace_from_dict(content, path))
        else:
            results.append(read_results(path))
    if len(results) > 1:
        raise UsageError("A page shows one run; compare several with `quasar bench compare`.")
    return Sources(results[0] if results else None, traces)


def write_page(sources: Sources, path: Path) -> None:
    """Write the page; UsageError where a file of another program stands there."""
    refuse_foreign(path, "--output", "a page of quasar bench report", lambda found: MARK in read_text(found))
    with foreign_errors(f"{path} could not be written"):
        write_text(path, page(sources))


def page(sources: Sources) -> str:
    """The page as HTML."""
    shown = [*map(of_trace, sources.traces), *(of_results(sources.results) if sources.results else [])]
    chapters = run_chapters(sources.results) if sources.results else []
    if shown:
        chapters.insert(min(len(chapters), TEXTS_AT), trace_chapter(shown))
    title, head = heading(sources.results) if sources.results else _heading_of(sources.traces)
    links = "".join(tag("li", tag("a", escape(name), href=f"#{key}")) for key, name, _ in chapters)
    body = "".join(chapter(key, name, content) for key, name, content in chapters)
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            MARK,
            '<link rel="icon" href="data:,">',
            tag("title", escape(title)),
            tag("style", read_text(_HERE / "style.css")),
            "</head><body>",
            tag("a", "To the figures", class_="skip", href="#main"),
            tag("header", head + tag("nav", tag("ul", links), aria_label="Chapters")),
            tag("main", body, id="main"),
            tag("footer", tag("p", "Written by <code>quasar bench report</code>. Every figure is defined in "
                              "<code>docs/measuring.md</code> and computed from the result file alone.")),
            _data("trace-data", {"traces": [one.to_dict() for one in shown]}) if shown else "",
            tag("script", read_text(_HERE / "script.js")) if shown else "",
            "</body></html>\n",
        ]
    )  # fmt: skip


def _heading_of(traces: Sequence[Trace]) -> tuple[str, str]:
    """Title and head of a page of traces alone."""
    model = traces[0].model if traces else "nothing"
    return f"quasar: a text of {model}", tag("h1", f"Who made each token of {escape(model)}’s text")


def _data(name: str, content: Any) -> str:
    """JSON within the page; no `<` of a text ends the element."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'
