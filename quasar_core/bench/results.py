"""The result file: what ran, where, on which questions, and one row for each answer, step logs included.

Every table is computed from this file alone. It appears whole: written beside its place, then renamed. Until then rows
are appended to `NAME.partial.jsonl`, so that an interrupted run can go on: the run first, then a line for each
conversation, which is a list of rows, so a line that was cut off takes its whole conversation with it.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from quasar_core.bench.arms import FORMER_NAMES, BenchConfig
from quasar_core.errors import QuasarError, UsageError, reason
from quasar_core.files import (
    is_file,
    json_line,
    opened,
    parse_json,
    read_json,
    read_text,
    refuse_foreign,
    write_json_lines,
)
from quasar_core.records import FinishReason, Stats, stored_stats
from quasar_core.store.folders import reached
from quasar_core.typed import build, known_part

FORMAT_VERSION = 2
READ_VERSIONS = (1, 2)  # 1: one temperature for a run, no traces


Key = tuple[str, int | str, int, str, float]


@dataclass(frozen=True)
class Passes:
    """What passes of a model cost when the run began: seconds of a pass of so many tokens, and the bytes it reads."""

    bytes: int
    tokens: tuple[int, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """One answer of one arm, or the error that stands in its place; `turn` and `repeat` count from 0.

    `lengths` are the characters of `text` that each token finished, `refused` the texts of the tokens that confirms
    refused: with the logs of `stats` they make up the trace. `reference` is the dataset's own answer, `correct` whether
    this one is right.
    """

    dataset: str
    question_id: int | str
    category: str
    turn: int
    repeat: int
    arm: str
    seed: int
    token_ids: list[int]
    text: str
    finish_reason: FinishReason | None
    stats: Stats | None
    error: str | None = None
    others: float | None = None  # the share of the cores that other programs took meanwhile
    mhz: float | None = None  # the cores' frequency after it
    temperature: float = 0.0
    lengths: list[int] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    reference: str | None = None
    correct: bool | None = None
    joules: float | None = None  # that the processor's package and the GPU took meanwhile

    @property
    def conversation(self) -> Key:
        """The turns that belong together: dataset, question, repeat, arm, temperature."""
        return self.dataset, self.question_id, self.repeat, self.arm, self.temperature

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, every step and confirm included."""
        return {**vars(self), "stats": self.stats.to_dict(logs=True) if self.stats else None}

    @classmethod
    def from_dict(cls, content: Any, where: str = "") -> "Row":
        """Rebuild from `to_dict`; ValueError for what does not fit."""
        if isinstance(content, dict):
            content = {**content, "stats": stored_stats(content.get("stats")), "arm": _arm(content.get("arm"))}
        return build(cls, content, where)


@dataclass(frozen=True)
class Run:
    """What ran and where. `datasets` gives the number, the digest and the source of the questions asked, by dataset.

    `passes` are known of models of our own decoder, by role; `bandwidth` is what the machine reads, in bytes a second.
    `peers` says of each arm that is another program what ran, with its version and options. `energy` says what the
    joules of the rows count; None where no counter could be read.
    """

    config: BenchConfig
    model: str
    verifier: str | None
    device: str
    dtype: str
    datasets: dict[str, dict[str, Any]]
    versions: dict[str, str]
    notes: list[str]
    git: str | None
    passes: dict[str, Passes] = field(default_factory=dict)
    bandwidth: float | None = None
    peers: dict[str, str] = field(default_factory=dict)
    energy: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Run":
        """Rebuild from `to_dict`; ValueError for another format version and for what does not fit."""
        version = content.get("format_version")
        if version not in READ_VERSIONS:
            raise ValueError(f"format version {version}, where {FORMAT_VERSION} is read")
        for name, facts in build(dict[str, dict], content.get("datasets"), "datasets").items():
            build(_Asked, known_part(_Asked, facts), f"datasets.{name}")
        return build(cls, _as_of_today(known_part(cls, content)))

    def settings(self) -> dict[str, Any]:
        """Everything that may change a number, flat: setting → value."""
        datasets = {f"dataset {name}": content["sha256"][:12] for name, content in self.datasets.items()}
        versions = {f"{package} version": version for package, version in self.versions.items()}
        machine = {"model": self.model, "verifier": self.verifier, "device": self.device, "dtype": self.dtype}
        return {**machine, **datasets, **versions, **json.loads(json.dumps(asdict(self.config)))}


def _arm(name: Any) -> Any:
    """An arm's name of today."""
    return FORMER_NAMES.get(name, name) if isinstance(name, str) else name


def _as_of_today(run: dict[str, Any]) -> dict[str, Any]:
    """A run of an earlier version: arms by their names of today, one temperature as several."""
    config = run.get("config")
    if not isinstance(config, dict) or not isinstance(config.get("arms"), list):
        return run  # which is refused
    config = {**config, "arms": [_arm(name) for name in config["arms"]]}
    if "temperature" in config:
        config["temperatures"] = [config.pop("temperature")]
    return {**run, "config": config}


@dataclass(frozen=True)
class _Asked:
    """What is read of a dataset in a result file."""

    questions: int
    sha256: str
    source: str = ""


def temperatures(run: Run) -> str:
    """The run's temperatures in words, such as "temperature 0" or "temperatures 0 and 1"."""
    shown = [f"{one:g}" for one in run.config.temperatures]
    return f"temperature{'s' if len(shown) > 1 else ''} {' and '.join(shown)}"


def differing_settings(a: Run, b: Run) -> list[tuple[str, Any, Any]]:
    """Settings that two runs do not share: name, value in `a`, value in `b`; None where a run lacks it."""
    of_a, of_b = a.settings(), b.settings()
    return [(name, of_a.get(name), of_b.get(name)) for name in {**of_a, **of_b} if of_a.get(name) != of_b.get(name)]


@dataclass(frozen=True)
class Divergence:
    """Where an arm that promises the target's output first left vanilla's: the `position` of the token in that answer.

    `gap` is the difference of the target's two best logits there, `rounding` what the dtype rounds logits of that
    size to.
    """

    dataset: str
    question_id: int | str
    repeat: int
    arm: str
    turn: int
    position: int
    gap: float
    rounding: float

    @property
    def near_tie(self) -> bool:
        """Whether rounding explains it; anything else is a defect."""
        return self.gap <= self.rounding


@dataclass(frozen=True)
class Achieved:
    """What an arm that leaves tokens unchecked achieved: `agreed` of `tokens` are the target's own; `asked` a share."""

    dataset: str
    arm: str
    tokens: int
    agreed: int
    asked: float

    @property
    def share(self) -> float:
        """The share of tokens that agreed."""
        return self.agreed / self.tokens if self.tokens else 1.0


@dataclass(frozen=True)
class Results:
    """A finished run."""

    run: Run
    rows: list[Row]
    divergences: list[Divergence] = field(default_factory=list)
    achieved: list[Achieved] = field(default_factory=list)

    @property
    def errors(self) -> list[Row]:
        """Rows that hold an error."""
        return [row for row in self.rows if row.error is not None]


def write_results(results: Results, path: Path) -> None:
    """Write the result file, whole or not at all."""
    content = {
        **results.run.to_dict(),
        "rows": [row.to_dict() for row in results.rows],
        "divergences": [asdict(divergence) for divergence in results.divergences],
        "achieved": [asdict(one) for one in results.achieved],
    }
    write_json_lines(path, [content])


def refuse_foreign_results(path: Path) -> None:
    """Refuse, before any work, an output that exists and that no bench wrote."""
    refuse_foreign(path, "--output", "a result file of quasar bench", is_result_file)


def is_result_file(path: Path) -> bool:
    """Whether a file tells of a run, as result files and the first line of their logs do, of earlier versions too."""
    text = read_text(path)
    try:
        content = parse_json(text)
    except ValueError:
        content = parse_json(text.partition("\n")[0])
    always = {one.name for one in fields(Run) if one.default is MISSING and one.default_factory is MISSING}
    return isinstance(content, dict) and always <= content.keys()


def read_results(path: Path) -> Results:
    """Read a result file; UsageError, in one sentence, where it is none, or holds no answer."""
    content = read_json(path, UsageError)
    try:
        rows = build(list[Any], content.get("rows"), "rows")
        run = Run.from_dict(content)
        if not rows:
            raise ValueError("it holds no answers")
        return Results(
            run,
            _with_temperature([Row.from_dict(row, f"rows[{i}]") for i, row in enumerate(rows)], content, run),
            build(list[Divergence], content.get("divergences"), "divergences"),
            build(list[Achieved], content.get("achieved", []), "achieved"),
        )
    except (ValueError, UsageError) as error:  # the config's own checks name the flag
        raise UsageError(f"{path} is not a result file of quasar bench: {reason(error)}.") from error


def _with_temperature(rows: list[Row], content: dict[str, Any], run: Run) -> list[Row]:
    """Rows of version 1 have the temperature of their run."""
    if content.get("format_version") != 1:
        return rows
    return [replace(row, temperature=run.config.temperatures[0]) for row in rows]


class RowLog:
    """The rows so far, in memory and on disk.

    Opening an earlier log keeps its conversations, apart from failed ones (they are tried again). UsageError when the
    log belongs to a run with other settings.
    """

    def __init__(self, output: Path, run: Run, resume: bool = True) -> None:
        self.output = output
        self.path = output.with_name(output.name + ".partial.jsonl")
        self.run = run
        if not resume:
            refuse_foreign_results(self.path)
        kept = self._kept() if resume and is_file(self.path) else []
        self.rows = [row for conversation in kept for row in conversation]
        write_json_lines(self.path, [run.to_dict(), *map(_rows, kept)])

    def append(self, conversation: list[Row]) -> None:
        """Add the rows of one conversation, at once."""
        self.rows.extend(conversation)
        try:
            with self.path.open("ab") as file:
                file.write(json_line(_rows(conversation)))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise QuasarError(
                f"{self.path} could not be written: {error.strerror or error}. What is finished is kept, and the same "
                "command goes on from there."
            ) from error

    def finish(self, divergences: list[Divergence], achieved: Sequence[Achieved] = ()) -> Results:
        """Write the result file, and drop the log."""
        results = Results(self.run, self.rows, divergences, list(achieved))
        write_results(results, self.output)
        reached("written")
        self.path.unlink()
        return results

    def _is_left_over(self, earlier: Run, rows: int) -> bool:
        """Whether the run of the log has its result file, and ended before it removed the log."""
        if not self.output.is_file():
            return False
        try:
            results = read_results(self.output)
        except UsageError:
            return False
        return not differing_settings(results.run, earlier) and len(results.rows) >= rows

    def _kept(self) -> list[list[Row]]:
        with opened(self.path) as file:
            header, *lines = file.read().decode("utf-8", errors="replace").split("\n")  # the last may be cut
        try:
            earlier = Run.from_dict(build(dict, parse_json(header)))
            conversations = [[Row.from_dict(row) for row in build(list, parse_json(line))] for line in lines[:-1]]
            conversations = [_with_temperature(rows, parse_json(header), earlier) for rows in conversations]
        except (ValueError, UsageError) as error:
            raise QuasarError(f"{self.path} is damaged; pass --no-resume to start anew.") from error
        differences = differing_settings(earlier, self.run)
        if differences and self._is_left_over(earlier, sum(map(len, conversations))):
            return []
        if differences:
            changed = ", ".join(f"{name} {before}, now {now}" for name, before, now in differences)
            raise UsageError(
                f"{self.path} belongs to a run with other settings ({changed}); "
                "repeat them to finish it, or pass --no-resume to start anew."
            )
        return [conversation for conversation in conversations if not any(row.error for row in conversation)]


def _rows(conversation: list[Row]) -> list[dict[str, Any]]:
    return [row.to_dict() for row in conversation]
