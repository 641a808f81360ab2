"""Datasets: the package's own, files, a folder of files, the hub client."""

import ast
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quasar_core.bench.datasets import DATASET_NAMES, HUB_DATASETS, MT_BENCH_CATEGORIES, load_dataset, load_datasets
from quasar_core.bench.run import is_correct
from quasar_core.errors import QuasarError, UsageError


@pytest.fixture(autouse=True)
def _no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUASAR_DATA", raising=False)


def write_questions(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def ask(number: int, category: str = "c") -> dict[str, Any]:
    return {"question_id": number, "category": category, "turns": [f"question {number}"]}


def test_demo_holds_enough_of_every_kind() -> None:
    questions = load_dataset("demo").questions
    assert len(questions) >= 24
    categories = Counter(question.category for question in questions)
    assert len(categories) >= 6
    assert set(categories.values()) == {4}
    assert sum(len(question.turns) == 2 for question in questions) >= 4
    assert len({question.turns for question in questions}) == len(questions)


def test_demo_code_is_python_and_renames_what_is_there() -> None:
    for question in load_dataset("demo").questions:
        code = "\n".join(re.findall(r"```python\n(.*?)\n```", question.turns[0], re.DOTALL))
        if question.category != "complete":
            ast.parse(code)
        for turn in question.turns:
            renamed = re.search(r"(?i)(?:rename|replace|change the name) `(\w+)`", turn)
            if renamed:
                assert re.search(rf"\b{renamed[1]}\b", code), question


def test_a_file_in_the_fastchat_form(tmp_path: Path) -> None:
    two_turns = {"question_id": "b", "category": "k", "turns": ["a line\u2028another", "more"], "reference": ["x"]}
    path = write_questions(tmp_path / "mine.jsonl", ask(1), two_turns)
    path.write_text(path.read_text("utf-8") + "\n\n", "utf-8")
    dataset = load_dataset(str(path))
    assert dataset.name == "mine"
    assert [(q.question_id, q.category, q.turns) for q in dataset.questions] == [
        (1, "c", ("question 1",)),
        ("b", "k", ("a line\u2028another", "more")),
    ]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "line 2: this is not JSON"),
        ("[1]", "line 2: a question must be a JSON object"),
        ('{"question_id": 2}', "line 2: `turns` must be a list of at least one message"),
        ('{"question_id": 2, "turns": []}', "line 2: `turns` must be"),
        ('{"question_id": 2, "turns": "text"}', "line 2: `turns` must be"),
        ('{"question_id": 2, "turns": [" "]}', "line 2: `turns` must be"),
        ('{"turns": ["text"]}', "line 2: `question_id` must be"),
        ('{"question_id": 1.5, "turns": ["text"]}', "line 2: `question_id` must be"),
        ('{"question_id": 1, "turns": ["text"]}', "holds question_id 1 twice"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, sentence: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(ask(1)) + "\n" + line + "\n")
    with pytest.raises(UsageError, match=re.escape(sentence)) as caught:
        load_dataset(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "empty.jsonl").write_bytes(content)
    with pytest.raises(UsageError, match="holds no question"):
        load_dataset(str(tmp_path / "empty.jsonl"))


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="is not UTF-8 text"):
        load_dataset(str(tmp_path / "x.jsonl"))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        UsageError, match=r"--dataset must be demo, .*spec-bench, speed-bench or the path of a JSONL file, not other"
    ):
        load_dataset("other")
    assert set(DATASET_NAMES) == {
        "demo",
        "mt-bench",
        "gsm8k",
        "humaneval",
        "alpaca",
        "cnn-dm",
        "spec-bench",
        "speed-bench",
    }


@pytest.mark.parametrize("name", ["cnn-dm", "cnn_dm"])
@pytest.mark.parametrize("folder", ["cnn-dm", "cnn_dm"])
def test_a_folder_of_datasets_in_either_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, folder: str
) -> None:
    write_questions(tmp_path / folder / "question.jsonl", *map(ask, range(100)))
    monkeypatch.setenv("QUASAR_DATA", str(tmp_path))
    dataset = load_dataset(name)
    assert dataset.name == "cnn-dm"
    assert len(dataset.questions) == 80


def test_parts_of_spec_bench_are_found_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [ask(81, "writing"), ask(82, "math"), ask(161, "translation"), ask(241, "summarization")]
    rows += [ask(number, "math_reasoning") for number in range(401, 501)]
    write_questions(tmp_path / "spec_bench" / "question.jsonl", *rows)
    monkeypatch.setenv("QUASAR_DATA", str(tmp_path))
    ids = {dataset.name: [q.question_id for q in dataset.questions] for dataset in load_datasets("mt-bench,cnn-dm")}
    assert ids == {"mt-bench": [81, 82], "cnn-dm": [241]}
    assert [len(load_dataset(name).questions) for name in ("spec-bench", "gsm8k")] == [104, 100]


def test_lists_limits_and_repetitions(tmp_path: Path) -> None:
    path = write_questions(tmp_path / "mine.jsonl", *[ask(i, category="ab"[i // 5]) for i in range(10)])
    demo, mine = load_datasets(f"demo, {path}", limit=4)
    assert len(demo.questions) == 4
    assert [question.question_id for question in mine.questions] == [0, 2, 5, 7]
    assert len(load_dataset(str(path)).limited(99).questions) == 10
    assert mine.sha256 == load_datasets(str(path), limit=4)[0].sha256 != load_dataset(str(path)).sha256
    for names, sentence in [(" ,", "needs a name"), ("demo,demo", "twice")]:
        with pytest.raises(UsageError, match=sentence):
            load_datasets(names)


# The hub client, with its download replaced

HUB_ROWS: dict[str, Any] = {
    "raw/question.jsonl": [{"prompt": ["first", "second"], "category": "writing", "reference": []}],
    "HumanEval.jsonl": [{"prompt": f"def f{i}():", "task_id": f"HumanEval/{i}"} for i in range(164)],
    "alpaca_eval.json": [{"instruction": f"do {i}", "output": "", "dataset": "x"} for i in range(805)],
    "math_reasoning.jsonl": [{"prompt": "1 + 1?", "reference": ["#### 2"]}],
    "qualitative/test-00000-of-00001.parquet": [{"turns": ["a", "b"], "category": "coding"}] * 90,
}


revisions: dict[str, str | None] = {}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """What was downloaded: repository, file, kind."""
    asked: list[tuple[str, str, str]] = []

    def download(repository: str, filename: str, *, repo_type: str, revision: str | None) -> str:
        asked.append((repository, filename, repo_type))
        revisions[repository] = revision
        rows = HUB_ROWS.get(filename, [{"prompt": filename}])
        path = tmp_path / Path(filename).name
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
        return str(path)

    def read_parquet(path: Path) -> Any:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        return SimpleNamespace(to_pylist=lambda: rows)

    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", SimpleNamespace(read_table=read_parquet))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return asked


def test_hub_rows_become_questions(hub: list[tuple[str, str, str]]) -> None:
    datasets = {dataset.name: dataset.questions for dataset in load_datasets(",".join(HUB_DATASETS))}
    assert {name: len(questions) for name, questions in datasets.items()} == {
        "mt-bench": 1,
        "gsm8k": 1,
        "humaneval": 80,
        "alpaca": 80,
        "cnn-dm": 1,
        "spec-bench": 6,
        "speed-bench": 90,
    }
    assert all(re.fullmatch("[0-9a-f]{40}", found or "") for found in revisions.values())
    assert datasets["mt-bench"][0].turns == ("first", "second")
    assert datasets["mt-bench"][0].category in MT_BENCH_CATEGORIES
    assert datasets["humaneval"][3].turns == ("def f3():",)
    assert datasets["alpaca"][79].turns == ("do 79",)
    assert [question.question_id for question in datasets["spec-bench"]] == list(range(6))
    assert {kind for _, _, kind in hub} == {"dataset"}


def test_where_questions_were_read_is_told_with_the_commit(
    hub: list[tuple[str, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [re.sub("@[0-9a-f]{40}", "@C", dataset.source) for dataset in load_datasets("spec-bench,speed-bench", 1)]
    assert places == [
        "the hub, HuggingFaceH4/mt_bench_prompts@C and RedHatAI/speculator_benchmarks@C",
        "the hub, nvidia/SPEED-Bench@C",
    ]
    assert load_dataset("demo").source == "the package"
    assert load_dataset(str(write_questions(tmp_path / "mine.jsonl", ask(1)))).source == "the file mine.jsonl"
    write_questions(tmp_path / "alpaca" / "question.jsonl", ask(1))
    monkeypatch.setenv("QUASAR_DATA", str(tmp_path))
    assert load_dataset("alpaca").source == "the folder of QUASAR_DATA"


def test_an_answer_to_the_hubs_gsm8k_is_scored(hub: list[tuple[str, str, str]]) -> None:
    (question,) = load_dataset("gsm8k").questions
    assert [is_correct(question, 0, text, run_code=False) for text in ("It is 2.", "It is 3.")] == [True, False]


def test_a_program_for_the_hubs_humaneval_is_scored_where_that_is_asked_for(
    hub: list[tuple[str, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row in HumanEval's own form."""
    row = {
        "task_id": "HumanEval/0",
        "prompt": 'from math import floor\n\n\ndef lower(x: float) -> int:\n    """ The whole part of x. """\n',
        "entry_point": "lower",
        "canonical_solution": "    return floor(x)\n",
        "test": "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate(2.5) == 2\n",
    }
    monkeypatch.setitem(HUB_ROWS, "HumanEval.jsonl", [row])
    (question,) = load_dataset("humaneval").questions
    assert (question.turns, question.category) == ((row["prompt"],), "coding")
    answers = (row["canonical_solution"], "    return x\n")
    assert [is_correct(question, 0, text, run_code=True) for text in answers] == [True, False]
    assert is_correct(question, 0, answers[0], run_code=False) is None


def test_a_hub_that_does_not_answer_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(QuasarError, match=r"tatsu-lab/alpaca_eval .*hub cannot be reached.*QUASAR_DATA") as caught:
        load_dataset("alpaca")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rows", [[{"text": "x"}], [["x"]], {"prompt": "x"}])
def test_a_hub_file_of_another_form_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, hub: list[tuple[str, str, str]], rows: Any
) -> None:
    monkeypatch.setitem(HUB_ROWS, "alpaca_eval.json", rows)
    with pytest.raises(QuasarError, match=r"alpaca_eval\.json of the hub dataset tatsu-lab/alpaca_eval is not as"):
        load_dataset("alpaca")


def test_texts_that_a_dataset_withholds_are_said(
    hub: list[tuple[str, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    withheld = {
        "turns": ["FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH"],
        "category": "qa",
    }
    rows = HUB_ROWS["qualitative/test-00000-of-00001.parquet"]
    monkeypatch.setitem(HUB_ROWS, "qualitative/test-00000-of-00001.parquet", [*rows, withheld])
    with pytest.raises(
        QuasarError, match=r"lacks the text of 1 of its 91 questions.*QUASAR_DATA.*speed-bench/question"
    ):
        load_dataset("speed-bench")


def test_parquet_without_pyarrow_is_one_sentence(
    hub: list[tuple[str, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(QuasarError, match="needs pyarrow: pip install pyarrow"):
        load_dataset("speed-bench")


def test_a_questions_answer_comes_with_it(tmp_path: Path) -> None:
    rows = [
        {**ask(1), "reference": ["#### 2"]},
        {**ask(2), "answer": "#### 3"},
        {**ask(3), "test": "t", "entry_point": "f"},
    ]
    questions = load_dataset(str(write_questions(tmp_path / "mine.jsonl", *rows))).questions
    assert [question.reference for question in questions] == [("#### 2",), ("#### 3",), ()]
    assert (questions[2].test, questions[2].entry_point) == ("t", "f")
    bare = load_dataset(str(write_questions(tmp_path / "bare" / "mine.jsonl", ask(1), ask(2), ask(3))))
    assert load_dataset(str(tmp_path / "mine.jsonl")).sha256 == bare.sha256  # answers change nothing that is measured
