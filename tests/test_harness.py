"""A pair as a model of lm-evaluation-harness: two small tasks, beside the harness's own transformers model."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'quasar-cli[lm-eval]'")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from quasar_core.errors import UsageError
from quasar_core.harness import QuasarLM
from quasar_core.library import quantize_model

DEMO = Path(__file__).parents[1] / "quasar_core" / "demo" / "model"
ROWS = [
    {"context": "def count_lines(", "right": "path):", "wrong": "+ = ,"},
    {"context": "for line in", "right": " lines:", "wrong": " ) ="},
    {"context": "import", "right": " os", "wrong": " ("},
    {"context": "def read_lines(path):\n    return", "right": " open(path)", "wrong": " def def"},
]
CHOICE = """
task: pieces_of_code
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{[right, wrong]}}}}"
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
WRITE = """
task: lines_of_code
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{right}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 24, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two tasks, one of each kind, and their questions."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in {"choice": CHOICE, "write": WRITE}.items():
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    return folder


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    output = tmp_path_factory.mktemp("verifier") / "v"
    return quantize_model("demo", samples=4, seq_len=64, fidelity_rows=2, output=output).checkpoint


def evaluate(model: Any, tasks: Path) -> dict[str, Any]:
    found = simple_evaluate(
        model,
        tasks=["pieces_of_code", "lines_of_code"],
        task_manager=TaskManager(include_path=str(tasks)),
        log_samples=True,
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    assert found is not None
    return found


@pytest.fixture(scope="module")
def own(tasks: Path) -> dict[str, Any]:
    """What the harness's own model gives."""
    return evaluate(HFLM(str(DEMO), dtype="float32", device="cpu"), tasks)


@pytest.mark.parametrize("mode", ["full", "exact"])
def test_lossless_modes_score_as_the_harness_own_model(mode: str, verifier: str, tasks: Path, own: Any) -> None:
    ours = evaluate(QuasarLM("demo", verifier=verifier, verify=mode, dtype="float32"), tasks)
    assert ours["results"]["pieces_of_code"]["acc,none"] == own["results"]["pieces_of_code"]["acc,none"] >= 0.75
    for one, other in zip(ours["samples"]["pieces_of_code"], own["samples"]["pieces_of_code"], strict=True):
        for (value, greedy), (wanted, wanted_greedy) in zip(_scores(one), _scores(other), strict=True):
            assert value == pytest.approx(wanted, abs=1e-3)
            assert greedy == wanted_greedy
    assert _texts(ours) == _texts(own)


def _scores(sample: dict[str, Any]) -> list[tuple[float, bool]]:
    return [(float(value), str(greedy) == "True") for value, greedy in sample["filtered_resps"]]


def _texts(found: dict[str, Any]) -> list[str]:
    return [sample["resps"][0][0] for sample in found["samples"]["lines_of_code"]]


def test_the_lossy_mode_scores_as_its_own_text(verifier: str, tasks: Path, own: Any) -> None:
    model = QuasarLM("demo", verifier=verifier, verify="quantized", dtype="float32")
    found = evaluate(model, tasks)
    scores, wanted = ([_scores(one) for one in of["samples"]["pieces_of_code"]] for of in (found, own))
    assert scores != wanted
    assert found["results"]["pieces_of_code"]["acc,none"] >= 0.5
    tokens = model.tok_encode("def count_lines(")
    written = model._generators
    assert written  # the generators that wrote the second task
    generator = next(iter(written.values()))
    text = list(generator.generate(tokens).token_ids)[:8]
    assert model.score(tokens, text)[1]  # what it writes is what it scores as greedy


def test_a_text_is_scored_in_windows(verifier: str) -> None:
    model = QuasarLM("demo", verifier=verifier, verify="full", dtype="float32", max_context=64)
    text = "def count_lines(path):\n    return len(open(path).readlines())\n" * 12
    (rolling,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    tokens = model.tok_encode(text, add_special_tokens=False)
    assert len(tokens) > 128
    first = model.score([model.prefix_token_id], tokens[:64])[0]
    assert rolling < first < 0


@pytest.mark.parametrize(
    ("options", "sentence"), [({"batch_size": 8}, "--batch_size must be 1"), ({"bits": 4}, "has bits, which quasar")]
)
def test_what_cannot_be_is_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        QuasarLM("demo", **options)


def test_a_task_cannot_ask_for_what_there_is_not(verifier: str) -> None:
    model = QuasarLM("demo", verifier=verifier, dtype="float32")
    with pytest.raises(UsageError, match="asks for num_beams"):
        model.generate_until([Instance("generate_until", {}, ("x", {"num_beams": 4}), 0)])
