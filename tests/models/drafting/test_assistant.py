"""An assistant is loaded beside a pair, and refused where its tokens are others."""

import json
from pathlib import Path

import pytest
import torch
from helpers.decoder_cases import CPU, save_model
from helpers.tiny_models import words

from quasar_core.api import decoding
from quasar_core.errors import UsageError
from quasar_core.models.drafting.assistant import load_assistant


def saved(folder: Path, **options: object) -> Path:
    """A model of 97 rows and a tokenizer of as many words."""
    save_model(folder, "Llama", {"vocab_size": 97, **options})
    words().save_pretrained(folder)
    return folder


def test_it_comes_with_the_pair(tmp_path: Path) -> None:
    target, small = saved(tmp_path / "target"), saved(tmp_path / "small", num_hidden_layers=1)
    pair = decoding.load_pair(str(target), verify="full", draft="assistant", assistant=str(small), device="cpu")
    assert pair.assistant is not None
    assert pair.assistant.vocab_size == 97
    assert pair.assistant_context == 128
    assert pair.assistant_fingerprint not in (None, pair.target_fingerprint)
    assert "decoder: our own (assistant)" in pair.notes
    assert decoding.load_pair(str(target), verify="full", device="cpu").assistant is None


def test_other_words_are_refused(tmp_path: Path) -> None:
    target, small = saved(tmp_path / "target"), saved(tmp_path / "small")
    path = small / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["other"] = content["model"]["vocab"].pop("w5")
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"--assistant .* has another vocabulary .*: 2 tokens differ, such as 'other'"):
        decoding.load_pair(str(target), verify="full", draft="assistant", assistant=str(small), device="cpu")


def test_fewer_rows_than_words_are_refused(tmp_path: Path) -> None:
    small = saved(tmp_path / "small", vocab_size=90)
    with pytest.raises(UsageError, match=r"--assistant small has 90 rows for 97 tokens"):
        load_assistant(small, "small", words(), CPU, torch.float32)
