"""The memory formula equals what decoders, verifiers and caches hold."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_cases import CASES, CPU, FLOAT, save_model
from helpers.quantized_decoder import quantize_layers

from quasar_core import load_pair
from quasar_core.api import decoding
from quasar_core.bench import machine
from quasar_core.errors import QuasarError, UsageError
from quasar_core.models.decoder.layer import DenseLinear
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.memory.estimate import MemoryNeed, advice, describe, pair_need, require_room
from quasar_core.models.weights import verifier_head
from quasar_core.models.weights.lean_weights import attach_verifier, load_target, load_verifier_alone

GB = 1_000_000_000


def held_bytes(decoder: LeanDecoder) -> int:
    """Storage of every tensor in 32 bits, each once; packed layers left out."""
    tensors = [decoder.embedding, decoder.norm]
    if decoder.inputs:
        tensors += [decoder.inputs.embedding, decoder.inputs.projection.weight, decoder.inputs.norm]  # type: ignore[attr-defined]
    for layer in decoder.layers:
        tensors += layer.recurrence.weights if layer.recurrence else ()
        tensors += [*layer.norms, *(part for part in (layer.activation, layer.scalar) if part is not None)]
        if layer.experts:
            own = layer.experts.router, layer.experts.correction, layer.experts.shared_gate
            tensors += [tensor for tensor in own if tensor is not None]
            tensors += vars(layer.experts.beside).values() if layer.experts.beside else ()
    for product in (*(product for layer in decoder.layers for product in layer.linears), decoder.head):
        if isinstance(product, DenseLinear):
            tensors += [product.weight, *([] if product.bias is None else [product.bias])]
        else:
            bias: Any = product.bias  # type: ignore[attr-defined]
            tensors += [] if bias is None else [bias]
    storages = [tensor.untyped_storage() for tensor in tensors]  # experts have parts of one
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("name", CASES)
def test_the_targets_share_is_what_it_holds(tmp_path: Path, name: str) -> None:
    save_model(tmp_path, *CASES[name])
    need = pair_need(tmp_path, None, FLOAT)
    assert need is not None
    assert need.target == held_bytes(load_target(tmp_path, CPU, FLOAT))
    assert need.verifier == 0


@pytest.mark.parametrize("name", ["qwen3", "qwen2", "qwen3, yarn, tied"])
def test_the_verifiers_share_is_its_codes_and_alone_what_it_holds_beside_them(tmp_path: Path, name: str) -> None:
    source = tmp_path / "source"
    save_model(source, *CASES[name])
    checkpoint = quantize_layers(source, tmp_path / "codes", lambda layer: 4)
    beside = pair_need(source, checkpoint, FLOAT)
    alone = pair_need(source, checkpoint, FLOAT, use_target=False)
    assert beside is not None
    assert alone is not None
    codes = sum(
        tensor.nbytes
        for layer in checkpoint.layer_names
        for part in ("qweight", "qzeros", "scales", "g_idx")
        if (tensor := checkpoint.tensors.load(f"{layer}.{part}")) is not None
    )
    assert beside.verifier == codes
    assert alone.target == 0
    assert alone.verifier == codes + held_bytes(load_verifier_alone(checkpoint, CPU, FLOAT, "reference"))
    target = load_target(source, CPU, FLOAT)
    assert attach_verifier(target, checkpoint, "reference").embedding is target.embedding


@pytest.mark.parametrize("name", ["qwen3", "qwen3, yarn, tied"])
def test_a_head_that_is_rounded_at_load_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """In 8 bits beside a head or an embedding that stays, as `round_head` makes it; a head in codes stays as it is."""
    source = tmp_path / "source"
    save_model(source, *CASES[name])
    target = load_target(source, CPU, FLOAT)
    weight, tied = target.head.weight, target.config.tied
    monkeypatch.setattr(verifier_head, "SMALLEST", weight.numel())
    for bits in (16,) if tied else (16, 8):
        widths = {"lm_head.weight": bits}
        checkpoint = quantize_layers(source, tmp_path / str(bits), lambda name, widths=widths: widths.get(name, 4))
        for use_target in (True, False):
            plain, counted = (pair_need(source, checkpoint, FLOAT, use_target, rounds) for rounds in (False, True))
            assert plain is not None
            assert counted is not None
            found = verifier_head.rounded(weight, verifier_head.group_of(weight.shape[1]))
            more = found.codes.nbytes + found.scales.nbytes if bits == 16 and (use_target or tied) else 0
            assert counted.verifier - plain.verifier == more


@pytest.mark.parametrize("name", ["qwen3", "gemma 4, shared states and own inputs"])
def test_a_token_takes_what_the_cache_and_the_rotary_tables_hold(tmp_path: Path, name: str) -> None:
    save_model(tmp_path, *CASES[name])
    decoder, need = load_target(tmp_path, CPU, FLOAT), pair_need(tmp_path, None, FLOAT)
    assert need is not None
    cache = decoder.new_cache(100)
    tables = sum(table.nbytes for rope in decoder.ropes for table in rope.rows(0, 100))
    assert 100 * need.per_token == cache.layers[0].untyped_storage().nbytes() + tables


NEED = MemoryNeed(target=16 * GB, verifier=4 * GB, workspace=GB, per_token=150_000)
ALONE = MemoryNeed(target=0, verifier=7 * GB, workspace=GB, per_token=150_000)


def test_a_context_that_fits_is_advised_first() -> None:
    assert NEED.total(1000) == 21 * GB + 150_000_000
    assert NEED.slack == ALONE.slack == 700_000_000
    assert MemoryNeed(target=40 * GB, verifier=9 * GB, workspace=GB, per_token=1).slack == 1_500_000_000
    assert NEED.tokens_in(21 * GB + 800_000_000) == 512
    assert NEED.tokens_in(20 * GB) == 0
    assert "--max-context 512 would fit" in advice(NEED, ALONE, 21 * GB + 800_000_000, 1024)


def test_then_the_verifier_alone_then_a_smaller_head() -> None:
    assert "--verify quantized --no-target would fit (8.2 GB)" in advice(NEED, ALONE, 12 * GB, 1024)
    assert "--lm-head-bits 4" in advice(NEED, ALONE, 6 * GB, 1024)
    assert "The GPU has 6.0 GB free, and the pair needs 21.2 GB and 0.7 GB to spare" in advice(NEED, None, 6 * GB, 1024)


def test_the_note_says_how_long_a_context_fits() -> None:
    note = describe(NEED, 24 * GB, 40_960)
    assert "21.0 GB (target 16.0, verifier 4.0, workspace 1.0) and 150 KB per token" in note
    assert "enough for 15104 of 40960 tokens" in note


def test_a_pair_that_does_not_fit_is_refused_before_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (12 * GB, 24 * GB))
    with pytest.raises(QuasarError, match="--no-target would fit"):
        require_room(NEED, ALONE, torch.device("cuda"), 40_960)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (21 * GB + 500_000_000, 24 * GB))
    with pytest.raises(QuasarError, match=r"0[.]7 GB to spare"):  # it would fit to the last byte, and nothing beside it
        require_room(NEED, ALONE, torch.device("cuda"), 40_960)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (22 * GB, 24 * GB))
    assert "memory: 21.0 GB" in require_room(NEED, ALONE, torch.device("cuda"), 40_960)


def test_doctor_tells_the_pairs_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    save_model(source, *CASES["qwen3"])
    quantize_layers(source, tmp_path / "codes", lambda layer: 4)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (12 * GB, 24 * GB))
    assert "12.0 GB are free, enough for 128 of 128 tokens" in machine.describe_memory(str(source), tmp_path / "codes")
    assert machine.describe_memory(str(source), tmp_path / "none").startswith("not known: The verifier's folder")


def test_a_pair_is_checked_before_loading_and_its_context_capped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    save_model(source, *CASES["qwen3"])
    checkpoint = quantize_layers(source, tmp_path / "codes", lambda layer: 4)
    asked: list[tuple[MemoryNeed, int]] = []

    def record(need: MemoryNeed, alone: MemoryNeed, device: torch.device, tokens: int) -> str:
        asked.append((need, tokens))
        return "memory: enough"

    monkeypatch.setattr(load_pair, "require_room", record)
    notes = load_pair._check_room(source, checkpoint, torch.device("cuda"), FLOAT, True, 64)
    assert notes == ["memory: enough"]
    assert asked == [(pair_need(source, checkpoint, FLOAT), 64)]
    assert load_pair._check_room(source, checkpoint, CPU, FLOAT, True, 64) == []
    with pytest.raises(UsageError, match="--max-context must be at least 16, not 3"):
        decoding.load_pair(str(source), max_context=3)
