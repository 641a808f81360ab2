"""Published models, where QUASAR_REAL_MODELS names a folder of their folders: float32 logits are transformers'."""

import os
from pathlib import Path

import pytest
import torch
import transformers
from helpers.decoder_cases import CPU, FLOAT, fresh_logits, in_passes

from quasar_core.models.loading import load_models

FOLDERS = sorted(path.parent for path in Path(os.environ.get("QUASAR_REAL_MODELS") or os.devnull).glob("*/config.json"))
LENGTH, SPLIT = 560, 520  # past the window of Gemma 3


@pytest.mark.skipif(not FOLDERS, reason="QUASAR_REAL_MODELS names no folder with models")
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_published_model_runs_lean_and_equals_transformers(folder: Path) -> None:
    models = load_models(folder, None, CPU, FLOAT)
    assert models.notes[0] == "decoder: our own"
    decoder = models.target
    assert decoder is not None
    tokens = torch.randint(10, 40_000, (LENGTH,), generator=torch.Generator().manual_seed(0)).tolist()
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=FLOAT).eval()
    expected = fresh_logits(reference, tokens)[SPLIT:]
    cache = decoder.new_cache(LENGTH)
    decoder.forward(tokens[:SPLIT], cache, last_only=True)
    assert_near(decoder.forward(tokens[SPLIT:], cache), expected)
    decoder.fast = None  # type: ignore[attr-defined]
    assert_near(in_passes(decoder, tokens, [SPLIT, 1, 39])[SPLIT:], expected)


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)
