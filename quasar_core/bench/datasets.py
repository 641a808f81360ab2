"""Load the questions of a bench: by name from the package or the hub, from a folder, or from a file.

A question is one JSON object in FastChat's form: `question_id`, `category`, and `turns`, the user's messages of one
conversation. A name is looked up in the package (`demo`), as a path, in the folder that `QUASAR_DATA` names, and on
the hub, in this order. From the hub plain JSON and JSONL files are read, so no dataset library is needed, and of
SPEED-Bench a Parquet file, by pyarrow.
Spec-Bench takes its 80 questions each of GSM8K and CNN/DM from the same sources as the paper does.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from quasar_core.errors import QuasarError, UsageError, foreign_errors, reason
from quasar_core.files import MAX_JSON_BYTES, absolute, is_file, is_folder, parse_json, read_text, require_characters
from quasar_core.store.hub import hub_failure
from quasar_core.typed import build

MT_BENCH_CATEGORIES = frozenset(
    ["writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"]
)
# What a folder that holds Spec-Bench holds already, by category.
SPEC_BENCH_PARTS = {
    "mt-bench": MT_BENCH_CATEGORIES,
    "gsm8k": frozenset({"math_reasoning"}),
    "cnn-dm": frozenset({"summarization"}),
}


@dataclass(frozen=True)
class HubFile:
    """One file of a dataset repository, at one commit of it; `category` stands in where its rows name none."""

    repository: str
    path: str
    category: str
    revision: str


_MT_BENCH = HubFile(
    "HuggingFaceH4/mt_bench_prompts", "raw/question.jsonl", "mt_bench", "b60d01a44377daa2d9434e50a91a9e4169a090d5"
)
_ALPACA = HubFile(
    "tatsu-lab/alpaca_eval", "alpaca_eval.json", "instruction", "2955709b93b0e08df511a752a3874b0a89b8910b"
)
_SPEED_BENCH = HubFile(
    "nvidia/SPEED-Bench",
    "qualitative/test-00000-of-00001.parquet",
    "speed_bench",
    "487aa718444e816458d1a0a52bfce7a454285cf4",
)


def _speculators(file: str, category: str) -> HubFile:
    revision = "2ae86affa2cb97a972b7fc681dd51c04fbff083e"
    return HubFile("RedHatAI/speculator_benchmarks", f"{file}.jsonl", category, revision)


_SPEC_BENCH_FILES = tuple(
    _speculators(category, category) for category in ("translation", "summarization", "qa", "math_reasoning", "rag")
)

HUB_DATASETS: dict[str, tuple[HubFile, ...]] = {
    "mt-bench": (_MT_BENCH,),
    "gsm8k": (_speculators("math_reasoning", "math_reasoning"),),
    "humaneval": (_speculators("HumanEval", "coding"),),
    "alpaca": (_ALPACA,),
    "cnn-dm": (_speculators("summarization", "summarization"),),
    "spec-bench": (_MT_BENCH, *_SPEC_BENCH_FILES),
    "speed-bench": (_SPEED_BENCH,),
}
WHOLE = ("spec-bench", "speed-bench")  # which are not cut
# What stands in SPEED-Bench's file in place of texts whose licences let only their sources hand them out.
WITHHELD = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE"


def download(name: str) -> list[dict[str, Any]]:
    """The rows of a named dataset in the FastChat form, numbered from 0 across its files.

    Raises QuasarError, in one sentence, when the hub cannot be reached or a file is not as expected.
    """
    rows = [row for file in HUB_DATASETS[name] for row in _fastchat_rows(file, _fetch(file))]
    return [{**row, "question_id": number} for number, row in enumerate(rows)]


def _fetch(file: HubFile) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(file.repository, file.path, repo_type="dataset", revision=file.revision))
    except Exception as error:
        raise QuasarError(
            f"{hub_failure(file.repository, error)} (Or let QUASAR_DATA name a folder with NAME/question.jsonl in it.)"
        ) from error


def _fastchat_rows(file: HubFile, path: Path) -> Iterator[dict[str, Any]]:
    try:
        for row in _json_rows(path):
            answers = {name: row[name] for name in ("reference", "answer") if isinstance(row.get(name), str | list)}
            program = {name: row[name] for name in _PROGRAM if isinstance(row.get(name), str)}
            yield {**answers, **program, "category": row.get("category") or file.category, "turns": _turns(row)}
    except (ValueError, KeyError, TypeError) as error:
        raise QuasarError(f"{file.path} of the hub dataset {file.repository} is not as expected: {error}.") from error


def _json_rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    text = read_text(path, MAX_JSON_BYTES)
    lines = filter(str.strip, text.split("\n"))
    return build(list[dict], [*map(parse_json, lines)] if path.suffix == ".jsonl" else parse_json(text))


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    """QuasarError where pyarrow is missing."""
    try:
        parquet: Any = import_module("pyarrow.parquet")
    except ImportError as error:
        raise QuasarError(f"Reading {path.name} needs pyarrow: pip install pyarrow.") from error
    with foreign_errors(f"{path} cannot be read"):
        return build(list[dict], parquet.read_table(path).to_pylist())


def _turns(row: dict[str, Any]) -> list[str]:
    """The user's messages: `turns` or `prompt`, a list or one string; or `instruction`."""
    for field in ("turns", "prompt", "instruction"):
        if field in row:
            turns = row[field]
            return [turns] if isinstance(turns, str) else list(turns)
    raise KeyError("no field named turns, prompt or instruction")


DEMO_FILE = Path(__file__).parent.parent / "demo" / "prompts.jsonl"
DATASET_NAMES = ("demo", *HUB_DATASETS)
PAPER_SIZE = 80  # questions of a dataset in the paper; longer ones are cut to their first 80
DATA_VARIABLE = "QUASAR_DATA"


@dataclass(frozen=True)
class Question:
    """One conversation to lead: the user's messages in order.

    `reference` holds the dataset's own answers, turn by turn. `test` and `entry_point` judge a program as HumanEval
    does, `prompt` is the program that it continues.
    """

    question_id: int | str
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] = ()
    test: str | None = None
    entry_point: str | None = None
    prompt: str | None = None


@dataclass(frozen=True)
class Dataset:
    """Questions under a name; `source` says where they were read, those of the hub with their commit."""

    name: str
    questions: tuple[Question, ...]
    source: str = ""

    @property
    def sha256(self) -> str:
        """Identity of the questions: runs over the same digest can be compared."""
        asked = ("question_id", "category", "turns")  # not the answers, which change nothing that is measured
        content = json.dumps([{name: asdict(one)[name] for name in asked} for one in self.questions], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def limited(self, count: int | None) -> "Dataset":
        """At most `count` questions, spread evenly over the dataset, so that every category keeps its share."""
        total = len(self.questions)
        if count is None or count >= total:
            return self
        return replace(self, questions=tuple(self.questions[i * total // count] for i in range(count)))


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
        return Dataset("demo", read_questions(DEMO_FILE), "the package")
    if is_file(Path(name), UsageError):
        return Dataset(Path(name).stem, read_questions(Path(name)), f"the file {Path(name).name}")
    folder = _data_folder()
    if folder is not None and (found := _from_folder(folder, key)):
        return Dataset(key, found, f"the folder of {DATA_VARIABLE}")
    if key not in HUB_DATASETS:
        raise UsageError(f"--dataset must be {', '.join(DATASET_NAMES)} or the path of a JSONL file, not {name}.")
    questions = [_question(row, f"{key} on the hub, question {row['question_id']}") for row in download(key)]
    return Dataset(key, _cut(key, questions), hub_source(key))


def hub_source(key: str) -> str:
    """The repositories of a dataset on the hub, each with the commit that is read."""
    places = dict.fromkeys(f"{file.repository}@{file.revision}" for file in HUB_DATASETS[key])
    return f"the hub, {' and '.join(places)}"


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
    return Question(question_id, category, tuple(turns), _reference(row), *map(row.get, _PROGRAM))


_PROGRAM = ("test", "entry_point", "prompt")


def _reference(row: dict[str, Any]) -> tuple[str, ...]:
    """The dataset's own answers, in FastChat's form or in GSM8K's; what is neither judges nothing."""
    found = row.get("reference", row.get("answer", ()))
    return tuple(map(str, [found] if isinstance(found, str) else found or ()))


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
    cut = PAPER_SIZE if key in HUB_DATASETS and key not in WHOLE else None
    withheld = sum(WITHHELD in turn for question in questions for turn in question.turns[:1])
    if withheld:
        raise QuasarError(
            f"{key} lacks the text of {withheld} of its {len(questions)} questions, which licences leave to their "
            f"sources: fetch them with NVIDIA's prepare_data.py, and let {DATA_VARIABLE} name the folder that holds "
            f"{key}/question.jsonl."
        )
    return tuple(questions[:cut])
