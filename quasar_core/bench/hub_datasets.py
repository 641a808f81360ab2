"""Datasets by name from the Hugging Face hub: which file of which repository, and how its rows become questions.

Only plain JSON and JSONL files are read, so no dataset library is needed. Spec-Bench takes its 80 questions each of
GSM8K and CNN/DM from the same sources as the paper does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quasar_core.errors import QuasarError
from quasar_core.files import MAX_JSON_BYTES, parse_json, read_text
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
    """One file of a dataset repository; `category` stands in where its rows name none."""

    repository: str
    path: str
    category: str


_MT_BENCH = HubFile("HuggingFaceH4/mt_bench_prompts", "raw/question.jsonl", "mt_bench")
_SPECULATORS = "RedHatAI/speculator_benchmarks"
_SPEC_BENCH_FILES = tuple(
    HubFile(_SPECULATORS, f"{category}.jsonl", category)
    for category in ("translation", "summarization", "qa", "math_reasoning", "rag")
)

HUB_DATASETS: dict[str, tuple[HubFile, ...]] = {
    "mt-bench": (_MT_BENCH,),
    "gsm8k": (HubFile(_SPECULATORS, "math_reasoning.jsonl", "math_reasoning"),),
    "humaneval": (HubFile(_SPECULATORS, "HumanEval.jsonl", "coding"),),
    "alpaca": (HubFile("tatsu-lab/alpaca_eval", "alpaca_eval.json", "instruction"),),
    "cnn-dm": (HubFile(_SPECULATORS, "summarization.jsonl", "summarization"),),
    "spec-bench": (_MT_BENCH, *_SPEC_BENCH_FILES),
}


def download(name: str) -> list[dict[str, Any]]:
    """The rows of a named dataset in the FastChat form, numbered from 0 across its files.

    Raises QuasarError, in one sentence, when the hub cannot be reached or a file is not as expected.
    """
    rows = [row for file in HUB_DATASETS[name] for row in _fastchat_rows(file, _fetch(file))]
    return [{**row, "question_id": number} for number, row in enumerate(rows)]


def _fetch(file: HubFile) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(file.repository, file.path, repo_type="dataset"))
    except Exception as error:
        raise QuasarError(
            f"{hub_failure(file.repository, error)} (Or let QUASAR_DATA name a folder with NAME/question.jsonl in it.)"
        ) from error


def _fastchat_rows(file: HubFile, path: Path) -> Iterator[dict[str, Any]]:
    try:
        for row in _json_rows(path):
            yield {"category": row.get("category") or file.category, "turns": _turns(row)}
    except (ValueError, KeyError, TypeError) as error:
        raise QuasarError(f"{file.path} of the hub dataset {file.repository} is not as expected: {error}.") from error


def _json_rows(path: Path) -> list[dict[str, Any]]:
    text = read_text(path, MAX_JSON_BYTES)
    lines = filter(str.strip, text.split("\n"))
    return build(list[dict], [*map(parse_json, lines)] if path.suffix == ".jsonl" else parse_json(text))


def _turns(row: dict[str, Any]) -> list[str]:
    """The user's messages: `turns` or `prompt`, a list or one string; or `instruction`."""
    for field in ("turns", "prompt", "instruction"):
        if field in row:
            turns = row[field]
            return [turns] if isinstance(turns, str) else list(turns)
    raise KeyError("no field named turns, prompt or instruction")
