"""Compute a table's numbers from a result file: acceptance, speed, equality with vanilla, and speedup with intervals.

Pure: knows nothing of models. A question's turns and repeats are pooled, and the ratios of the pooled counts are those
of `records.Stats`, each defined there. A question of which an arm failed any turn counts as failed for that arm, and
is left out of its other numbers. Speedup has two definitions, each with a bootstrap interval over questions; arrays
[n, 2] hold a row for each question: the tokens that its steps yielded, and the seconds they took. `compare` sets the
numbers of two result files beside one another, arm by arm.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from quasar_core.bench.arms import BASELINE
from quasar_core.bench.results import Results, Row, differing_settings
from quasar_core.errors import UsageError
from quasar_core.records import DrafterUse, Stats
from quasar_core.system import Load

SAMPLES = 2000
CONFIDENCE = 0.95
SPEED = "tokens/s"
FEWEST = 8  # questions: of fewer, a bootstrap's interval is too narrow

E4M3Format = npt.NDArray[np.float64]
Statistic = Callable[[E4M3Format, E4M3Format], E4M3Format]


@dataclass(frozen=True)
class Estimate:
    """A speedup over so many questions and its 95 % interval; no interval from fewer than two questions."""

    value: float
    interval: tuple[float, float] | None
    questions: int

    @property
    def is_shown(self) -> bool:
        """Whether the run shows that the arm is faster, or slower: the interval of enough questions leaves 1 out."""
        if self.interval is None or self.questions < FEWEST:
            return False
        low, high = self.interval
        return low > 1 or high < 1


def mean_of_ratios(arm: E4M3Format, vanilla: E4M3Format) -> E4M3Format:
    """Spec-Bench's: the mean over questions of the ratio of tokens per second; [..., n, 2] twice to [...]."""
    speed, speed_of_vanilla = arm[..., 0] / arm[..., 1], vanilla[..., 0] / vanilla[..., 1]
    return np.asarray((speed / speed_of_vanilla).mean(axis=-1))


def ratio_of_totals(arm: E4M3Format, vanilla: E4M3Format) -> E4M3Format:
    """The ratio of total tokens ÷ total seconds; [..., n, 2] twice to [...]."""
    total, total_of_vanilla = arm.sum(axis=-2), vanilla.sum(axis=-2)
    return np.asarray((total[..., 0] / total[..., 1]) / (total_of_vanilla[..., 0] / total_of_vanilla[..., 1]))


def estimate(statistic: Statistic, arm: E4M3Format, vanilla: E4M3Format) -> Estimate:
    """A statistic of all n questions, and its interval when n are drawn with replacement, pairs kept together."""
    value, count = float(statistic(arm, vanilla)), len(arm)
    if count < 2:
        return Estimate(value, None, count)
    drawn = np.random.default_rng(0).integers(0, count, size=(SAMPLES, count))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(statistic(arm[drawn], vanilla[drawn]), (tail, 1 - tail))
    return Estimate(value, (float(low), float(high)), count)


@dataclass(frozen=True)
class ArmMetrics:
    """One arm on one dataset, or on one category of it; None where a number does not exist.

    `acceptance_length` is total new tokens ÷ total steps, the prompt's token left out; `acceptance_length_mean` is the
    mean of the questions' own. `speedup_total`, the headline, is the ratio of total tokens ÷ total seconds;
    `speedup_mean` is Spec-Bench's, the mean over questions of the ratio of tokens per second. `identical` counts the
    questions whose every answer is vanilla's, token for token; sampled text differs by design, so there it does not
    exist.
    """

    dataset: str
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
    identical: int | None
    drafters: dict[str, DrafterUse] = field(default_factory=dict)


@dataclass(frozen=True)
class ArmMean:
    """One arm over all datasets, each counting the same; None where a dataset lacks the number."""

    arm: str
    speedup: float | None
    acceptance_length: float | None


@dataclass(frozen=True)
class Conditions:
    """How far the machine was the run's own; None where the system did not tell.

    `others` and `most_others` are the mean and the largest share of the cores that other programs took during an
    answer, `busy` the answers during which that was too much to trust their seconds. `mhz` is the range of the cores'
    frequency. `reference_spread` is that of vanilla's tokens per second: the half of its answers in the middle, high ÷
    low − 1.
    """

    answers: int
    busy: int
    others: float | None
    most_others: float | None
    mhz: tuple[float, float] | None
    reference_spread: float | None

    @property
    def was_busy(self) -> bool:
        """Whether enough answers were disturbed to doubt the seconds."""
        return 10 * self.busy > self.answers


def conditions(results: Results) -> Conditions:
    """What the rows say of the machine; answers that an older version wrote say nothing."""
    others = [row.others for row in results.rows if row.others is not None]
    mhz = [row.mhz for row in results.rows if row.mhz is not None]
    speeds = [row.stats.tokens_per_s for row in results.rows if row.arm == BASELINE and row.stats]
    known = [speed for speed in speeds if speed]
    low, high = np.quantile(known, (0.25, 0.75)) if len(known) > 1 else (1.0, 1.0)
    return Conditions(
        answers=len(results.rows),
        busy=sum(Load(share).is_busy for share in others),
        others=fmean(others) if others else None,
        most_others=max(others, default=None),
        mhz=(min(mhz), max(mhz)) if mhz else None,
        reference_spread=float(high / low - 1) if len(known) > 1 else None,
    )


@dataclass(frozen=True)
class _Answer:
    """One arm's token ids for one question, turn by turn; `stats` is None where a turn failed."""

    token_ids: list[list[int]]
    stats: Stats | None


_Answers = dict[int | str, _Answer]  # by question


def measure(results: Results, by_category: bool = False) -> list[ArmMetrics]:
    """The metrics of each dataset (with `by_category`: of each of its categories) and arm, in the order of the run."""
    groups: dict[tuple[str, str | None], list[Row]] = {}
    for row in results.rows:
        groups.setdefault((row.dataset, row.category if by_category else None), []).append(row)
    return [metric for group, rows in groups.items() for metric in _measure_group(*group, rows, results)]


def _measure_group(dataset: str, category: str | None, rows: Sequence[Row], results: Results) -> list[ArmMetrics]:
    arms = [arm for arm in results.run.config.arms if any(row.arm == arm for row in rows)]
    answers = {arm: _by_question([row for row in rows if row.arm == arm]) for arm in arms}
    greedy = results.run.config.temperature == 0
    return [_measure_arm(dataset, category, arm, answers[arm], answers.get(BASELINE), greedy) for arm in arms]


def _measure_arm(
    dataset: str, category: str | None, arm: str, answers: _Answers, vanilla: _Answers | None, greedy: bool
) -> ArmMetrics:
    whole = [answer.stats for answer in answers.values() if answer.stats is not None]
    total = pool(whole)
    lengths = [length for stats in whole if (length := stats.acceptance_length) is not None]
    speedup_mean, speedup_total = _speedups(answers, vanilla) if vanilla else (None, None)
    return ArmMetrics(
        dataset=dataset,
        category=category,
        arm=arm,
        questions=len(answers),
        failed=len(answers) - len(whole),
        new_tokens=total.new_tokens,
        steps=total.steps,
        prefill_s=total.prefill_s,
        decode_s=total.decode_s,
        tokens_per_s=total.tokens_per_s,
        acceptance_length=total.acceptance_length,
        acceptance_length_mean=fmean(lengths) if lengths else None,
        acceptance_length_vllm=total.acceptance_length_vllm,
        acceptance_rate=total.acceptance_rate,
        confirm_rate=total.confirm_rate,
        speedup_mean=speedup_mean,
        speedup_total=speedup_total,
        identical=_count_identical(answers, vanilla) if vanilla and greedy else None,
        drafters=total.drafters,
    )


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
    """The last column pair of the paper's table, for each arm."""
    by_arm: dict[str, list[ArmMetrics]] = {}
    for metric in metrics:
        by_arm.setdefault(metric.arm, []).append(metric)
    return [
        ArmMean(
            arm,
            _mean([metric.speedup_total.value if metric.speedup_total else None for metric in of_arm]),
            _mean([metric.acceptance_length for metric in of_arm]),
        )
        for arm, of_arm in by_arm.items()
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def _by_question(rows: Sequence[Row]) -> _Answers:
    grouped: dict[int | str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.repeat, row.turn)):
        grouped.setdefault(row.question_id, []).append(row)
    return {question_id: _answer(of_one) for question_id, of_one in grouped.items()}


def _answer(rows: Sequence[Row]) -> _Answer:
    stats = [row.stats for row in rows if row.stats is not None]
    return _Answer([row.token_ids for row in rows], pool(stats) if len(stats) == len(rows) else None)


def _pairs(answers: _Answers, vanilla: _Answers) -> list[tuple[_Answer, _Answer]]:
    """An arm's answers beside vanilla's, where neither failed."""
    pairs = [(answer, vanilla[question_id]) for question_id, answer in answers.items() if question_id in vanilla]
    return [(ours, theirs) for ours, theirs in pairs if ours.stats is not None and theirs.stats is not None]


def _count_identical(answers: _Answers, vanilla: _Answers) -> int:
    return sum(ours.token_ids == theirs.token_ids for ours, theirs in _pairs(answers, vanilla))


def _speedups(answers: _Answers, vanilla: _Answers) -> tuple[Estimate, Estimate] | tuple[None, None]:
    """Both speedups, over the questions on which both arms took at least one step."""
    pairs = [(_yield(ours), _yield(theirs)) for ours, theirs in _pairs(answers, vanilla)]
    timed = np.array([pair for pair in pairs if np.all(pair)], dtype=np.float64).reshape(-1, 2, 2)
    if not len(timed):
        return None, None
    arm, baseline = timed[:, 0], timed[:, 1]
    return estimate(mean_of_ratios, arm, baseline), estimate(ratio_of_totals, arm, baseline)


def _yield(answer: _Answer) -> tuple[float, float]:
    """Tokens that the steps yielded, and their seconds."""
    stats = answer.stats or Stats()
    return stats.new_tokens - stats.prefill_tokens, stats.decode_s


@dataclass(frozen=True)
class Change:
    """One number of one arm in two runs; None where a run has no such number."""

    dataset: str
    arm: str
    quantity: str
    before: float | None
    after: float | None

    @property
    def ratio(self) -> float | None:
        """After ÷ before."""
        return self.after / self.before if self.before and self.after is not None else None


@dataclass(frozen=True)
class Comparison:
    """All changes, and the settings that the two runs do not share: name, before, after."""

    settings: list[tuple[str, Any, Any]]
    changes: list[Change]


QUANTITIES: dict[str, Callable[[ArmMetrics], float | None]] = {
    SPEED: lambda metric: metric.tokens_per_s,
    "speedup": lambda metric: metric.speedup_total.value if metric.speedup_total else None,
    "acceptance length": lambda metric: metric.acceptance_length,
}


def compare(before: Results, after: Results) -> Comparison:
    """Compare two runs over the same questions, arm by arm; arms of one run only are left out.

    Raises UsageError when the questions differ, or no arm is in both.
    """
    _check_questions(before, after)
    metrics = {(metric.dataset, metric.arm): metric for metric in measure(before)}
    pairs = [(metrics[key], metric) for metric in measure(after) if (key := (metric.dataset, metric.arm)) in metrics]
    if not pairs:
        raise UsageError("The two result files have no arm in common.")
    changes = [
        Change(old.dataset, old.arm, quantity, value(old), value(new))
        for old, new in pairs
        for quantity, value in QUANTITIES.items()
        if old.arm != BASELINE or quantity == SPEED  # vanilla's ratios are 1 by definition
    ]
    return Comparison(differing_settings(before.run, after.run), changes)


def _check_questions(before: Results, after: Results) -> None:
    if before.run.datasets != after.run.datasets:
        raise UsageError(
            f"The two result files are not about the same questions: {_describe(before)} and {_describe(after)}."
        )


def _describe(results: Results) -> str:
    return ", ".join(
        f"{name} ({content['questions']} questions, digest {content['sha256'][:8]})"
        for name, content in results.run.datasets.items()
    )
