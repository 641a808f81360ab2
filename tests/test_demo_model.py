"""The model that the package carries: its size, its card, and that it writes Python."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import quasar_core.demo

FOLDER = Path(quasar_core.demo.__file__).parent / "model"


@pytest.fixture(scope="module")
def report() -> dict:
    return json.loads((FOLDER / "training.json").read_text())


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8_000_000


def test_it_predicts_held_out_source_better_than_an_ngram_model(report: dict) -> None:
    assert report["held_out_bits_per_byte"] <= 0.80
    assert report["held_out_bits_per_byte"] < 0.75 * report["ngram_bits_per_byte"]
    assert f"{report['held_out_bits_per_byte']:.3f}" in (FOLDER / "README.md").read_text()


def test_it_is_a_qwen3_with_a_tied_head(report: dict) -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    parameters = sum(p.numel() for p in model.parameters())
    assert 2_000_000 <= parameters <= 4_000_000
    assert parameters == report["parameters"]
    assert 2048 <= model.config.vocab_size <= 4096


def test_its_chat_template_marks_turns() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize("prompt", ["def ", "class ", "import "])
def test_its_greedy_continuations_read_as_python(prompt: str) -> None:
    """The first line goes on with a name, and most of what follows is new text rather than a loop."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64)
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    first = text.split("\n")[0].removeprefix(prompt)
    assert first[:1].isidentifier(), text
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(set(lines)) >= min(len(lines), 3), text
