"""Every figure of a bench's tables, written down once more: from the JSON of its rows, by loops, as they are defined.

Nothing of `records`, `metrics`, `speculation` or `estimates` is used. A row is a dictionary, as the result file has it.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from quasar_core.bench.arms import ARMS

BASELINE = "vanilla"
POSITIONS = (0, 32, 64, 128, 256, 512, 1024)  # in the answer, where a range begins
MARGINS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # nats

Row = dict[str, Any]
Rows = list[Row]
Numbers = dict[str, float | int | None]
Yields = list[tuple[float, float, float, float]]  # tokens and seconds, an arm's and vanilla's
Shares = list[tuple[str, int, int]]  # a name, so many, of how many


def figures(rows: Rows, arm: str, passes: Mapping[str, Any], bandwidth: float | None) -> Numbers:
    """The figures of an arm, of the rows of one dataset, temperature and category, all arms among them."""
    ours, both = whole(rows, arm), pairs(rows, arm)
    kept = [row for question in ours.values() for row in question]
    same_draws = rows[0]["temperature"] == 0 or not ARMS[arm].is_peer
    compared = any(row["arm"] == BASELINE for row in rows) and same_draws
    asked = {row["question_id"] for row in rows if row["arm"] == arm}
    return {
        "questions": len(asked),
        "failed": len(asked) - len(ours),
        **_speeds(kept, both),
        **_acceptance(kept, ours.values()),
        **_costs(kept, arm, passes, bandwidth),
        **_quality(kept, both, compared),
    }


def _speeds(kept: Rows, both: Sequence[tuple[Rows, Rows]]) -> Numbers:
    timed = yields(both)
    return {
        "new_tokens": sum(row["stats"]["new_tokens"] for row in kept),
        "prefill_s": math.fsum(row["stats"]["prefill_s"] for row in kept),
        "decode_s": seconds(kept),
        "tokens_per_s": ratio(tokens(kept), seconds(kept)),
        "speedup_total": total_speedup(timed),
        "speedup_mean": mean_speedup(timed),
        "speedup_answers": total_speedup(answer_yields(both)) if timed else None,
    }


def _acceptance(kept: Rows, questions: Iterable[Rows]) -> Numbers:
    steps, confirms = _log(kept, "step_log"), _log(kept, "confirm_log")
    lengths = [tokens(one) / len(_log(one, "step_log")) for one in questions if _log(one, "step_log")]
    accepted, drafts = sum(step["accepted"] for step in steps), sum(step["drafted"] > 0 for step in steps)
    confirming = [row for row in kept if row["stats"]["confirm_log"]]
    return {
        "steps": len(steps),
        "acceptance_length": ratio(tokens(kept), len(steps)),
        "acceptance_length_mean": ratio(math.fsum(lengths), len(lengths)),
        "acceptance_length_vllm": 1 + accepted / drafts if drafts else None,
        "acceptance_rate": ratio(accepted, sum(step["drafted"] for step in steps)),
        "confirm_rate": ratio(sum(one["accepted"] for one in confirms), sum(one["window"] for one in confirms)),
        "tokens_per_confirm": ratio(tokens(confirming), len(confirms)),
    }


def _costs(kept: Rows, arm: str, passes: Mapping[str, Any], bandwidth: float | None) -> Numbers:
    waits = [row["stats"]["ttft_s"] for row in kept if row["stats"].get("ttft_s")]
    each = [seconds([row]) / tokens([row]) for row in kept if tokens([row]) and seconds([row])]
    read = _bytes(kept, arm, passes)
    joules = [row.get("joules") for row in kept]
    known = [one for one in joules if one is not None]
    count = sum(len(row["token_ids"]) for row in kept)
    return {
        "ttft_s_median": _quantile(waits, 0.5),
        "ttft_s_p95": _quantile(waits, 0.95),
        "token_s_median": _quantile(each, 0.5),
        "token_s_p95": _quantile(each, 0.95),
        **_parts(kept),
        "bytes_per_token": ratio(read, tokens(kept)) if read else None,
        "floor_share": ratio(read / bandwidth, seconds(kept)) if read and bandwidth else None,
        "peak_memory_bytes": max((row["stats"].get("peak_memory_bytes", 0) for row in kept), default=0),
        "joules_per_token": ratio(math.fsum(known), count) if known and len(known) == len(joules) else None,
    }


def _parts(kept: Rows) -> Numbers:
    """Shares of the seconds of decoding."""
    names = ("draft", "verify", "confirm")
    spent = [math.fsum(row["stats"].get(f"{name}_s", 0.0) for row in kept) for name in names]
    all_of_it = seconds(kept)
    if not sum(spent) or not all_of_it:
        return dict.fromkeys([f"shares_{name}" for name in (*names, "other")])
    shares: Numbers = {f"shares_{name}": part / all_of_it for name, part in zip(names, spent, strict=True)}
    return {**shares, "shares_other": max(0.0, 1 - sum(spent) / all_of_it)}


def _bytes(kept: Rows, arm: str, passes: Mapping[str, Any]) -> int | None:
    """Bytes of weights that the passes read; None where a model's are not known."""
    steps, confirms = _log(kept, "step_log"), _log(kept, "confirm_log")
    by_target = sum(step.get("by_target", False) for step in steps)
    if not by_target and (ARMS[arm].verify == "full" or (ARMS[arm].verify == "exact" and not confirms)):
        by_target = len(steps)
    joint = sum(one.get("drafted", 0) > 0 for one in confirms)
    counts: dict[str, int] = {"verifier": len(steps) - by_target, "target": by_target + len(confirms) - joint}
    if ARMS[arm].is_peer or any(count and role not in passes for role, count in counts.items()):
        return None
    return sum(count * int(passes[role]["bytes"]) for role, count in counts.items() if count)


def _quality(kept: Rows, both: Sequence[tuple[Rows, Rows]], compared: bool) -> Numbers:
    judged = [row["correct"] for row in kept if row.get("correct") is not None]
    found: Numbers = {"correct": sum(judged), "scored": len(judged)}
    if not compared:
        return {**found, "identical": None, "agreement": None, "first_difference": None}
    equal = places = 0
    firsts = []
    for ours, theirs in ((ids(a)[0], ids(b)[0]) for a, b in both):
        same = [a == b for a, b in zip(ours, theirs, strict=False)]
        equal, places = equal + sum(same), places + max(len(ours), len(theirs))
        firsts += [] if ours == theirs else [next((i for i, one in enumerate(same) if not one), len(same))]
    return {
        **found,
        "identical": sum(ids(a) == ids(b) for a, b in both),
        "agreement": ratio(equal, places),
        "first_difference": _quantile(firsts, 0.5),
    }


def splits(rows: Rows, arm: str) -> dict[str, Shares]:
    """The tables of drafts and confirms: what is split, and its parts."""
    kept = [row for question in whole(rows, arm).values() for row in question]
    steps = _log(kept, "step_log")
    drafted = [step for step in steps if step["drafted"]]
    most = max((step["accepted"] for step in drafted), default=-1)
    longest = max((step["drafted"] for step in steps), default=0)
    at = range(longest)
    return {
        "accepted": [(str(n), sum(step["accepted"] == n for step in drafted), len(drafted)) for n in range(most + 1)],
        "by_place": [
            (str(n + 1), sum(step["accepted"] > n for step in steps), sum(step["drafted"] > n for step in steps))
            for n in at
        ],
        "by_drafter": _by_drafter(steps, ARMS[arm].draft),
        "by_position": _by_position(kept),
        "refused_by_margin": _by_margin(kept),
    }


def _by_drafter(steps: Sequence[Row], only: str) -> Shares:
    drafted: Counter[str] = Counter()
    accepted: Counter[str] = Counter()
    for step in steps:
        for place, name in zip(range(step["drafted"]), _names(step, only), strict=False):
            drafted[name] += 1
            accepted[name] += place < step["accepted"]
    return sorted((name, accepted[name], count) for name, count in drafted.items())


def _names(step: Row, only: str) -> Iterator[str]:
    """Who drafted each token; `only`, where the pieces do not tell."""
    for piece in step.get("pieces", []):
        for _ in range(piece["length"]):
            yield piece["source"]
    while True:
        yield only


def _by_position(kept: Rows) -> Shares:
    made: Counter[int] = Counter()
    begun: Counter[int] = Counter()
    for row in kept:
        stats = row["stats"]
        yielded = [step["accepted"] + 1 for step in stats["step_log"]]
        place, stays = float(stats["prefill_tokens"]), ratio(tokens([row]), sum(yielded)) or 0.0
        for count in yielded:
            begin = max(edge for edge in POSITIONS if edge <= place)
            made[begin] += count
            begun[begin] += 1
            place += count * stays
    return [(_range(begin, POSITIONS), made[begin], begun[begin]) for begin in sorted(begun)]


def _by_margin(kept: Rows) -> Shares:
    refused: Counter[float] = Counter()
    judged: Counter[float] = Counter()
    for row in kept:
        for margin, accepted in _judged(row["stats"]):
            if margin is not None:
                begin = max(edge for edge in MARGINS if edge <= margin)
                judged[begin] += 1
                refused[begin] += not accepted
    return [(_range(begin, MARGINS), refused[begin], judged[begin]) for begin in sorted(judged)]


def _judged(stats: Row) -> Iterator[tuple[float | None, bool]]:
    """The verifier's margin of each token that a confirm looked at, and whether it was kept."""
    confirms = [dict(one) for one in stats["confirm_log"]]
    waiting: list[float | None] = []
    for number, step in enumerate(stats["step_log"]):
        due = confirms[0] if confirms else None
        if step.get("by_target", False):
            comes = due is not None and due.get("drafted", 0) and due.get("step", 0) == number
        else:
            count = step["accepted"] + 1
            waiting += [*step.get("margins", []), *[None] * count][:count]
            waiting = waiting[step.get("let_through", 0) :]
            enough = due is not None and len(waiting) >= due["window"] and due.get("step", 0) in (0, number + 1)
            comes = enough and due is not None and not due.get("drafted", 0)
        if comes and due is not None:
            looked_at = waiting[: due["window"]][: due["accepted"] + 1]
            yield from ((margin, place < due["accepted"]) for place, margin in enumerate(looked_at))
            confirms.pop(0)
        if comes or step.get("by_target", False):
            waiting = []


def _range(begin: float, edges: Sequence[float]) -> str:
    after = [edge for edge in edges if edge > begin]
    return f"{begin:g}–{after[0]:g}" if after else f"from {begin:g}"


def whole(rows: Rows, arm: str) -> dict[Any, Rows]:
    """An arm's rows by question, without those of which one failed."""
    found: dict[Any, Rows] = {}
    for row in rows:
        if row["arm"] == arm:
            found.setdefault(row["question_id"], []).append(row)
    return {key: of_one for key, of_one in found.items() if all(row["stats"] is not None for row in of_one)}


def pairs(rows: Rows, arm: str) -> list[tuple[Rows, Rows]]:
    """An arm's answers beside vanilla's, where neither failed."""
    ours, theirs = whole(rows, arm), whole(rows, BASELINE)
    return [(ours[key], theirs[key]) for key in ours if key in theirs]


def answer_yields(both: Sequence[tuple[Rows, Rows]]) -> Yields:
    """Tokens and seconds as of `yields`, with those of the prompt's pass."""
    timed = [(_all_tokens(a), _all_seconds(a), _all_tokens(b), _all_seconds(b)) for a, b in both]
    return [one for one in timed if all(one)]


def yields(both: Sequence[tuple[Rows, Rows]]) -> Yields:
    """Tokens and seconds of decoding, an arm's and vanilla's, of the questions on which both took a step."""
    timed = [(tokens(a), seconds(a), tokens(b), seconds(b)) for a, b in both]
    return [one for one in timed if all(one)]


def total_speedup(timed: Yields) -> float | None:
    """Total tokens ÷ total seconds, by vanilla's."""
    if not timed:
        return None
    made, took, plain_made, plain_took = (math.fsum(one[i] for one in timed) for i in range(4))
    return made / took / (plain_made / plain_took)


def mean_speedup(timed: Yields) -> float | None:
    """The mean over questions of the ratio of tokens per second."""
    return ratio(math.fsum(a / b / (c / d) for a, b, c, d in timed), len(timed))


def tokens(rows: Rows) -> int:
    """Tokens that steps yielded."""
    return sum(row["stats"]["new_tokens"] - row["stats"]["prefill_tokens"] for row in rows)


def seconds(rows: Rows) -> float:
    """Seconds of decoding."""
    return math.fsum(row["stats"]["decode_s"] for row in rows)


def ids(rows: Rows) -> list[list[int]]:
    """The token ids of a question's answers, in their order."""
    return [row["token_ids"] for row in sorted(rows, key=lambda row: (row["repeat"], row["turn"]))]


def ratio(above: float, below: float) -> float | None:
    """None where nothing is below."""
    return above / below if below else None


def _all_tokens(rows: Rows) -> int:
    return sum(row["stats"]["new_tokens"] for row in rows)


def _all_seconds(rows: Rows) -> float:
    return math.fsum(row["stats"]["prefill_s"] + row["stats"]["decode_s"] for row in rows)


def _log(rows: Rows, name: str) -> list[Row]:
    return [one for row in rows for one in row["stats"][name]]


def _quantile(values: Sequence[float], share: float) -> float | None:
    """Between the two values next to it, in proportion."""
    if not values:
        return None
    ordered, place = sorted(values), share * (len(values) - 1)
    low = math.floor(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])
