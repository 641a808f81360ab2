"""A copy of few bits writes the text of a model that memory does not hold."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.decoder_cases import CASES, CPU, save_model

from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.models.config.decoder import DecoderConfig
from quasar_core.models.decoder.rows import RowsCache, pass_rows
from quasar_core.models.weights.lean_weights import load_target, load_verifier_alone
from quasar_core.quantize.rounded_copy import layers_of_blocks, rounded_bytes, write_rounded
from quasar_core.quantize.text_plan import NO_ROOM, Free, TextPlan, choose_text
from quasar_core.store.model_config import read_config

GB = 10**9


@pytest.mark.parametrize("case", ["llama", "qwen3"])
def test_a_copy_says_nearly_what_the_model_says(tmp_path: Path, case: str) -> None:
    model, copy = tmp_path / "model", tmp_path / "copy"
    save_model(model, *CASES[case])
    write_rounded(model, copy, 8)
    target = load_target(model, CPU, torch.float32)
    rounded = load_verifier_alone(VerifierCheckpoint(copy), CPU, torch.float32, "dense")
    tokens = torch.tensor([3, 40, 7])
    logits = []
    for decoder in (target, rounded):
        rows = RowsCache(decoder.config.blocks, 3, 8, CPU, torch.float32)
        logits.append(pass_rows(decoder, tokens, rows))
    assert not torch.equal(*logits)
    assert float((logits[0] - logits[1]).norm()) < 0.05 * float(logits[0].norm())


def test_the_bytes_of_a_copy_are_those_that_it_stores(tmp_path: Path) -> None:
    save_model(tmp_path / "model", *CASES["llama"])
    write_rounded(tmp_path / "model", tmp_path / "copy", 4)
    config = DecoderConfig.parse(read_config(tmp_path / "model"))
    layers = VerifierCheckpoint(tmp_path / "copy").layer_names
    assert sorted(layers) == sorted(layers_of_blocks(config))
    coded = sum(out * columns for out, columns in layers_of_blocks(config).values())
    assert rounded_bytes(config, coded + 1000, 4, 2) == coded // 2 + coded // 32 * 20 // 8 + 2000


@pytest.mark.parametrize(
    ("free", "bits", "obstacle", "bytes_held"),
    [(4 * GB, None, None, 2 * GB), (3 * GB, 8, None, GB), (GB, 4, None, GB // 2), (GB // 2, None, NO_ROOM, 0)],
)
def test_the_copy_of_most_bits_that_fits_writes(
    free: int, bits: int | None, obstacle: str | None, bytes_held: int
) -> None:
    found = choose_text(GB, torch.bfloat16, None, Free(free), True, {8: GB, 4: GB // 2})
    assert found == TextPlan(False, obstacle, "bfloat16", bytes_held, (free - bytes_held) // 4, bits)
    if bits:
        assert f"rounded to {bits} bits, in bfloat16, since {NO_ROOM}" in found.describe()
        assert "by quasar's own decoder" in replace(found, copy_bits=None).describe()
