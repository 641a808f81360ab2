"""The model that the package carries: its size, its card, and that it knows Python."""

import json
import math
import sysconfig
import zlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import quasar_core.demo
from tools.demo import corpus

FOLDER = Path(quasar_core.demo.__file__).parent / "model"


@pytest.fixture(scope="module")
def report() -> dict:
    return json.loads((FOLDER / "training.json").read_text())


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8_000_000


def test_its_card_has_the_figure_of_its_training(report: dict) -> None:
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


@torch.inference_mode()
def test_it_predicts_source_that_it_has_not_read() -> None:
    """The standard library here, of whatever version: files kept out of training take it half of zlib's bits."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    unread = [path for path in files if corpus._unit_hash(path.name) < corpus.HELD_OUT_SHARE]
    text = "".join(path.read_text(encoding="utf-8") for path in unread)[:40_000]
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    rows = ids[: len(ids) // 512 * 512].view(-1, 512)
    loss = model(input_ids=rows, labels=rows).loss.item()  # mean of the tokens but each row's first
    size = len(tokenizer.decode(rows.flatten()).encode())
    bits_per_byte = loss * rows.numel() / math.log(2) / size
    assert bits_per_byte < 0.6 * 8 * len(zlib.compress(text.encode(), 9)) / len(text.encode())
