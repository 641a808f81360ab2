"""Result files written by hand, for the tests of what is computed from them."""

from dataclasses import replace
from typing import Any

from quasar_core.bench.arms import BenchConfig
from quasar_core.bench.results import Results, Row, Run
from quasar_core.records import Confirm, Stats, Step


def make_stats(tokens: int, seconds: float, steps: list[Step], confirms: list[Confirm] | None = None) -> Stats:
    """`tokens` new tokens, the first out of the prompt's pass."""
    return Stats(
        new_tokens=tokens,
        prompt_tokens=7,
        prefill_tokens=1,
        step_log=steps,
        confirm_log=confirms or [],
        prefill_s=0.25,
        decode_s=seconds,
    )


def make_row(arm: str, question: int, token_ids: list[int], stats: Stats | None, **changes: Any) -> Row:
    """A row of the dataset `d`, category `c`."""
    fields: dict[str, Any] = {
        "dataset": "d",
        "question_id": question,
        "category": "c",
        "turn": 0,
        "repeat": 0,
        "arm": arm,
        "seed": 1,
        "token_ids": token_ids,
        "text": "",
        "finish_reason": "length" if stats else None,
        "stats": stats,
    }
    return Row(**{**fields, **changes})


def make_run(**changes: Any) -> Run:
    """A run of vanilla and ngram on two questions."""
    fields: dict[str, Any] = {
        "config": BenchConfig(("vanilla", "ngram")),
        "model": "m",
        "verifier": None,
        "device": "a processor",
        "dtype": "float32",
        "datasets": {"d": {"questions": 2, "sha256": "0" * 64}},
        "versions": {"python": "3"},
        "notes": [],
        "git": None,
    }
    return Run(**{**fields, **changes})


def make_results() -> Results:
    """Two questions; the numbers are worked out in `test_bench_metrics`."""
    plain = [Step(0, 0)]
    rows = [
        make_row("vanilla", 1, [1, 2, 3, 4, 5], make_stats(5, 4.0, plain * 4)),
        make_row("ngram", 1, [1, 2, 3, 4, 5], make_stats(5, 1.0, [Step(3, 2), Step(2, 0)])),
        make_row("ngram", 2, [6, 7, 8, 1], make_stats(4, 1.5, [Step(0, 0), Step(2, 1)])),
        make_row("vanilla", 2, [6, 7, 8, 9], make_stats(4, 3.0, plain * 3)),
    ]
    return Results(make_run(), rows)


def slower(results: Results, factor: float) -> Results:
    """The same run, with the drafting arm's decoding taking `factor` times as long."""
    rows = [
        replace(row, stats=replace(row.stats, decode_s=row.stats.decode_s * factor))
        if row.arm == "ngram" and row.stats
        else row
        for row in results.rows
    ]
    return Results(replace(results.run, dtype="bfloat16"), rows)
