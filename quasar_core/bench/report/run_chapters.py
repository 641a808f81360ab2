"""The chapters of a run: claim, tables, charts, conditions; each chapter is a key, a title and HTML."""

from collections.abc import Callable, Sequence
from html import escape

from quasar_core.bench.arms import ARMS, BASELINE, TWIN
from quasar_core.bench.claim import claims
from quasar_core.bench.conditions import conditions
from quasar_core.bench.estimates import FEWEST, WIDEST, Estimate
from quasar_core.bench.metrics import ArmMetrics, Shares, Spread, mean_over_datasets, measure
from quasar_core.bench.report.charts import PARTS, Curve, Range, curves, histogram, ranges, stacked
from quasar_core.bench.report.html import MISSING, behind, number, table, tag
from quasar_core.bench.results import Results, Row, temperatures

Chapter = tuple[str, str, str]


def heading(results: Results) -> tuple[str, str]:
    """The page's title, and its head with the claim."""
    run = results.run
    found = claims(results)
    first = found[0].sentence if found else "This run has no arm to set beside plain decoding."
    verifier = f" with {run.verifier}" if run.verifier else ""
    where = f"{run.model}{verifier}, {run.dtype} on {run.device}, {temperatures(run)}"
    more = "".join(tag("p", escape(f"At temperature {one.temperature:g}: {one.sentence}")) for one in found[1:])
    warning = "".join(tag("p", escape(text), class_="warning") for text in _doubts(results))
    return f"quasar bench: {run.model}", tag("p", escape(where), class_="kind") + tag(
        "h1", escape(first)
    ) + more + warning


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
        _conditions(results),
    ]
    return [one for one in found if one is not None]


def _label(metric: ArmMetrics, metrics: Sequence[ArmMetrics]) -> str:
    several = len({one.temperature for one in metrics}) > 1
    return f"{metric.dataset}, T = {metric.temperature:g}" if several else metric.dataset


def _table(metrics: Sequence[ArmMetrics]) -> Chapter:
    heads = [
        "dataset",
        "arm",
        "speedup",
        "95 % interval",
        "tokens/s",
        "acceptance length",
        "same text",
        "right",
        "failed",
    ]
    rows = [
        [
            _label(metric, metrics),
            metric.arm,
            speedup_cell(metric),
            _interval(metric.speedup_total) if metric.arm != BASELINE else MISSING,
            number(metric.tokens_per_s, 1),
            number(metric.acceptance_length),
            MISSING if metric.identical is None else f"{metric.identical}/{metric.questions}",
            f"{metric.correct}/{metric.scored}" if metric.scored else MISSING,
            str(metric.failed),
        ]
        for metric in metrics
    ]
    means = [
        ["mean of datasets", mean.arm, number(mean.speedup, 2, "×"), MISSING, MISSING, number(mean.acceptance_length)]
        + [MISSING] * 3
        for mean in mean_over_datasets(metrics)
        if len({metric.dataset for metric in metrics if metric.temperature == mean.temperature}) > 1
    ]
    said = (
        "Speedup: tokens per second of decoding, in total, by those of plain decoding (vanilla). Acceptance length: "
        "tokens a verify pass; plain decoding is 1.00. Same text: questions whose every token equals vanilla’s. "
        f"A ? marks a speedup that the run does not show: its interval holds 1, or fewer than {FEWEST} questions were "
        f"asked. “wide”: the interval is wider than ±{100 * WIDEST:.0f} %."
    )
    return (
        "table",
        "What is faster than what",
        table("Arms on each dataset", heads, [*rows, *means], 2) + tag("p", said, class_="soft"),
    )


def speedup_cell(metric: ArmMetrics) -> str:
    """A speedup as tables show it."""
    found = metric.speedup_total
    if found is None:
        return MISSING
    if metric.arm == BASELINE:
        return f"{found.value:.2f}×"
    return "wide" if found.is_uncertain else f"{found.value:.2f}×{'' if found.is_shown else '?'}"


def _interval(found: Estimate | None) -> str:
    return "{:.2f}–{:.2f}".format(*found.interval) if found and found.interval else MISSING


def _speedups(metrics: Sequence[ArmMetrics]) -> Chapter | None:
    arms = list(dict.fromkeys(metric.arm for metric in metrics))
    figures = []
    for place in dict.fromkeys((metric.dataset, metric.temperature) for metric in metrics):
        rows = [one for one in metrics if (one.dataset, one.temperature) == place and one.speedup_total]
        if not rows:
            continue
        name = _label(rows[0], metrics)
        points = [_range(metric, arms.index(metric.arm)) for metric in rows if metric.arm != BASELINE]
        if points:
            figures.append(_figure(name, ranges(f"Speedups on {name}", points)))
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
                _label(one, metrics),
                one.arm,
                number(one.speedup_total.value, 4),
                _interval(one.speedup_total),
                number(one.speedup_mean.value if one.speedup_mean else None, 4),
                _interval(one.speedup_mean),
            ]
            for one in metrics
            if one.speedup_total and one.arm != BASELINE
        ],
        2,
    )
    return "speedups", "How sure that is", said + tag("div", "".join(figures), class_="charts") + behind(rows_table)


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
        _figure(f"{one.arm}, {_label(one, metrics)}", histogram(
            f"Accepted tokens of {one.arm} on {_label(one, metrics)}", one.speculation.accepted, arms.index(one.arm)
        ))
        for one in drafting
    ]  # fmt: skip
    rows = [
        [_label(one, metrics), one.arm, str(length), str(count), number(count / sum(one.speculation.accepted), 4)]
        for one in drafting
        for length, count in enumerate(one.speculation.accepted)
    ]
    counts = table("Steps with a draft, by accepted tokens", ["dataset", "arm", "accepted", "steps", "share"], rows, 2)
    places = [
        [_label(one, metrics), one.arm, share.name, str(share.count), str(share.total), number(share.value, 3)]
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
        "A pass over several tokens costs little more than over one, as it reads the same weights: so verifying many "
        "tokens at once pays. Dashed: the floor, the bytes of the weights ÷ what the machine reads in a second."
    )
    figure = _figure("Pass cost", curves("Milliseconds of a pass by its tokens, and the floor", found))
    counts = table("Passes", ["model", "tokens", "ms", "floor, ms", "of the floor"], rows)
    content = tag("p", said, class_="soft") + tag("ul", key, class_="key") + tag("div", figure, class_="charts")
    return "passes", "What a pass costs", content + behind(counts)


def _time(metrics: Sequence[ArmMetrics]) -> Chapter | None:
    known = [metric for metric in metrics if metric.shares]
    if not known:
        return None
    bars = [(one, one.shares) for one in known if one.shares]
    figures = []
    for name in dict.fromkeys(_label(one, metrics) for one in known):
        rows = [
            (one.arm, (share.draft, share.verify, share.confirm, share.other))
            for one, share in bars
            if _label(one, metrics) == name
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
            _label(one, metrics),
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
    metrics = [one for one in measure(results, by_category=True) if one.arm not in (TWIN, BASELINE)]
    if len({metric.category for metric in metrics}) < 2:
        return None
    rows = [
        [
            _label(one, metrics),
            str(one.category),
            one.arm,
            str(one.questions),
            speedup_cell(one),
            _interval(one.speedup_total),
            number(one.acceptance_length),
        ]
        for one in sorted(metrics, key=lambda one: (one.dataset, one.temperature, str(one.category)))
    ]
    heads = ["dataset", "category", "arm", "questions", "speedup", "95 % interval", "acceptance length"]
    return "categories", "By kind of task", table("Categories", heads, rows, 3)


def _conditions(results: Results) -> Chapter:
    run, found, config = results.run, conditions(results), results.run.config
    often = "once" if config.repeats == 1 else f"{config.repeats} times"
    settings = f"{temperatures(run)}, at most {config.max_new_tokens} tokens, each question {often}, seed {config.seed}"
    asked = (f"{name}: {one['questions']}, digest {one['sha256'][:12]}" for name, one in run.datasets.items())
    facts = [
        ("Model", run.model),
        ("Verifier", run.verifier or "none"),
        ("Machine", f"{run.device}, {run.dtype}"),
        ("Settings", settings),
        ("Questions", "; ".join(asked)),
        ("Other programs", _load(results)),
        ("Clock", "{:.0f} to {:.0f} MHz".format(*found.mhz) if found.mhz else "not told by the system"),
        ("Bandwidth", number(run.bandwidth / 1e9 if run.bandwidth else None, 1, " GB/s")),
        ("Identical arms", _twins(found.twins, found.twins_agree)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in run.versions.items())),
        ("Code", run.git or "installed, commit not known"),
        *((f"Peer {arm}", version) for arm, version in run.peers.items()),
        *(
            (f"Failed: {row.arm}", f"{row.dataset}, question {row.question_id}: {row.error}")
            for row in _failed(results)
        ),
    ]
    arms = [(name, _arm(name)) for name in config.arms]
    return "conditions", "Conditions", _facts(facts) + tag("h3", "Arms") + _facts(arms)


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    return tag("dl", "".join(tag("dt", escape(name)) + tag("dd", escape(value)) for name, value in facts))


def _arm(name: str) -> str:
    """What an arm is."""
    arm = ARMS[name]
    if name == TWIN:
        return "vanilla once more, on every fourth question, to see the noise"
    if arm.is_peer:
        return f"{arm.program}, in a process of its own"
    named = {"ngram": "n-gram drafts", "none": "no drafts", "auto": "drafts by all drafters that pay"}
    drafts = named.get(arm.draft, f"{arm.draft} drafts")
    who = {
        "full": "the full-precision model decides",
        "quantized": "the low-bit copy decides",
        "gated": "the low-bit copy verifies, and the full-precision model confirms what it is not sure of",
        "exact": "the low-bit copy verifies, the full-precision model confirms or checks drafts itself",
    }
    return f"{drafts}; {who.get(arm.verify, arm.verify)}"


def _load(results: Results) -> str:
    found = conditions(results)
    if found.others is None or found.most_others is None:
        return "not told by the system"
    shares = f"took {100 * found.others:.0f} % of the cores, at most {100 * found.most_others:.0f} %"
    return f"{shares}; busy in {found.busy} answers"


def _twins(twins: Estimate | None, agree: bool | None) -> str:
    if twins is None:
        return "not asked"
    said = {True: "they agree", False: "they differ", None: "too few questions to tell"}[agree]
    return f"{twins.value:.3f}× ({_interval(twins)}, {twins.questions} questions): {said}"


def _failed(results: Results) -> list[Row]:
    """The first failure of each arm."""
    return list({row.arm: row for row in reversed(results.errors)}.values())
