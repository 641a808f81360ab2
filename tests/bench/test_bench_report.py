"""The page of a run: its claim, its numbers beside those of the JSON, and how it behaves in a browser."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers.bench_pair import CountingModel, make_pair
from helpers.bench_records import make_row, make_run, make_stats
from helpers.browser import Browser, find_chromium

from quasar_cli.main import run
from quasar_core.bench.arms import ARMS as ARM_NAMES
from quasar_core.bench.arms import BenchConfig
from quasar_core.bench.datasets import Dataset, Question
from quasar_core.bench.metrics.claim import claims
from quasar_core.bench.metrics.document import as_document
from quasar_core.bench.report.charts import ticks
from quasar_core.bench.report.conditions_chapter import describe_arm
from quasar_core.bench.report.page import Sources, page, read_sources, write_page
from quasar_core.bench.report.traces import of_results
from quasar_core.bench.results import Passes, Results, write_results
from quasar_core.bench.run import run_bench
from quasar_core.errors import UsageError
from quasar_core.records import Stats, Step
from quasar_core.trace import Origin, Trace, TracedToken, write_trace

pytest_plugins = ["helpers.cli_fixtures"]
ARMS = ("vanilla", "ngram", "quantized", "exact", "vanilla-again")


def steady(questions: int, factor: float, identical: bool = True) -> Results:
    """Vanilla, and ngram that is `factor` times as fast on every question."""
    rows = []
    for number in range(questions):
        ids, other = [1, 2, 3, 4, 5], [1, 2, 3, 4, 5 if identical else 6]
        rows.append(make_row("vanilla", number, ids, make_stats(5, 4.0, [Step(0, 0)] * 4)))
        rows.append(make_row("ngram", number, other, make_stats(5, 4.0 / factor, [Step(3, 2), Step(2, 0)])))
    return Results(make_run(), rows)


@pytest.mark.parametrize(
    ("results", "sentence"),
    [
        (
            steady(9, 2.0),
            "On 9 questions of d, ngram is 2.00 times as fast as plain decoding (95 % interval 2.00 to 2.00), and its "
            "text is the same, token for token, in all 9 answers.",
        ),
        (
            steady(8, 0.5, identical=False),
            "On 8 questions of d, ngram is 0.50 times as fast as plain decoding (95 % interval 0.50 to 0.50), and its "
            "text is the same in 0 of 8 answers.",
        ),
        (
            steady(4, 3.0),
            "On 4 questions of d, this run does not show how fast ngram is (95 % interval 3.00 to 3.00; 8 questions "
            "are the least).",
        ),
    ],
)
def test_the_claim_by_hand(results: Results, sentence: str) -> None:
    assert [claim.sentence for claim in claims(results)] == [sentence]


def test_an_answer_of_the_prompts_pass_is_compared_and_not_timed() -> None:
    found = steady(9, 2.0)
    rows = [*found.rows, *(make_row(arm, 9, [2], make_stats(1, 0.0, [])) for arm in ("vanilla", "ngram"))]
    (claim,) = claims(Results(make_run(), rows))
    assert claim.sentence.startswith("On 9 questions of d, ngram is 2.00 times")
    assert claim.sentence.endswith("the same, token for token, in all 10 answers.")


def test_a_wide_interval_is_no_claim_of_a_number() -> None:
    rows = steady(8, 10.0).rows
    uneven = [
        make_row("ngram", number, [1, 2, 3, 4, 5], make_stats(5, 0.4 * (1 + 4 * (number % 2)), [Step(3, 2)]))
        for number in range(8)
    ]
    faster = [*(row for row in rows if row.arm == "vanilla"), *uneven]
    (claim,) = claims(Results(make_run(), faster))
    assert "is faster than plain decoding, but the interval of this run" in claim.sentence
    assert "times as fast" not in claim.sentence


def test_ticks_are_round_and_within() -> None:
    assert ticks(0, 4.4) == [0, 1, 2, 3, 4]
    assert ticks(0, 0.09) == [0, 0.02, 0.04, 0.06, 0.08]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """A run of counting models, in which the verifier errs, with words that HTML must not take for its own."""
    questions = [
        Question(number, f"<k{number % 2}>", (f"w{3 + number % 7} w4 w5 w{3 + number % 7}",)) for number in range(8)
    ]
    config = BenchConfig(ARMS, max_new_tokens=16, num_draft_tokens=4, window=3, temperatures=(0.0, 1.0))
    output = tmp_path_factory.mktemp("run") / "r.json"
    found = run_bench(
        make_pair(CountingModel(wrong_after=6)), [Dataset("d</script>", tuple(questions))], config, output
    )
    passes = {
        "target": Passes(1000, (1, 8, 33), (0.001, 0.0011, 0.004)),
        "verifier": Passes(400, (1, 8), (0.0005, 0.0006)),
    }
    return replace(found, run=replace(found.run, passes=passes, bandwidth=1.25e6))


class Tables(HTMLParser):
    """The tables of a page: caption → rows of cells."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[list[str]]] = {}
        self._cell: list[str] | None = None
        self._rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self._rows = []
        if tag == "tr":
            self._rows.append([])
        if tag in ("th", "td", "caption"):
            self._cell = []

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag == "caption":
            self.found["".join(self._cell or [])] = self._rows
        if tag in ("th", "td"):
            self._rows[-1].append("".join(self._cell or []))
        if tag in ("th", "td", "caption"):
            self._cell = None


def tables(html: str) -> dict[str, list[list[str]]]:
    parser = Tables()
    parser.feed(html)
    return parser.found


def test_the_page_shows_the_numbers_of_the_json(results: Results) -> None:
    html, document = page(Sources(results, [])), as_document(results)
    heads, *rows = tables(html)["Arms on each dataset"]
    shown = {(row[0], row[1]): dict(zip(heads, row, strict=True)) for row in rows}
    metrics = [metric for metric in document["metrics"] if metric["arm"] != "vanilla-again"]
    assert len(shown) == len(metrics) == 8
    for metric in metrics:
        row = shown[f"{metric['dataset']}, T = {metric['temperature']:g}", metric["arm"]]
        assert row["tokens/s"] == f"{metric['tokens_per_s']:.1f}"
        assert row["acceptance length"] == f"{metric['acceptance_length']:.2f}"
        if metric["arm"] != "vanilla":
            low, high = metric["speedup_total_low"], metric["speedup_total_high"]
            assert row["95 % interval"] == f"{low:.2f}–{high:.2f}"
            wide = metric["speedup_total_uncertain"]
            doubt = "" if metric["speedup_total_shown"] else "?"
            assert row["speedup"] == ("wide" if wide else f"{metric['speedup_total']:.2f}×{doubt}")
        if metric["identical"] is not None:
            assert row["same text"] == f"{metric['identical']}/{metric['questions']}"
    counts = tables(html)["Steps with a draft, by accepted tokens"][1:]
    exact = next(one for one in metrics if one["arm"] == "exact" and one["temperature"] == 0)
    histogram = [int(row[3]) for row in counts if row[:2] == ["d</script>, T = 0", "exact"]]
    assert histogram == exact["speculation"]["accepted"]
    assert tables(html)["Passes"][1] == ["target", "1", "1.000", "0.800", "1.25×"]


def test_a_fresh_reader_finds_the_text_the_prompt_and_what_each_arm_is() -> None:
    """On one dataset no column is spent on it; what each arm is stands below the first table."""
    html = page(Sources(steady(9, 2.0), []))
    heads, *rows = tables(html)["Arms on d"]
    shown = {row[0]: dict(zip(heads, row, strict=True)) for row in rows}
    # Four tokens in 4 s and in 2 s, behind a prompt of 0.25 s that gives the first of five.
    assert shown["ngram"]["with prompt"] == f"{4.25 / 2.25:.2f}×"
    assert shown["ngram"]["same text"] == "9/9"
    assert "What ngram is: n-gram drafts; the full-precision model checks them: its own text." in html
    assert "with the time of the prompt it is 1.89 times as fast (1.89 to 1.89)." in html
    assert "plain decoding" in html.partition("<h3>The arms</h3>")[2]


def test_the_claims_arm_is_set_beside_the_others() -> None:
    """exact is as fast as ngram but for noise, and four times as fast as llama.cpp."""
    found = steady(9, 2.0)
    rows = list(found.rows)
    for number in range(9):
        uneven = 2.0 * (1.02 if number % 2 else 0.995)
        rows.append(make_row("exact", number, [1, 2, 3, 4, 5], make_stats(5, 4.0 / uneven, [Step(3, 2), Step(2, 0)])))
        rows.append(make_row("llama.cpp", number, [1, 2, 3, 4, 5], make_stats(5, 4.0 / uneven * 4, [Step(0, 0)] * 4)))
    arms = ("vanilla", "ngram", "exact", "llama.cpp")
    html = page(Sources(Results(make_run(config=BenchConfig(arms)), rows), []))
    (said,) = re.findall(r"<p>(Beside the other arms .*?)</p>", html)
    assert re.fullmatch(
        r"Beside the other arms exact is 1\.01 times as fast as ngram \(1\.00 to 1\.01: this run does not tell them "
        r"apart\), 4\.00 times as fast as llama\.cpp \(4\.00 to 4\.00\)\.",
        said,
    )


def test_a_pass_below_its_floor_is_explained(results: Results) -> None:
    """One token of the verifier takes 0.5 ms; by the bandwidth its 400 bytes take 0.32 ms, by a lower one 0.64 ms."""
    slower = replace(results, run=replace(results.run, bandwidth=0.625e6))
    assert "less than its floor" not in page(Sources(results, []))
    assert "less than its floor" in page(Sources(slower, []))


def test_where_the_questions_were_read_stands_in_the_conditions() -> None:
    facts = {"questions": 9, "sha256": "0" * 64}
    for more, said in (({}, ""), ({"source": "the hub, a/b@C"}, ", read from the hub, a/b@C")):
        run = make_run(datasets={"d": {**facts, **more}})
        assert f"d: 9, digest {'0' * 12}{said}<" in page(Sources(replace(steady(9, 2.0), run=run), []))


@pytest.mark.parametrize("name", ARM_NAMES)
def test_every_arm_is_described_in_words_of_its_own(name: str) -> None:
    said = {other: describe_arm(other) for other in ARM_NAMES}
    assert list(said.values()).count(describe_arm(name)) == 1


def test_categories_have_a_column_for_each_arm(results: Results) -> None:
    heads, *rows = tables(page(Sources(results, [])))["Categories"]
    assert heads == ["dataset", "category", "questions", "ngram", "quantized", "exact"]
    assert [row[:3] for row in rows] == [
        [f"d</script>, T = {temperature}", f"<k{kind}>", "4"] for temperature in (0, 1) for kind in (0, 1)
    ]


def test_what_several_tokens_cost_is_as_it_was_measured(results: Results) -> None:
    html = page(Sources(results, []))
    assert "One of the target over 8 tokens takes 1.1 times as long as over one." in html
    assert "One of the verifier over 8 tokens takes 1.2 times as long as over one." in html


def test_a_text_stands_beside_what_plain_decoding_took(results: Results) -> None:
    texts = of_results(results)
    assert all(re.search(r"\d s of decoding; plain decoding took \d+\.\d\d s\.$", text.about) for text in texts)


def test_the_page_stands_alone(results: Results) -> None:
    html = page(Sources(results, []))
    assert not re.findall(r"(?:src|href)=[\"'](?!#|data:)", html)
    assert "http://" not in html
    assert "https://" not in html
    assert html.count("</script>") == 2


def test_other_files_are_refused(tmp_path: Path, results: Results) -> None:
    write_results(results, tmp_path / "r.json")
    with pytest.raises(UsageError, match="one run"):
        read_sources([tmp_path / "r.json", tmp_path / "r.json"])
    (tmp_path / "x.html").write_text("mine")
    with pytest.raises(UsageError, match="not a page of quasar bench report"):
        write_page(Sources(results, []), tmp_path / "x.html")
    write_page(Sources(results, []), tmp_path / "y.html")
    write_page(Sources(results, []), tmp_path / "y.html")


@pytest.mark.usefixtures("own_home")
def test_the_command_takes_results_and_traces(
    tmp_path: Path, results: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    write_results(results, tmp_path / "r.json")
    token = TracedToken(" <b>", Origin("draft", 0, "ngram", 1.0), None)
    write_trace(Trace("m", None, "full", "ngram", "p", [token], Stats()), tmp_path / "t.json")
    assert run(["bench", "report", "r.json", "t.json", "-o", "both.html", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"page": "both.html"}
    assert run(["bench", "report", "t.json", "-o", "trace.html"]) == 0
    assert "Who made each token of m’s text" in Path("trace.html").read_text()


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("there is no Chromium on PATH (Debian: apt-get install chromium)")
    with Browser(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, results: Results) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(Sources(results, []), path)
    return path


def names(browser: Browser, role: str) -> list[str]:
    """What a screen reader calls the elements of a role."""
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    return [node.get("name", {}).get("value", "") for node in nodes if node.get("role", {}).get("value") == role]


@pytest.mark.parametrize("shape", [{"width": 1200}, {"width": 1200, "dark": True}, {"width": 360, "phone": True}])
def test_the_page_opens_without_an_error_at_any_size(browser: Browser, written: Path, shape: dict[str, Any]) -> None:
    browser.open(written, **shape)
    assert browser.errors == []
    assert browser.run("document.documentElement.scrollWidth") <= shape["width"]
    assert browser.run("document.querySelectorAll('#trace-text .t').length") == 16
    light = browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light != shape.get("dark", False)
    assert browser.run(CONTRAST) >= 4.5


CONTRAST = """(() => {
  const channel = (v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const light = (colour) => {
    const [r, g, b] = colour.match(/\\d+/g).map(Number).map(channel);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (e) => {
    const found = e ? getComputedStyle(e).backgroundColor : "rgb(255, 255, 255)";
    return /, 0\\)$/.test(found) ? behind(e.parentElement) : found;
  };
  const ratio = (e) => {
    const [more, less] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
    return (more + 0.05) / (less + 0.05);
  };
  const texts = document.querySelectorAll("p, th, td, a, dt, dd, h1, h2, .t, summary, figcaption");
  return Math.min(...[...texts].map(ratio));
})()"""


def test_the_texts_are_read_with_keys_alone(browser: Browser, written: Path) -> None:
    browser.open(written)
    browser.run("document.getElementById('trace-text').focus()")
    told = [browser.run("document.getElementById('trace-told').textContent")]
    for _ in range(15):
        browser.press("ArrowRight")
        told.append(browser.run("document.getElementById('trace-told').textContent"))
    assert told[0].startswith("“w")
    assert "prompt's pass" in told[0]
    assert sum("drafted by" in text and "accepted and confirmed" in text for text in told) > 2
    (corrected, *_) = [text for text in told if "corrected by the confirm, in place of" in text]
    assert "the target's margin 9.00 nats" in corrected
    browser.press("Home")
    assert browser.run("document.getElementById('trace-told').textContent") == told[0]
    cells = browser.run("[...document.querySelectorAll('#trace-table tbody tr')].map((r) => r.children[2].textContent)")
    assert len(cells) == 16
    assert browser.errors == []


def test_another_text_is_chosen(browser: Browser, written: Path) -> None:
    browser.open(written)
    before = browser.run("document.getElementById('trace-told').textContent")
    browser.run("(() => { const c = document.getElementById('trace-choice'); c.value = c.options.length - 1; "
                "c.dispatchEvent(new Event('change')); })()")  # fmt: skip
    assert browser.run("document.getElementById('trace-told').textContent") != before
    assert browser.errors == []


def test_a_screen_reader_finds_names_and_tables(browser: Browser, written: Path) -> None:
    browser.open(written)
    browser.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    browser.call("Accessibility.enable")
    assert all(names(browser, "image"))
    assert len(names(browser, "image")) == browser.run("document.querySelectorAll('svg').length") > 5
    assert {"Arms on each dataset", "Passes", "Tokens of the text"} <= {*names(browser, "table")}
    assert names(browser, "combobox")[0].startswith("Text:")
    assert browser.run("document.querySelectorAll('h1').length") == 1
