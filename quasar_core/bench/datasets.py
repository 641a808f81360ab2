"""What a bench asks: questions in the FastChat form, by name, from a folder, or from the package.

A question is one JSON object: `question_id`, `category`, and `turns`, the user's messages of one conversation. A name
is looked for in the package (`demo`), as a path, in the folder that `QUASAR_DATA` names, and on the hub, in this order.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quasar_core.bench.hub_datasets import HUB_DATASETS, SPEC_BENCH_PARTS, download
from quasar_core.errors import UsageError
from quasar_core.files import absolute, is_file, is_folder, parse_json, read_text, require_characters
from quasar_core.foreign import reason

DEMO_FILE = Path(__file__).parent.parent / "demo" / "prompts.jsonl"
DATASET_NAMES = ("demo", *HUB_DATASETS)
PAPER_SIZE = 80  # questions of a dataset in the paper; longer ones are cut to their first 80
DATA_VARIABLE = "QUASAR_DATA"


@dataclass(frozen=True)
class Question:
    """One conversation to lead: the user's messages in order."""

    question_id: int | str
    category: str
    turns: tuple[str, ...]


@dataclass(frozen=True)
class Dataset:
    """Questions under a name."""

    name: str
    questions: tuple[Question, ...]

    @property
    def sha256(self) -> str:
        """Identity of the questions: runs over the same digest can be compared."""
        content = json.dumps([asdict(question) for question in self.questions], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def limited(self, count: int | None) -> "Dataset":
        """At most `count` questions, spread evenly over the dataset, so that every category keeps its share."""
        total = len(self.questions)
        if count is None or count >= total:
            return self
        return Dataset(self.name, tuple(self.questions[i * total // count] for i in range(count)))


def load_datasets(names: str, limit: int | None = None) -> list[Dataset]:
    """The datasets of a comma-separated list, each cut to `limit` questions.

    Raises UsageError for an unknown name or a malformed file, QuasarError when the hub gives no answer.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise UsageError("--dataset needs a name or a path.")
    datasets = [load_dataset(name).limited(limit) for name in wanted]
    if len({dataset.name for dataset in datasets}) < len(datasets):
        raise UsageError(f"--dataset names a dataset twice: {names}.")
    return datasets


def load_dataset(name: str) -> Dataset:
    """One dataset, whole, by name or path."""
    key = name.replace("_", "-")
    if key == "demo":
        return Dataset("demo", read_questions(DEMO_FILE))
    if is_file(Path(name)):
        return Dataset(Path(name).stem, read_questions(Path(name)))
    folder = _data_folder()
    if folder is not None and (found := _from_folder(folder, key)):
        return Dataset(key, found)
    if key not in HUB_DATASETS:
        raise UsageError(f"--dataset must be {', '.join(DATASET_NAMES)} or the path of a JSONL file, not {name}.")
    rows = download(key)
    return Dataset(key, _cut(key, [_question(row, f"{key} on the hub, question {row['question_id']}") for row in rows]))


def _data_folder() -> Path | None:
    """The folder that QUASAR_DATA names; UsageError where it names anything else."""
    named = os.environ.get(DATA_VARIABLE)
    if not named:
        return None
    folder = absolute(Path(named))
    if not is_folder(folder):
        raise UsageError(f"{DATA_VARIABLE} must name a folder, and {named} is none.")
    return folder


def read_questions(path: Path) -> tuple[Question, ...]:
    """The questions of a JSONL file in the FastChat form; a bad line is named by file and number."""
    questions = []
    # splitlines would cut at separators inside a string
    for number, line in enumerate(read_text(path, kind=UsageError).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UsageError(f"{where}: this is not JSON ({reason(error)}).") from error
        questions.append(_question(row, where))
    _check(questions, path)
    return tuple(questions)


def _question(row: Any, where: str) -> Question:
    if not isinstance(row, dict):
        raise UsageError(f"{where}: a question must be a JSON object.")
    turns = row.get("turns")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise UsageError(f"{where}: `turns` must be a list of at least one message.")
    question_id = row.get("question_id")
    if isinstance(question_id, bool) or not isinstance(question_id, int | str):
        raise UsageError(f"{where}: `question_id` must be a whole number or a string.")
    category = str(row.get("category", "all"))
    for text in (*turns, category, str(question_id)):
        require_characters(text, where)
    return Question(question_id, category, tuple(turns))


def _check(questions: Sequence[Question], path: Path) -> None:
    if not questions:
        raise UsageError(f"{path} holds no question.")
    seen = set()
    for question in questions:
        if question.question_id in seen:
            raise UsageError(f"{path} holds question_id {question.question_id} twice.")
        seen.add(question.question_id)


def _from_folder(folder: Path, key: str) -> tuple[Question, ...] | None:
    for spelling in (key, key.replace("-", "_")):
        file = folder / spelling / "question.jsonl"
        if is_file(file):
            return _cut(key, read_questions(file))
    if key in SPEC_BENCH_PARTS and (whole := _from_folder(folder, "spec-bench")):
        return tuple(question for question in whole if question.category in SPEC_BENCH_PARTS[key])
    return None


def _cut(key: str, questions: Sequence[Question]) -> tuple[Question, ...]:
    cut = PAPER_SIZE if key in HUB_DATASETS and key != "spec-bench" else None
    return tuple(questions[:cut])
