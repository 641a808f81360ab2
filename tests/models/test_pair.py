"""What a pair reads of a model's folder beside the weights: the tokenizer, and the tokens that end a text."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny_model import save_tiny_model
from helpers.tiny_models import (
    PROMPT,
    drafter_factory,
    generate,
    greedy_reference,
    make_pair,
    quantized_copy,
    random_model,
)
from transformers import AutoTokenizer

from quasar_core.errors import QuasarError
from quasar_core.files import read_json
from quasar_core.models import pair as pair_module
from quasar_core.models.pair import end_of_text_ids, load_tokenizer

TOKENIZER: Any = SimpleNamespace(eos_token_id=9)
DEMO = Path(pair_module.__file__).parents[1] / "demo" / "model"
TEXT = "def f(x):\n    return  x + 1  # Größe, 你好 \t 12345"


def write(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.skipif(not (DEMO / "tokenizer.json").exists(), reason="the demo model is not in this checkout")
@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "qwen3_5", "mistral", "phi3", "granite", "smollm3", "nobody-has-it"]
)
@pytest.mark.parametrize(
    "named", ["LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer", "TokenizersBackend", None]
)
def test_a_tokenizer_is_the_one_that_transformers_makes_with_the_whole_config(
    kind: str, named: str | None, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    options = {**read_json(DEMO / "tokenizer_config.json"), "tokenizer_class": named}
    write(tmp_path, config={**read_json(DEMO / "config.json"), "model_type": kind}, tokenizer_config=options)
    expected = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    found = load_tokenizer(tmp_path)
    assert type(found) is type(expected)
    assert found(TEXT)["input_ids"] == expected(TEXT)["input_ids"]
    assert found.eos_token_id == expected.eos_token_id
    config = pair_module._config_of_named(tmp_path)
    assert config is None or config.name_or_path == str(tmp_path)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config": {"eos_token_id": [3, 4]}, "config": {"eos_token_id": 5}}, {3, 4}),
        ({"generation_config": {"eos_token_id": 3}, "config": {"eos_token_id": [5]}}, {3}),
        ({"generation_config": {}, "config": {"eos_token_id": [5, 6]}}, {5, 6}),
        ({"config": {"text_config": {"eos_token_id": [5, 6]}}}, {5, 6}),
        ({"config": {"eos_token_id": None}}, {9}),
        ({"generation_config": {"eos_token_id": []}}, set()),
    ],
)
def test_every_token_that_ends_a_text_is_known(files: dict[str, Any], expected: set[int], tmp_path: Path) -> None:
    assert end_of_text_ids(write(tmp_path, **files), TOKENIZER) == expected


@pytest.mark.parametrize("value", ["</s>", 2.5, True, [1, "2"], [[1]], {"id": 1}])
@pytest.mark.parametrize("name", ["generation_config", "config"])
def test_an_end_of_text_of_a_strange_type_is_one_sentence(name: str, value: Any, tmp_path: Path) -> None:
    write(tmp_path, **{name: {"eos_token_id": value}})
    sentence = rf"{name}\.json names no tokens that end a text: eos_token_id\[\d\] must be a whole number"
    with pytest.raises(QuasarError, match=sentence):
        end_of_text_ids(tmp_path, TOKENIZER)


@pytest.mark.parametrize("verify", ["full", "exact"])
def test_the_first_of_several_ends_ends_the_text_as_in_transformers(verify: str) -> None:
    text = greedy_reference("llama", 20)
    ids = torch.tensor([PROMPT])
    for ends in ([text[9], text[5]], [96, text[7]], text[12:15]):
        output = random_model("llama").model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, eos_token_id=ends,
            pad_token_id=0,
        )  # fmt: skip
        expected = output[0, len(PROMPT) :].tolist()
        pair = make_pair(random_model("llama"), quantized_copy("llama"), eos_ids=frozenset(ends))
        make_draft = drafter_factory("oracle", PROMPT + text)
        assert generate(pair, verify, 6, 9, 20, make_draft).token_ids == expected


def test_a_tokenizers_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(QuasarError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("files", [["tokenizer.json"], ["tokenizer.json", "tokenizer_config.json"]])
def test_a_tokenizer_that_is_missing_is_named(files: list[str], tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path)
    for name in files:
        (folder / name).unlink()
    with pytest.raises(QuasarError, match=r"could not be loaded: \w.*[^: ]$|holds no tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("dtype", "has_pass", "fast", "alike"),
    [
        (torch.float32, False, False, True),
        (torch.bfloat16, False, False, False),
        (torch.bfloat16, True, False, True),
        (torch.bfloat16, True, True, False),
    ],
)
def test_a_pair_knows_whether_its_passes_round_alike(
    dtype: torch.dtype, has_pass: bool, fast: bool, alike: bool
) -> None:
    target: Any = SimpleNamespace(fast=object() if has_pass else None)
    assert make_pair(target, dtype=dtype, fast=fast).rounds_alike is alike
