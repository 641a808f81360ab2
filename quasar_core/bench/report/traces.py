"""The chapter of texts: some answers of a run, and traces of `generate`, coloured by who made each token."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from quasar_core.bench.arms import ARMS, BASELINE
from quasar_core.bench.report.html import table, tag
from quasar_core.bench.results import Results, Row
from quasar_core.trace import MAKERS, Maker, Trace, TracedToken, show

MOST_QUESTIONS = 4  # of a dataset, whose answers are shown
MOST_TRACES = 40

MEANINGS: dict[Maker, str] = {
    "draft": "drafted, accepted",
    "bonus": "the verify pass’s own",
    "target": "the confirm’s own",
    "corrected": "corrected by the confirm",
    "prompt": "from the prompt’s pass",
}


@dataclass(frozen=True)
class ShownTrace:
    """A text to choose: its name, a sentence about it, its mode, its tokens."""

    name: str
    about: str
    verify: str
    tokens: list[TracedToken]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form that the page's script reads, each token flat."""
        tokens = [{"text": token.text, "refused": token.refused, **asdict(token.origin)} for token in self.tokens]
        return {"name": self.name, "about": self.about, "verify": self.verify, "tokens": tokens}


def of_trace(trace: Trace) -> ShownTrace:
    """A trace of `generate`."""
    prompt = " ".join(trace.prompt.split())
    name = f"{trace.verify}: {prompt[:60]}{'…' if len(prompt) > 60 else ''}"
    return ShownTrace(name, f"Prompt: {prompt[:400]}", trace.verify, trace.tokens)


def of_results(results: Results) -> list[ShownTrace]:
    """First turns of some questions of each dataset, spread over it, by every arm that drafts or confirms."""
    found = []
    for row in results.rows:
        if row.turn == 0 and row.repeat == 0 and row.stats and row.lengths and _is_of_interest(row.arm):
            found.append(row)
    chosen = _spread(found)
    plain = {_asked(row): row for row in results.rows if row.arm == BASELINE and row.turn == 0 and row.repeat == 0}
    shown = [
        trace
        for row in found
        if (row.dataset, row.question_id) in chosen and (trace := _of_row(row, plain.get(_asked(row))))
    ]
    order = {"exact": 0, "full": 1, "quantized": 2}
    return sorted(shown, key=lambda one: order.get(one.verify, 3))[:MOST_TRACES]


def _is_of_interest(arm: str) -> bool:
    return not ARMS[arm].is_peer and (ARMS[arm].draft != "none" or ARMS[arm].verify == "exact")


def _spread(rows: Sequence[Row]) -> set[tuple[str, int | str]]:
    chosen = set()
    for dataset in dict.fromkeys(row.dataset for row in rows):
        questions = list(dict.fromkeys(row.question_id for row in rows if row.dataset == dataset))
        count = min(MOST_QUESTIONS, len(questions))
        chosen |= {(dataset, questions[i * len(questions) // count]) for i in range(count)}
    return chosen


def _asked(row: Row) -> tuple[str, int | str, float]:
    return row.dataset, row.question_id, row.temperature


def _of_row(row: Row, plain: Row | None) -> ShownTrace | None:
    assert row.stats is not None
    pieces, start = [], 0
    for length in row.lengths:
        pieces.append(row.text[start : start + length])
        start += length
    tokens = show(pieces, row.stats, row.refused, ARMS[row.arm].draft)
    if not tokens:
        return None
    temperature = f", T = {row.temperature:g}" if row.temperature else ""
    name = f"{row.arm}: {row.dataset}, question {row.question_id} ({row.category}){temperature}"
    about = f"{row.stats.new_tokens} tokens in {row.stats.steps} verify passes"
    about += f" and {row.stats.confirms} confirms" if row.stats.confirms else ""
    about += f", {row.stats.decode_s:.2f} s of decoding"
    about += f"; plain decoding took {plain.stats.decode_s:.2f} s." if plain and plain.stats else "."
    return ShownTrace(name, about, ARMS[row.arm].verify, tokens)


def trace_chapter(shown: Sequence[ShownTrace]) -> tuple[str, str, str]:
    """The viewer: a choice of texts, the key, the text, what is said of a token, and the same as a table."""
    options = "".join(tag("option", escape(one.name), value=number) for number, one in enumerate(shown))
    key = "".join(
        tag("li", f'<span class="t {maker}">text</span> {MEANINGS[maker]}: <b></b>', data_by=maker) for maker in MAKERS
    )
    content = [
        tag("p", "Colours say who made each token. Point at a token, or move with the arrow keys, to read how sure the "
                 "models were: the margin is the gap between the two best tokens."),
        tag("p", tag("label", "Text: ", for_="trace-choice") + tag("select", options, id="trace-choice")),
        tag("ul", key, class_="key", id="trace-key"),
        tag("div", "", class_="tokens", id="trace-text", role="listbox", tabindex=0, aria_describedby="trace-told",
            aria_label="The text, token by token"),
        tag("p", "", class_="told", id="trace-told", role="status"),
        tag("noscript", tag("p", "The texts need JavaScript; everything else on this page does not.")),
        tag("details", tag("summary", "The tokens as a table")
            + tag("div", table("Tokens of the text", ["token", "text", "made by", "margin", "target’s margin"], [], 3),
                  id="trace-table")),
    ]  # fmt: skip
    return "texts", "Who made each token", "".join(content)
