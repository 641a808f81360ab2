"""Compute a table's numbers from a result file: acceptance, speed, cost, quality, and speedup with intervals.

Pure: knows nothing of models. A question's turns and repeats are pooled, and the ratios of the pooled counts are those
of `records.Stats`, each defined there. A question of which an arm failed any turn counts as failed for that arm, and
is left out of its other numbers. docs/measuring.md defines every figure.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from statistics import fmean
from typing import Any

import numpy as np

from quasar_core.bench.arms import ARMS, BASELINE, TWIN
from quasar_core.bench.metrics.estimates import Estimate, Yields, estimate, mean_of_ratios, ratio_of_totals
from quasar_core.bench.metrics.quality import Agreement, agreement
from quasar_core.bench.metrics.speculation import Speculation, speculation
from quasar_core.bench.results import Passes, Results, Row, Run
from quasar_core.records import DrafterUse, Stats


@dataclass(frozen=True)
class Spread:
    """The median and the 95th percentile over answers."""

    median: float
    p95: float


@dataclass(frozen=True)
class Shares:
    """Where the seconds of decoding went, as shares of them; `other` is the engine's own, and Python."""

    draft: float
    verify: float
    confirm: float
    other: float


@dataclass(frozen=True)
class ArmMetrics:
    """One arm on one dataset at one temperature, or on one category of it; None where a number does not exist.

    `acceptance_length` is total new tokens ÷ total steps, the prompt's token left out; `acceptance_length_mean` is the
    mean of the questions' own. `speedup_total`, the headline, is the ratio of total tokens ÷ total seconds;
    `speedup_mean` is Spec-Bench's, the mean over questions of the ratio of tokens per second. `speedup_answers` counts
    what a user waits for: all new tokens ÷ all seconds, those of the prompt's pass among them. `ttft_s` is the time to
    the first token and `token_s` the seconds of decoding ÷ tokens, both over answers. `bytes_per_token` counts the
    weights that passes read, `floor_share` is the least time that they could take ÷ the time that decoding took.
    `identical` counts the questions whose every answer is vanilla's, token for token; other programs draw
    by numbers of their own, so of their sampled text it does not exist. `correct` of `scored` answers are right.
    """

    dataset: str
    temperature: float
    category: str | None
    arm: str
    questions: int
    failed: int
    new_tokens: int
    steps: int
    prefill_s: float
    decode_s: float
    tokens_per_s: float | None
    acceptance_length: float | None
    acceptance_length_mean: float | None
    acceptance_length_vllm: float | None
    acceptance_rate: float | None
    confirm_rate: float | None
    speedup_mean: Estimate | None
    speedup_total: Estimate | None
    speedup_answers: Estimate | None
    identical: int | None
    ttft_s: Spread | None
    token_s: Spread | None
    shares: Shares | None
    bytes_per_token: float | None
    floor_share: float | None
    peak_memory_bytes: int
    joules_per_token: float | None
    agreement: Agreement | None
    correct: int
    scored: int
    speculation: Speculation
    drafters: dict[str, DrafterUse] = field(default_factory=dict)


@dataclass(frozen=True)
class ArmMean:
    """One arm at one temperature over all datasets, each counting the same; None where a dataset lacks the number."""

    temperature: float
    arm: str
    speedup: float | None
    acceptance_length: float | None


@dataclass(frozen=True)
class _Answer:
    """One arm's answers to one question: its rows, and their pooled counts; None where one failed."""

    rows: list[Row]
    stats: Stats | None

    @property
    def token_ids(self) -> list[list[int]]:
        """Turn by turn."""
        return [row.token_ids for row in self.rows]


_Answers = dict[int | str, _Answer]  # by question


def measure(results: Results, by_category: bool = False) -> list[ArmMetrics]:
    """The metrics of each dataset (with `by_category`: of each of its categories), temperature and arm, in order."""
    groups: dict[tuple[str, float, str | None], list[Row]] = {}
    for row in results.rows:
        groups.setdefault((row.dataset, row.temperature, row.category if by_category else None), []).append(row)
    return [metric for group, rows in groups.items() for metric in _measure_group(*group, rows, results.run)]


def _measure_group(
    dataset: str, temperature: float, category: str | None, rows: Sequence[Row], run: Run
) -> list[ArmMetrics]:
    arms = [arm for arm in run.config.arms if any(row.arm == arm for row in rows)]
    answers = {arm: _by_question([row for row in rows if row.arm == arm]) for arm in arms}
    place = dataset, temperature, category
    return [_measure_arm(*place, arm, answers[arm], answers.get(BASELINE, {}), run) for arm in arms]


def _measure_arm(
    dataset: str,
    temperature: float,
    category: str | None,
    arm: str,
    answers: _Answers,
    vanilla: _Answers,
    run: Run,
) -> ArmMetrics:
    whole = [answer for answer in answers.values() if answer.stats is not None]
    pooled = [answer.stats for answer in whole if answer.stats is not None]
    rows = [row for answer in whole for row in answer.rows]
    total = pool(pooled)
    lengths = [length for stats in pooled if (length := stats.acceptance_length) is not None]
    return ArmMetrics(
        dataset=dataset,
        temperature=temperature,
        category=category,
        arm=arm,
        questions=len(answers),
        failed=len(answers) - len(whole),
        acceptance_length_mean=fmean(lengths) if lengths else None,
        **{name: getattr(total, name) for name in _POOLED},
        **_beside_vanilla(arm, temperature, answers, vanilla),
        **_reading(arm, total, run),
        shares=shares(total),
        **_over_answers(rows),
        speculation=speculation([row.stats for row in rows if row.stats], ARMS[arm].draft),
    )


_POOLED = (
    "new_tokens",
    "steps",
    "prefill_s",
    "decode_s",
    "tokens_per_s",
    "acceptance_length",
    "acceptance_length_vllm",
    "acceptance_rate",
    "confirm_rate",
    "peak_memory_bytes",
    "drafters",
)  # the figures that pooled counts have by the same names


def _beside_vanilla(arm: str, temperature: float, answers: _Answers, vanilla: _Answers) -> dict[str, Any]:
    """Speedups, and how much of the text is vanilla's."""
    mean, total, whole = _speedups(answers, vanilla)
    compared = vanilla if temperature == 0 or not ARMS[arm].is_peer else {}  # others draw by numbers of their own
    return {
        "speedup_mean": mean,
        "speedup_total": total,
        "speedup_answers": whole,
        "identical": _count_identical(answers, compared) if compared else None,
        "agreement": _agreement(answers, compared) if compared else None,
    }


def _reading(arm: str, total: Stats, run: Run) -> dict[str, Any]:
    """The bytes of weights that were read, by tokens, and their least time by the time that decoding took."""
    read, yielded = bytes_read(arm, total, run.passes), _yielded(total)
    return {
        "bytes_per_token": read / yielded if read and yielded else None,
        "floor_share": read / run.bandwidth / total.decode_s if read and run.bandwidth and total.decode_s else None,
    }


def _over_answers(rows: Sequence[Row]) -> dict[str, Any]:
    """What is found answer by answer: times, energy, and which are right."""
    stats = [row.stats for row in rows if row.stats]
    return {
        "ttft_s": spread([one.ttft_s for one in stats if one.ttft_s]),
        "token_s": spread([1 / speed for one in stats if (speed := one.tokens_per_s)]),
        "joules_per_token": joules_per_token(rows),
        "correct": sum(row.correct is True for row in rows),
        "scored": sum(row.correct is not None for row in rows),
    }


def spread(values: Sequence[float]) -> Spread | None:
    """Median and 95th percentile, between values linear; None of none."""
    return Spread(*map(float, np.quantile(values, (0.5, 0.95)))) if values else None


def shares(total: Stats) -> Shares | None:
    """Where decoding's seconds went; None where they were not told apart, as by other programs."""
    known = total.draft_s + total.verify_s + total.confirm_s
    if not known or not total.decode_s:
        return None
    draft, verify, confirm = (part / total.decode_s for part in (total.draft_s, total.verify_s, total.confirm_s))
    return Shares(draft, verify, confirm, max(0.0, 1 - draft - verify - confirm))


def bytes_read(arm: str, total: Stats, passes: dict[str, Passes]) -> int | None:
    """Bytes of weights that decoding's passes read: a step's of the model that checked, a confirm's of the target.

    None for other programs, and where a model's bytes are not known. The keys and values of the text are left out.
    """
    by_verifier, by_target = _passes_of(arm, total)
    counts = {"verifier": by_verifier, "target": by_target}
    if ARMS[arm].is_peer or any(count and role not in passes for role, count in counts.items()):
        return None
    return sum(count * passes[role].bytes for role, count in counts.items() if count)


def _passes_of(arm: str, total: Stats) -> tuple[int, int]:
    """Passes of the verifier, and of the target; one that checked a draft behind a window is a confirm and a step."""
    told = sum(step.by_target for step in total.step_log)
    if not told and (ARMS[arm].verify == "full" or (ARMS[arm].verify == "exact" and not total.confirms)):
        told = total.steps  # files of before steps told whose they are; in `exact` the target then verified alone
    joint = sum(confirm.drafted > 0 for confirm in total.confirm_log)
    return total.steps - told, told + total.confirms - joint


def joules_per_token(rows: Sequence[Row]) -> float | None:
    """Joules of whole answers, prompts included, ÷ new tokens; None where an answer's are not known."""
    joules = [row.joules for row in rows if row.joules is not None]
    tokens = sum(len(row.token_ids) for row in rows)
    return sum(joules) / tokens if tokens and len(joules) == len(rows) else None


def pool(stats: Iterable[Stats]) -> Stats:
    """One Stats over several generations: counts and seconds added, logs joined, peak memory the largest."""
    total = Stats()
    for one in stats:
        for name in _ADDED:
            setattr(total, name, getattr(total, name) + getattr(one, name))
        total.step_log.extend(one.step_log)
        total.confirm_log.extend(one.confirm_log)
        total.peak_memory_bytes = max(total.peak_memory_bytes, one.peak_memory_bytes)
    return total


_JOINED = {"step_log", "confirm_log", "peak_memory_bytes"}
_ADDED = [each.name for each in fields(Stats) if each.name not in _JOINED]


def mean_over_datasets(metrics: Sequence[ArmMetrics]) -> list[ArmMean]:
    """The last column pair of the paper's table, for each temperature and arm; the twin of vanilla is left out."""
    by_arm: dict[tuple[float, str], list[ArmMetrics]] = {}
    for metric in metrics:
        if metric.arm != TWIN:
            by_arm.setdefault((metric.temperature, metric.arm), []).append(metric)
    return [
        ArmMean(
            temperature,
            arm,
            _mean([metric.speedup_total.value if metric.speedup_total else None for metric in of_arm]),
            _mean([metric.acceptance_length for metric in of_arm]),
        )
        for (temperature, arm), of_arm in by_arm.items()
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def _by_question(rows: Sequence[Row]) -> _Answers:
    grouped: dict[int | str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.repeat, row.turn)):
        grouped.setdefault(row.question_id, []).append(row)
    return {question_id: _answer(of_one) for question_id, of_one in grouped.items()}


def _answer(rows: list[Row]) -> _Answer:
    stats = [row.stats for row in rows if row.stats is not None]
    return _Answer(rows, pool(stats) if len(stats) == len(rows) else None)


def _pairs(answers: _Answers, vanilla: _Answers) -> list[tuple[_Answer, _Answer]]:
    """An arm's answers beside vanilla's, where neither failed."""
    pairs = [(answer, vanilla[question_id]) for question_id, answer in answers.items() if question_id in vanilla]
    return [(ours, theirs) for ours, theirs in pairs if ours.stats is not None and theirs.stats is not None]


def count_compared(results: Results, dataset: str, temperature: float, arm: str) -> int:
    """Count the questions that an arm and vanilla both answered."""
    return len(_pairs(*(answers_of(results, dataset, temperature, name) for name in (arm, BASELINE))))


def _count_identical(answers: _Answers, vanilla: _Answers) -> int:
    return sum(ours.token_ids == theirs.token_ids for ours, theirs in _pairs(answers, vanilla))


def _agreement(answers: _Answers, vanilla: _Answers) -> Agreement:
    """How far first turns agree with vanilla's: what follows another answer has another prompt."""
    pairs = _pairs(answers, vanilla)
    return agreement((ours.token_ids[0], theirs.token_ids[0]) for ours, theirs in pairs)


def _speedups(answers: _Answers, vanilla: _Answers) -> tuple[Estimate | None, Estimate | None, Estimate | None]:
    """Speedups by question, in total, and of whole answers, over the questions on which both arms took a step."""
    decoding, whole = paired_yields(answers, vanilla), paired_yields(answers, vanilla, whole=True)
    if not len(decoding[0]):
        return None, None, None
    return estimate(mean_of_ratios, *decoding), estimate(ratio_of_totals, *decoding), estimate(ratio_of_totals, *whole)


def speedup_over_all(
    results: Results, arm: str, temperature: float, whole: bool = False, base: str = BASELINE
) -> Estimate | None:
    """An arm's speedup over the questions of all datasets together; None where no question was answered by both.

    It is that over plain decoding, or over another arm.
    """
    datasets = dict.fromkeys(row.dataset for row in results.rows if row.temperature == temperature)
    pairs = [
        paired_yields(answers_of(results, name, temperature, arm), answers_of(results, name, temperature, base), whole)
        for name in datasets
    ]
    timed = [np.concatenate([pair[side] for pair in pairs]) for side in (0, 1)] if pairs else []
    return estimate(ratio_of_totals, *timed) if timed and len(timed[0]) else None


def paired_yields(answers: _Answers, others: _Answers, whole: bool = False) -> tuple[Yields, Yields]:
    """Tokens and seconds [n, 2] of the questions that both answered, one beside the other: of decoding, or of all."""
    pairs = [(_yield(ours, whole), _yield(theirs, whole)) for ours, theirs in _pairs(answers, others)]
    timed = np.array([pair for pair in pairs if np.all(pair)], dtype=np.float64).reshape(-1, 2, 2)
    return timed[:, 0], timed[:, 1]


def answers_of(results: Results, dataset: str, temperature: float, arm: str) -> _Answers:
    """One arm's answers, by question."""
    place = dataset, temperature, arm
    return _by_question([row for row in results.rows if (row.dataset, row.temperature, row.arm) == place])


def _yield(answer: _Answer, whole: bool) -> tuple[float, float]:
    """Tokens that the steps yielded, and their seconds; with `whole`, those of the prompt's pass too."""
    stats = answer.stats or Stats()
    if whole:
        return stats.new_tokens, stats.prefill_s + stats.decode_s
    return _yielded(stats), stats.decode_s


def _yielded(stats: Stats) -> int:
    return stats.new_tokens - stats.prefill_tokens
