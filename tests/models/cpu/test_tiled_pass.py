"""Whole passes whose products run in AMX's tiles: real ones where they are, else emulated.

`test_cpu_pass.py` and others run in that form too; here is what they run in the best form alone.
"""

import ctypes
from pathlib import Path

import pytest
import torch
from helpers.decoder_cases import CASES, CPU, in_passes, random_tokens, save_model
from helpers.quantized_decoder import quantize_layers
from helpers.tiny_models import make_pair

from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.config import GenerationConfig, VerifyMode
from quasar_core.decode.generator import Generator
from quasar_core.models import loading
from quasar_core.models.cpu.compressed_weights import compress
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.weights.lean_weights import attach_verifier, load_target

HALF = torch.bfloat16


pytestmark = pytest.mark.usefixtures("tiles")


def fast(decoder: LeanDecoder) -> LeanDecoder:
    note = loading.attach(decoder)
    assert decoder.fast is not None, note
    assert "for AVX-512 with AMX, as QUASAR_ISA asks" in str(note)
    return decoder


def target_in(folder: Path, case: str) -> LeanDecoder:
    if not (folder / "config.json").exists():
        save_model(folder, *CASES[case])
    return load_target(folder, CPU, HALF)


def verifier_of(folder: Path, target: LeanDecoder) -> LeanDecoder:
    quantize_layers(folder, folder / "verifier", lambda name: 4)
    return attach_verifier(target, VerifierCheckpoint(folder / "verifier"), "vnni")


@pytest.mark.parametrize("case", ["qwen3", "qwen 3 moe"])
def test_exact_text_is_that_of_plain_decoding(tmp_path: Path, case: str) -> None:
    target = fast(target_in(tmp_path, case))
    pair = make_pair(target, fast(verifier_of(tmp_path, target)))
    plain = Generator(pair, GenerationConfig(32, "full", "none")).generate(random_tokens(20)).token_ids
    ways: list[tuple[VerifyMode, int, int]] = [("full", 8, 1), ("exact", 12, 24)]
    for verify, drafts, window in ways:
        config = GenerationConfig(32, verify, num_draft_tokens=drafts, window=window)
        assert Generator(pair, config).generate(random_tokens(20)).token_ids == plain


@pytest.mark.parametrize("kind", ["target", "target in 12 bits", "verifier"])
def test_chains_trees_and_what_is_passed_again_have_the_same_bits(tmp_path: Path, kind: str) -> None:
    decoder, tokens = target_in(tmp_path, "qwen3"), random_tokens(60)
    if kind == "verifier":
        decoder = verifier_of(tmp_path, decoder)
    if kind == "target in 12 bits":
        assert compress([decoder], wanted=True)
    torch.set_num_threads(1)
    expected, cache = in_passes(fast(decoder), tokens, [1]), decoder.new_cache(80)
    torch.set_num_threads(3)
    decoder.forward([*tokens[:20], 5, 6, 7], cache)
    for start, count in ((20, 35), (12, 9), (18, 42)):
        cache.rollback(start)
        assert torch.equal(decoder.forward(tokens[start : start + count], cache), expected[start : start + count])
    cache.rollback(40)
    tree = [tokens[40], *(token for token in tokens[41:60] for _ in range(2))]  # behind each token the next one, twice
    parents = [-1, 0, 0, *(place - 2 - (place + 1) % 2 for place in range(3, len(tree)))]
    logits = decoder.forward_tree(tree, parents, cache)
    assert torch.equal(logits[1::2], expected[41:])
    assert torch.equal(logits[::2], expected[40:])


def test_passes_do_take_tiles(tmp_path: Path, tiles: str, tile_traps: ctypes.CDLL) -> None:
    if tiles == "real":
        pytest.skip("only emulated tiles are counted")

    def multiplied(decoder: LeanDecoder, kind: int, count: int) -> bool:
        before = tile_traps.tiles_multiplied(kind)
        decoder.forward(random_tokens(count), decoder.new_cache(64))
        return bool(tile_traps.tiles_multiplied(kind) > before)

    target = fast(target_in(tmp_path, "qwen3"))
    verifier = fast(verifier_of(tmp_path, target))
    assert multiplied(target, 1, 1)
    assert not multiplied(verifier, 0, 8)
    assert multiplied(verifier, 0, 9)
    assert not multiplied(fast(load_target(tmp_path, CPU, torch.float32)), 1, 9)
