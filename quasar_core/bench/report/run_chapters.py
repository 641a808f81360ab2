"""The chapters of a run: claim, tables, charts, conditions; each chapter is a key, a title and HTML."""

from collections import Counter
from collections.abc import Callable, Sequence
from html import escape

from quasar_core.bench.arms import ARMS, BASELINE, TWIN
from quasar_core.bench.metrics.arm_metrics import (
    ArmMetrics,
    Shares,
    Spread,
    mean_over_datasets,
    measure,
    speedup_over_all,
)
from quasar_core.bench.metrics.claim import Claim, claims
from quasar_core.bench.metrics.conditions import conditions
from quasar_core.bench.metrics.estimates import FEWEST, WIDEST
from quasar_core.bench.report.cells import cell, interval, label, speedup_cell
from quasar_core.bench.report.charts import PARTS, Curve, Range, curves, histogram, ranges, stacked
from quasar_core.bench.report.conditions_chapter import arms_list, conditions_chapter, describe_arm
from quasar_core.bench.report.html import MISSING, behind, number, table, tag
from quasar_core.bench.results import Results, temperatures

Chapter = tuple[str, str, str]
FEW = 8  # tokens of a pass, as drafts have


def heading(results: Results) -> tuple[str, str]:
    """The page's title, and its head with the claim."""
    run = results.run
    found = claims(results)
    first = found[0].sentence if found else "This run has no arm to set beside plain decoding."
    verifier = f" with {run.verifier}" if run.verifier else ""
    where = f"{run.model}{verifier}, {run.dtype} on {run.device}, {temperatures(run)}"
    more = "".join(
        tag("p", escape(f"What {one.arm} is: {describe_arm(one.arm)}. {_with_prompt(results, one)}"))
        + tag("p", escape(_beside_others(results, one)))
        for one in found[:1]
    )
    more += "".join(
        tag("p", escape(f"At temperature {one.temperature:g}: {one.sentence} {_with_prompt(results, one)}"))
        + tag("p", escape(_beside_others(results, one)))
        for one in found[1:]
    )
    warning = "".join(tag("p", escape(text), class_="warning") for text in _doubts(results))
    return f"quasar bench: {run.model}", tag("p", escape(where), class_="kind") + tag(
        "h1", escape(first.replace(" %", "\u00a0%"))
    ) + more + warning


def _with_prompt(results: Results, claim: Claim) -> str:
    """The claim of whole answers, which are what a user waits for."""
    found = speedup_over_all(results, claim.arm, claim.temperature, whole=True)
    if found is None or found.interval is None or found.is_uncertain:
        return ""
    low, high = found.interval
    return (
        f"Its speed is that of decoding; with the time of the prompt it is {found.value:.2f} times as fast "
        f"({low:.2f} to {high:.2f})."
    )


def _beside_others(results: Results, claim: Claim) -> str:
    """Set the claim's arm beside each other one, question by question; what is too uncertain is left out."""
    said = []
    for arm in results.run.config.arms:
        other = arm not in (BASELINE, TWIN, claim.arm)
        found = speedup_over_all(results, claim.arm, claim.temperature, base=arm) if other else None
        if found is None or found.interval is None or not found.has_enough or found.is_uncertain:
            continue
        low, high = found.interval
        doubt = ": this run does not tell them apart" if found.spans_one else ""
        said.append(f"{found.value:.2f} times as fast as {arm} ({low:.2f} to {high:.2f}{doubt})")
    return f"Beside the other arms {claim.arm} is {', '.join(said)}." if said else ""


def _doubts(results: Results) -> list[str]:
    """What makes the figures doubtful, a sentence each."""
    found, doubts = conditions(results), []
    if found.was_busy:
        doubts.append(
            f"The machine was busy during {found.busy} of {found.answers} answers: measure again on a quiet one."
        )
    if found.twins_agree is False:
        doubts.append("Two identical arms came out differently: smaller differences than theirs say nothing.")
    if results.errors:
        doubts.append(f"{len(results.errors)} of {len(results.rows)} answers failed; see the conditions.")
    unexplained = sum(not one.near_tie for one in results.divergences)
    if unexplained:
        doubts.append(f"{unexplained} answers leave the target’s text where rounding does not explain it: a defect.")
    return doubts


def run_chapters(results: Results) -> list[Chapter]:
    """All chapters for which the run has figures."""
    metrics = [metric for metric in measure(results) if metric.arm != TWIN]
    found = [
        _table(metrics),
        _speedups(metrics),
        _acceptance(metrics),
        _passes(results),
        _time(metrics),
        _categories(results),
        conditions_chapter(results),
    ]
    return [one for one in found if one is not None]


def _table(metrics: Sequence[ArmMetrics]) -> Chapter:
    several = len({(metric.dataset, metric.temperature) for metric in metrics}) > 1
    heads = ["arm", "speedup", "95 % interval", "same text", "with prompt", "tokens/s", "acceptance length", "right"]
    rows = [[*([label(metric, metrics)] if several else []), *_arm_cells(metric)] for metric in metrics]
    caption = "Arms on each dataset" if several else f"Arms on {metrics[0].dataset}" if metrics else "Arms"
    columns = [*(["dataset"] if several else []), *heads, "failed"]
    shown = table(caption, columns, [*rows, *_mean_rows(metrics)], 1 + several)
    arms = list(dict.fromkeys(metric.arm for metric in metrics))
    return "table", "What is faster than what", shown + tag("p", _legend(arms), class_="soft") + arms_list(arms)


def _arm_cells(metric: ArmMetrics) -> list[str]:
    return [
        metric.arm,
        speedup_cell(metric),
        interval(metric.speedup_total) if metric.arm != BASELINE else MISSING,
        MISSING if metric.identical is None else f"{metric.identical}/{metric.questions}",
        cell(metric, metric.speedup_answers),
        number(metric.tokens_per_s, 1),
        number(metric.acceptance_length),
        f"{metric.correct}/{metric.scored}" if metric.scored else MISSING,
        str(metric.failed),
    ]


def _mean_rows(metrics: Sequence[ArmMetrics]) -> list[list[str]]:
    """A row of each arm's means at temperatures that several datasets were asked at."""
    places = Counter(temperature for _, temperature in {(metric.dataset, metric.temperature) for metric in metrics})
    return [
        ["mean of datasets", mean.arm, number(mean.speedup, 2, "×"), *[MISSING] * 4, number(mean.acceptance_length)]
        + [MISSING] * 2
        for mean in mean_over_datasets(metrics)
        if places[mean.temperature] > 1
    ]


def _legend(arms: Sequence[str]) -> str:
    """What the columns of the first table mean."""
    said = (
        "Speedup: tokens per second of decoding, in total, by those of plain decoding (vanilla); with prompt: the same "
        "of whole answers, with the time that the prompt took. Same text: questions whose every token equals "
        "vanilla’s. Acceptance length: new tokens ÷ steps, each of which drafts and checks; plain decoding is 1.00. "
        "Right: answers that the dataset’s own number, or test, says are right, of those that can be told. A ? marks "
        f"a speedup in doubt: its interval holds 1, or fewer than {FEWEST} questions were asked. “wide”: the interval "
        f"is wider than ±{100 * WIDEST:.0f}\u00a0%."
    )
    if any(ARMS[arm].is_peer for arm in arms):
        said += " Other programs add up in another order, so where two tokens lie a rounding apart they may part."
    return said


def _speedups(metrics: Sequence[ArmMetrics]) -> Chapter | None:
    figures = _speedup_figures([one for one in metrics if one.speedup_total and one.arm != BASELINE], metrics)
    if not figures:
        return None
    said = tag(
        "p", "A point is the speedup, the bar its 95 % interval; the line at 1 is plain decoding.", class_="soft"
    )
    rows_table = table(
        "Speedups and their intervals",
        ["dataset", "arm", "speedup", "95 % interval", "by question", "95 % interval"],
        [
            [
                label(one, metrics),
                one.arm,
                number(one.speedup_total.value, 4),
                interval(one.speedup_total),
                number(one.speedup_mean.value if one.speedup_mean else None, 4),
                interval(one.speedup_mean),
            ]
            for one in metrics
            if one.speedup_total and one.arm != BASELINE
        ],
        2,
    )
    return "speedups", "How sure that is", said + tag("div", "".join(figures), class_="charts") + behind(rows_table)


def _speedup_figures(shown: Sequence[ArmMetrics], metrics: Sequence[ArmMetrics]) -> list[str]:
    """A figure of each dataset and temperature at which speedups are shown; arms keep their colours."""
    arms = list(dict.fromkeys(metric.arm for metric in metrics))
    figures = []
    for place in dict.fromkeys((one.dataset, one.temperature) for one in shown):
        here = [one for one in shown if (one.dataset, one.temperature) == place]
        name = label(here[0], metrics)
        points = [_range(one, arms.index(one.arm)) for one in here]
        figures.append(_figure(name, ranges(f"Speedups on {name}", points)))
    return figures


def _range(metric: ArmMetrics, series: int) -> Range:
    assert metric.speedup_total is not None
    low, high = metric.speedup_total.interval or (None, None)
    return Range(metric.arm, metric.speedup_total.value, low, high, series, speedup_cell(metric))


def _figure(name: str, drawing: str) -> str:
    return tag("figure", tag("figcaption", escape(name)) + drawing)


def _acceptance(metrics: Sequence[ArmMetrics]) -> Chapter | None:
    arms = list(dict.fromkeys(metric.arm for metric in metrics))
    drafting = [metric for metric in metrics if sum(metric.speculation.accepted)]
    if not drafting:
        return None
    figures = [
        _figure(f"{one.arm}, {label(one, metrics)}", histogram(
            f"Accepted tokens of {one.arm} on {label(one, metrics)}", one.speculation.accepted, arms.index(one.arm)
        ))
        for one in drafting
    ]  # fmt: skip
    rows = [
        [label(one, metrics), one.arm, str(length), str(count), number(count / sum(one.speculation.accepted), 4)]
        for one in drafting
        for length, count in enumerate(one.speculation.accepted)
    ]
    counts = table("Steps with a draft, by accepted tokens", ["dataset", "arm", "accepted", "steps", "share"], rows, 2)
    places = [
        [label(one, metrics), one.arm, share.name, str(share.count), str(share.total), number(share.value, 3)]
        for one in drafting
        for share in one.speculation.by_drafter
    ]
    drafters = table("Drafters", ["dataset", "arm", "drafter", "accepted", "drafted", "rate"], places, 3)
    return (
        "acceptance",
        "What becomes of drafts",
        tag("div", "".join(figures), class_="charts") + drafters + behind(counts),
    )


def _passes(results: Results) -> Chapter | None:
    run = results.run
    known = {role: passes for role, passes in run.passes.items() if passes.tokens}
    if not known:
        return None
    found = []
    for series, (role, passes) in enumerate(known.items()):
        floor = 1000 * passes.bytes / run.bandwidth if run.bandwidth else None
        points = [(tokens, 1000 * s) for tokens, s in zip(passes.tokens, passes.seconds, strict=True)]
        found.append(Curve(role, points, floor, series))
    rows = [
        [
            one.name,
            str(tokens),
            number(ms, 3),
            number(one.floor, 3),
            number(ms / one.floor if one.floor else None, 2, "×"),
        ]
        for one in found
        for tokens, ms in one.points
    ]
    key = "".join(tag("li", f'<i class="c{one.series}"></i>{one.name}') for one in found)
    said = (
        f"A pass reads the weights once, whatever its tokens. {' '.join(map(_several_tokens, found))} So it pays to "
        "verify several at once. Dashed: the floor, the bytes of the weights ÷ what the machine reads in a second."
    )
    if any(one.floor and min(ms for _, ms in one.points) < one.floor for one in found):
        said += (
            " Where a pass takes less than its floor, the machine read faster when the pass was timed, which is done "
            "once and remembered, than at the beginning of this run; or the weights lay in the processor’s cache."
        )
    figure = _figure("Pass cost", curves("Milliseconds of a pass by its tokens, and the floor", found))
    counts = table("Passes", ["model", "tokens", "ms", "floor, ms", "of the floor"], rows)
    content = tag("p", said, class_="soft") + tag("ul", key, class_="key") + tag("div", figure, class_="charts")
    return "passes", "What a pass costs", content + behind(counts)


def _several_tokens(curve: Curve) -> str:
    """What a pass over some tokens costs beside one over a single token; empty where only one size was timed."""
    (least, first), *more = sorted(curve.points)
    few = [point for point in more if point[0] <= FEW] or more[:1]
    if not few or least != 1:
        return ""
    tokens, ms = few[-1]
    return f"One of the {curve.name} over {tokens} tokens takes {ms / first:.1f} times as long as over one."


def _time(metrics: Sequence[ArmMetrics]) -> Chapter | None:
    known = [metric for metric in metrics if metric.shares]
    if not known:
        return None
    bars = [(one, one.shares) for one in known if one.shares]
    figures = []
    for name in dict.fromkeys(label(one, metrics) for one in known):
        rows = [
            (one.arm, (share.draft, share.verify, share.confirm, share.other))
            for one, share in bars
            if label(one, metrics) == name
        ]
        figures.append(_figure(name, stacked(f"Where the time of decoding goes on {name}", rows)))
    key = "".join(tag("li", f'<i class="k{place}"></i>{part}') for place, part in enumerate(PARTS))
    heads = ["dataset", "arm", *PARTS, "first token, ms", "p95", "a token, ms", "p95", "MB read a token"]
    heads += ["floor ÷ time", "J a token"]
    costs = table("Where the time of decoding goes, and what an answer costs", heads, map(_costs(metrics), bars), 2)
    charts = tag("div", "".join(figures), class_="charts")
    return "time", "Where the time goes", tag("ul", key, class_="key") + charts + behind(costs)


def _costs(metrics: Sequence[ArmMetrics]) -> Callable[[tuple[ArmMetrics, Shares]], list[str]]:
    def row(bar: tuple[ArmMetrics, Shares]) -> list[str]:
        one, share = bar
        return [
            label(one, metrics),
            one.arm,
            *(f"{100 * part:.1f} %" for part in (share.draft, share.verify, share.confirm, share.other)),
            *_milliseconds(one.ttft_s, 1),
            *_milliseconds(one.token_s, 2),
            number(one.bytes_per_token / 1e6 if one.bytes_per_token else None, 2),
            number(one.floor_share),
            number(one.joules_per_token),
        ]

    return row


def _milliseconds(spread: Spread | None, digits: int) -> tuple[str, str]:
    if spread is None:
        return MISSING, MISSING
    return number(1000 * spread.median, digits), number(1000 * spread.p95, digits)


def _categories(results: Results) -> Chapter | None:
    """A row for each category, a column for each arm."""
    metrics = [one for one in measure(results, by_category=True) if one.arm not in (TWIN, BASELINE)]
    if len({metric.category for metric in metrics}) < 2:
        return None
    arms = list(dict.fromkeys(metric.arm for metric in metrics))
    found: dict[tuple[str, str], dict[str, ArmMetrics]] = {}
    for one in metrics:
        found.setdefault((label(one, metrics), str(one.category)), {})[one.arm] = one
    rows = [
        [*place, str(max(one.questions for one in of_arm.values())), *(_with_interval(of_arm.get(arm)) for arm in arms)]
        for place, of_arm in found.items()
    ]
    several = len({dataset for dataset, _ in found}) > 1
    heads = ["dataset", "category", "questions", *arms]
    said = "Speedups, in brackets their 95 % intervals; a ? marks one in doubt, as above."
    shown = table("Categories", heads[not several :], [row[not several :] for row in rows], 1 + several)
    return "categories", "By kind of task", tag("p", said, class_="soft") + shown


def _with_interval(metric: ArmMetrics | None) -> str:
    if metric is None:
        return MISSING
    around = interval(metric.speedup_total)
    return speedup_cell(metric) + ("" if around == MISSING else f" ({around})")
