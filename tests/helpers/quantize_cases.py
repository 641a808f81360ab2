"""What the tests of quantizing share: a tiny model's folder, and one call that quantizes it."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_model import files_of, save_tiny_model, write_files
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from quasar_core.api import quantizing
from quasar_core.config import QuantizeConfig
from quasar_core.quantize import calibration
from quasar_core.records import QuantizeReport

CONFIG = QuantizeConfig(group_size=32, samples=6, seq_len=24)


def save_model(folder: Path, tied: bool) -> Path:
    """The tiny model with a vocabulary padded to 264, which a packed head can have."""
    write_files(folder, _files(tied))
    torch.manual_seed(1)  # what is drawn next does not depend on whether the files were made before
    return folder


@cache
def _files(tied: bool) -> dict[str, bytes]:
    return files_of(lambda folder: _make_model(folder, tied))


def _make_model(folder: Path, tied: bool) -> None:
    save_tiny_model(folder)
    config = Qwen3Config.from_pretrained(folder)
    config.vocab_size, config.tie_word_embeddings, config.initializer_range = 264, tied, 0.2
    torch.manual_seed(1)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def shorten_texts(patch: pytest.MonkeyPatch) -> None:
    """Few and short rows of held-out and greedy text."""
    patch.setattr(calibration, "HELD_OUT_ROWS", 3)
    patch.setattr(calibration, "GREEDY_LENGTH", 40)


def quantize(source: Path, config: QuantizeConfig = CONFIG, **options: Any) -> QuantizeReport:
    return quantizing.quantize(str(source), config, device="cpu", **options)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")
