"""Who made each token: answers whose logs were written by hand, files, and what the terminal shows."""

import json
import re
from pathlib import Path

import pytest
from helpers.bench_pair import CountingModel, make_pair
from hypothesis import given
from hypothesis import strategies as st

from quasar_cli.help import with_values
from quasar_cli.main import run
from quasar_cli.render.trace import bracketed, coloured, legend
from quasar_core.config import GenerationConfig
from quasar_core.decode.generator import Generator
from quasar_core.decode.traced import trace_of
from quasar_core.errors import UsageError
from quasar_core.records import Confirm, Piece, Stats, Step
from quasar_core.trace import GrowingOrigins, Trace, origins, origins_so_far, read_trace, show, windows, write_trace

pytest_plugins = ["helpers.cli_fixtures"]


def stats(steps: list[Step], confirms: list[Confirm] | None = None) -> Stats:
    return Stats(prefill_tokens=1, step_log=steps, confirm_log=confirms or [])


def makers(given: Stats, count: int) -> str:
    """The makers' first letters."""
    found = origins(given, count)
    return "".join(origin.by[0] for origin in found) if found else "?"


def test_without_confirms_a_step_gives_its_accepted_draft_and_a_bonus() -> None:
    logs = stats([Step(3, 2, [Piece("ngram", 2, 3)], False, [1.0, 2.0, 0.5]), Step(0, 0)])
    assert makers(logs, 5) == "pddbb"
    first, second, bonus = (origins(logs, 5) or [])[1:4]
    assert (first.margin, second.margin, bonus.margin) == (1.0, 2.0, 0.5)
    assert (first.step, first.drafter, bonus.drafter, bonus.confirmed) == (0, "ngram", None, None)


def test_a_draft_of_several_pieces_names_the_drafter_of_each_token() -> None:
    pieces = [Piece("suffix", 3, 2), Piece("recycle", 1, 2)]
    found = origins(stats([Step(4, 3, pieces), Step(1, 1)]), 7, "none") or []
    assert [origin.drafter for origin in found] == [None, "suffix", "suffix", "recycle", None, "none", None]


def test_an_end_of_text_within_a_draft_has_no_bonus() -> None:
    assert makers(stats([Step(0, 0), Step(4, 2, [], False, [1.0, 1.0])]), 4) == "pbdd"


def test_a_confirm_keeps_the_window_or_corrects_it() -> None:
    steps = [Step(2, 2), Step(1, 0), Step(3, 3), Step(0, 0)]
    confirms = [
        Confirm(4, 4, margins=[9.0, 8.0, 7.0, 6.0, 5.0]),
        Confirm(5, 2, margins=[4.0, 3.0, 0.25], refused=77),
    ]
    logs = stats(steps, confirms)
    # prompt | d d bonus bonus, and the target's own | d d, and the third corrected
    assert makers(logs, 9) == "pddbbtddc"
    found = origins(logs, 9) or []
    assert [origin.target_margin for origin in found] == [None, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 0.25]
    assert [origin.confirmed for origin in found] == [None, True, True, True, True, None, True, True, None]
    assert [origin.step for origin in found] == [-1, 0, 0, 0, 1, 1, 2, 2, 3]


def test_a_window_that_ends_with_the_text_is_followed_by_nothing() -> None:
    assert makers(stats([Step(3, 2)], [Confirm(2, 2)]), 3) == "pdd"


def test_the_target_checks_a_draft_behind_a_window_or_without_one() -> None:
    window, joint = Step(1, 1, [], False, [2.0, 1.0]), Step(2, 1, by_target=True, target_margins=[7.0, 6.0])
    alone = Step(1, 1, by_target=True, target_margins=[5.0, 4.0])
    refused = Step(3, 0, by_target=True)
    confirms = [Confirm(2, 2, 2, 1, margins=[9.0, 8.0]), Confirm(2, 1, 3, 4, margins=[3.0, 2.0], refused=8)]
    logs = stats([window, joint, alone, window, refused], confirms)
    # prompt | d and bonus of the window, d and the target's own behind it | d, own | d, corrected
    assert makers(logs, 9) == "pdbdtdtdc"
    found = origins(logs, 9) or []
    assert [origin.target_margin for origin in found] == [None, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0]
    assert [origin.margin for origin in found] == [None, 2.0, 1.0, None, None, None, None, 2.0, None]
    assert [confirm.window for confirm, _ in windows(logs)] == [2, 2]


def test_the_windows_of_confirms() -> None:
    (first, waited), _ = windows(
        stats([Step(1, 1, [], False, [2.0, 0.5]), Step(0, 0, [], False, [3.0])], [Confirm(2, 0), Confirm(1, 1)])
    )
    assert first.window == 2
    assert [(token.origin.by, token.origin.margin, token.accepted, token.judged) for token in waited] == [
        ("draft", 2.0, False, True),
        ("bonus", 0.5, False, False),
    ]


@pytest.mark.parametrize("logs", [stats([]), stats([Step(0, 0)], [Confirm(5, 5)])])
def test_logs_that_do_not_make_up_the_text_tell_nothing(logs: Stats) -> None:
    assert origins(logs, 6) is None
    assert show(["x"] * 6, logs) == []


@given(
    wrong=st.integers(-1, 9),
    window=st.integers(1, 9),
    drafts=st.integers(1, 8),
    length=st.integers(1, 40),
    verify=st.sampled_from(["full", "quantized", "exact"]),
)
def test_every_token_of_an_answer_has_its_maker(wrong: int, window: int, drafts: int, length: int, verify: str) -> None:
    config = GenerationConfig(length, verify, num_draft_tokens=drafts, window=window)  # type: ignore[arg-type]
    pair = make_pair(verifier=CountingModel(wrong_after=wrong))
    result = Generator(pair, config).generate([3, 4, 5, 3, 4])
    trace = trace_of(pair, config, result, "w3")
    assert len(trace.tokens) == length
    assert "".join(token.text for token in trace.tokens) == result.text
    for before, token, token_id in zip(trace.tokens, trace.tokens[1:], result.token_ids[1:], strict=False):
        origin = token.origin
        assert (origin.by == "corrected") == (token.refused is not None)
        if origin.by == "corrected":  # the counting target never errs: what it corrects is the verifier's error
            assert before.text.split() == [f"w{wrong}"]
            assert token.refused != f"w{token_id}"
        if verify == "exact":
            assert origin.target_margin == 9.0
            assert (origin.margin == 9.0) == (origin.confirmed is True)
    drafted = sum(token.origin.by == "draft" for token in trace.tokens)
    assert drafted <= result.stats.accepted


# Files


def make_trace() -> Trace:
    logs = stats([Step(1, 1), Step(0, 0)], [Confirm(2, 2), Confirm(1, 0, refused=7)])
    return Trace("m", None, "exact", "ngram", "p", show(["a", " b", " c", " d", " e"], logs, [" x"]), logs)


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_trace(make_trace(), tmp_path / "t.json")
    assert read_trace(tmp_path / "t.json") == make_trace()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "x"}, "its format is not"),
        ({"format_version": 9}, "format version 9, where 1 is read"),
        ({"tokens": [{"text": 1, "origin": {"by": "x"}}]}, r"tokens\[0\]\.text must be a text"),
        ({"stats": {"new_tokens": "x"}}, r"stats\.new_tokens must be a whole number"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    path = tmp_path / "t.json"
    write_trace(make_trace(), path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UsageError, match=reason):
        read_trace(path)


# The terminal


def test_brackets_stand_where_there_are_no_colours() -> None:
    assert bracketed(make_trace()).plain == "a[ b] c< d>{ e}"
    assert coloured(make_trace()).plain == "a b c d e"
    lines = legend(make_trace(), in_colour=False).plain.splitlines()
    assert lines[0] == "[text]  drafted, and accepted: 1 token"
    assert len(lines) == 5
    assert "not known" in legend(Trace("m", None, "full", "none", "p", [], Stats()), in_colour=True).plain


def test_colours_differ_and_have_styles_beside_them() -> None:
    styles = {str(span.style) for span in coloured(make_trace()).spans}
    assert len(styles) == 4  # the bonus has none


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (["--trace", "Count to ten."], ["--trace=-", "Count to ten."]),
        (["--trace", "t.json", "Count"], ["--trace", "t.json", "Count"]),
        (["--trace", "write data.json"], ["--trace=-", "write data.json"]),
        (["--trace", "out.txt", "Hi"], ["--trace", "out.txt", "Hi"]),  # refused by its name, not as a second prompt
        (["--trace", "3.5"], ["--trace=-", "3.5"]),
        (["--trace", "Wait..."], ["--trace=-", "Wait..."]),
        (["x", "--trace"], ["x", "--trace=-"]),
        (["--", "--trace"], ["--", "--trace"]),
        (["--trace=t.json"], ["--trace=t.json"]),
    ],
)
def test_the_option_takes_a_file_only_where_one_is_named(given: list[str], read: list[str]) -> None:
    assert with_values(given) == read


# The command


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch, own_home: None) -> None:
    """`generate` with models that count, the verifier with errors."""
    monkeypatch.setattr("quasar_core.api.decoding.load", lambda *given: make_pair(CountingModel(wrong_after=6)))


ASK = ["generate", "w3 w4 w5 w3", "-n", "12", "--num-draft-tokens", "4", "--window", "3", "--raw"]


@pytest.mark.usefixtures("counting")
def test_generate_shows_who_made_each_token(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*ASK, "--no-stats"]) == 0
    plain = capsys.readouterr().out
    assert run([*ASK, "--no-stats", "--trace"]) == 0
    shown = capsys.readouterr()
    assert re.sub(r"[\[\]<>{}]", "", shown.out) == plain
    assert "[" in shown.out
    assert "{" in shown.out
    assert "drafted, and accepted" in shown.err
    assert "corrected by the confirm" in shown.err


@pytest.mark.usefixtures("counting")
def test_generate_saves_a_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*ASK, "--trace", "t.json"]) == 0
    trace = read_trace(Path("t.json"))
    assert "".join(token.text for token in trace.tokens) + "\n" == capsys.readouterr().out
    assert (trace.model, trace.verify, trace.prompt) == ("counting", "exact", "w3 w4 w5 w3")
    assert run([*ASK, "--trace", "t.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"]
    Path("mine.json").write_text('{"a": 1}')
    assert run([*ASK, "--trace", "mine.json"]) == 2
    assert "mine.json exists and is not a trace of quasar generate" in capsys.readouterr().err
    assert run([*ASK, "--trace=notes.txt"]) == 2
    assert "--trace must be a .json file" in capsys.readouterr().err


def growing(given: Stats, confirms: bool) -> list[str]:
    return [origin.by for origin in origins_so_far(given, confirms)]


def test_a_growing_answer_follows_the_logs() -> None:
    steps = [Step(3, 2), Step(0, 0), Step(1, 0)]
    assert growing(Stats(prefill_tokens=1, step_log=steps), False) == [
        "prompt",
        "draft",
        "draft",
        "bonus",
        "bonus",
        "bonus",
    ]
    confirms = [Confirm(4, 4, step=2), Confirm(1, 0, step=3)]
    made = growing(Stats(prefill_tokens=1, step_log=steps, confirm_log=confirms), True)
    assert made == ["prompt", "draft", "draft", "bonus", "bonus", "target", "corrected"]


def test_origins_that_grow_are_those_of_the_whole_log() -> None:
    """Entries come as an engine logs them: a confirm before the step that it shares a pass with."""
    by_target, behind = Step(3, 2, by_target=True), Step(2, 1, by_target=True)
    steps = [by_target, Step(2, 1), Step(0, 0), behind, Step(0, 0), Step(2, 0, by_target=True), Step(4, 3), Step(1, 1)]
    confirms = [Confirm(3, 3, drafted=2, step=3), Confirm(1, 0, drafted=2, step=5), Confirm(6, 4, step=8)]
    whole = Stats(prefill_tokens=1, step_log=steps, confirm_log=confirms)
    logged = Stats(prefill_tokens=1)
    made = GrowingOrigins(logged, confirms=True)
    for number in range(len(steps) + 1):
        before = len(made.read())
        logged.confirm_log += [confirm for confirm in confirms if confirm.step == number]
        logged.step_log += steps[number : number + 1]
        assert made.read()[:before] == origins_so_far(whole, True)[:before]
    assert made.read() == origins_so_far(whole, True)
    assert len(made.read()) == 1 + 3 + 5 + 1 + 5
    alone = GrowingOrigins(Stats(prefill_tokens=1, step_log=steps[:3]), confirms=False)
    assert alone.read() == alone.read() == origins_so_far(Stats(prefill_tokens=1, step_log=steps[:3]), False)


def test_drafts_that_the_target_checks_itself_are_told_too() -> None:
    by_target, behind = Step(3, 2, by_target=True), Step(2, 1, by_target=True)
    steps = [by_target, Step(2, 1), behind, Step(0, 0), Step(2, 0, by_target=True)]
    confirms = [Confirm(2, 2, drafted=2, step=2), Confirm(1, 0, drafted=2, step=4)]
    made = growing(Stats(prefill_tokens=1, step_log=steps, confirm_log=confirms), True)
    first, second = ["draft", "draft", "target"], ["draft", "bonus", "draft", "target"]
    assert made == ["prompt", *first, *second, "corrected"]
