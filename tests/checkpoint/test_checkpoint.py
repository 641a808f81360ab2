"""Checkpoint files: written whole or not at all, read strictly, in one sentence where they do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.packed_weights import make_weight
from safetensors.torch import load_file, save_file

from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.checkpoint.writer import ShardWriter, copy_kept_files, save_tensors
from quasar_core.errors import QuasarError
from quasar_core.files import read_json

SECTION = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}


def make_checkpoint(folder: Path, section: dict[str, Any] | None = None, **tensors: torch.Tensor) -> Path:
    """One packed layer `a.b` of 64 × 16, a norm, and what `tensors` adds or replaces ("a.b.scales" as a_b_scales)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": {**SECTION, **(section or {})}}))
    stored = {f"a.b.{name}": tensor for name, tensor in make_weight(4, 64, 16, 32).pack().items()}
    stored |= {"norm.weight": torch.ones(16)} | {name.replace("_", ".", 2): t for name, t in tensors.items()}
    save_file(stored, folder / "model.safetensors")
    return folder


def test_a_checkpoint_is_read(tmp_path: Path) -> None:
    checkpoint = VerifierCheckpoint(make_checkpoint(tmp_path))
    assert checkpoint.layer_names == ["a.b"]
    assert checkpoint.plain_names == ["norm.weight"]
    assert torch.equal(checkpoint.layer("a.b").dequantize(), make_weight(4, 64, 16, 32).dequantize())
    assert checkpoint.fidelity is None
    assert checkpoint.target_fingerprint is None


def test_version_2_zeros_are_not_moved(tmp_path: Path) -> None:
    checkpoint = VerifierCheckpoint(make_checkpoint(tmp_path, {"checkpoint_format": "gptq_v2"}))
    assert torch.equal(checkpoint.layer("a.b").zeros, make_weight(4, 64, 16, 32).zeros - 1)


def test_a_layer_of_another_width_is_told_by_its_shapes(tmp_path: Path) -> None:
    other = {f"c_d_{name}": tensor for name, tensor in make_weight(8, 64, 16, 32).pack().items()}
    checkpoint = VerifierCheckpoint(make_checkpoint(tmp_path, **other))
    assert checkpoint.layer("c.d").bits == 8
    assert torch.equal(checkpoint.layer("c.d").dequantize(), make_weight(8, 64, 16, 32).dequantize())


def test_the_section_may_lie_in_a_file_of_its_own(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "quantize_config.json").write_text(json.dumps(SECTION))
    assert VerifierCheckpoint(tmp_path).format.bits == 4


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        (
            {"quant_method": "hqq"},
            "is quantized by hqq, which this version does not read; it reads gptq, awq and compressed-tensors",
        ),
        ({"bits": 5}, "has 5-bit codes, which this version does not read"),
        ({"bits": None}, "has None-bit codes"),
        ({"group_size": 0}, "has groups of 0, which this version does not read"),
        ({"group_size": "all"}, "has groups of all, which this version does not read"),
        ({"pack_dtype": "int16"}, "packs codes into int16, which this version does not read"),
        ({"checkpoint_format": "marlin"}, "has the checkpoint format marlin, which this version does not read"),
    ],
)
def test_foreign_formats_are_refused(section: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(QuasarError, match=sentence):
        VerifierCheckpoint(make_checkpoint(tmp_path, section))


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"a_b_scales": torch.ones(3, 16)}, r"layer a\.b has scales of shape \(3, 16\), not \(2, 16\)"),
        ({"a_b_qzeros": torch.zeros(2, 16, dtype=torch.int32)}, r"layer a\.b has qzeros of shape \(2, 16\)"),
        ({"a_b_scales": torch.full((2, 16), float("inf"))}, r"layer a\.b has scales that are not finite"),
        ({"a_b_g_idx": torch.zeros(0, dtype=torch.int32)}, r"layer a\.b has g_idx of shape \(0,\), not \(64,\)"),
        ({"a_b_g_idx": torch.zeros(32, dtype=torch.int32)}, r"layer a\.b has qzeros of shape"),
        ({"a_b_g_idx": torch.zeros(8, dtype=torch.int32)}, r"layer a\.b has g_idx of shape \(8,\), not \(64,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tensors: dict[str, torch.Tensor], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(QuasarError, match=sentence):
        VerifierCheckpoint(make_checkpoint(tmp_path, **tensors)).layer("a.b")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["a.b.qzeros"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(QuasarError, match=r"The checkpoint's layer a\.b has no qzeros"):
        VerifierCheckpoint(tmp_path).layer("a.b")
    with pytest.raises(QuasarError, match=r"holds no tensor embedding\.weight"):
        VerifierCheckpoint(tmp_path).tensors.load("embedding.weight")


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("config.json", b"{}", "is not a quantized checkpoint: its config has no quantization_config"),
        ("config.json", b"{", r"config\.json is not readable JSON"),
        ("config.json", b"[1]", r"config\.json does not hold a JSON object"),
        ("model.safetensors", b"pickle", r"model\.safetensors is not a readable safetensors file"),
        ("quasar.json", b'{"format_version": 2}', r"quasar\.json has format version 2, which this version of quasar"),
    ],
)
def test_files_that_cannot_be_read_are_named(file: str, content: bytes, sentence: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(QuasarError, match=sentence):
        VerifierCheckpoint(tmp_path)


def test_what_is_missing_altogether(tmp_path: Path) -> None:
    with pytest.raises(QuasarError, match=r"The verifier's folder .*nowhere does not exist"):
        VerifierCheckpoint(tmp_path / "nowhere")
    with pytest.raises(QuasarError, match=r"holds no verifier: it has no config\.json\. A verifier is a folder"):
        VerifierCheckpoint(tmp_path)
    with pytest.raises(QuasarError, match="holds no safetensors files"):
        TensorFiles(tmp_path)


def test_a_report_that_is_none_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "quasar.json").write_text(json.dumps({"format_version": 1, "report": {"fidelity": {"text": "self"}}}))
    with pytest.raises(QuasarError, match=r"quasar\.json is damaged: report\.fidelity\.tokens is missing"):
        VerifierCheckpoint(tmp_path)


def test_shards_are_filled_up_to_their_limit_and_indexed(tmp_path: Path) -> None:
    """Tensors of 40 bytes, shards of at most 100: two a shard; one of 200 bytes stands alone."""
    shards = ShardWriter(tmp_path, max_bytes=100)
    tensors = {name: torch.full((10,), i, dtype=torch.float32) for i, name in enumerate("abc")}
    tensors["large"] = torch.zeros(50)
    for name, tensor in tensors.items():
        shards.add(name, tensor)
    shards.close()
    index = read_json(tmp_path / "model.safetensors.index.json")
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert index["weight_map"] == {"a": names[0], "b": names[0], "c": names[1], "large": names[2]}
    assert index["metadata"]["total_size"] == 3 * 40 + 200
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "model.safetensors.index.json"]
    files = TensorFiles(tmp_path)
    assert files.names() == ["a", "b", "c", "large"]
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in files.load_many(files.names()))


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    shards = ShardWriter(tmp_path)
    shards.add("a", torch.ones(2, 3).t())
    shards.close()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert torch.equal(TensorFiles(tmp_path).load("a"), torch.ones(3, 2))


def test_a_file_that_no_index_names_is_not_read(tmp_path: Path) -> None:
    shards = ShardWriter(tmp_path, max_bytes=8)
    for name in ("a", "b"):
        shards.add(name, torch.ones(2))
    shards.close()
    save_file({"a": torch.zeros(2), "stray": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    files = TensorFiles(tmp_path)
    assert files.names() == ["a", "b"]
    assert "stray" not in files
    assert files.load("a").tolist() == [1, 1]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "block.safetensors"
    save_tensors(path, {"a": torch.ones(2)})

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(QuasarError, match=r"block\.safetensors could not be written \(No space left on device\)"):
        save_tensors(path, {"a": torch.zeros(2)})
    assert load_file(path)["a"].tolist() == [1, 1]


def test_tokenizer_and_template_are_kept_and_nothing_else(tmp_path: Path) -> None:
    source, destination = tmp_path / "source", tmp_path / "destination"
    source.mkdir()
    destination.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "modeling.py", "weights.bin"):
        (source / name).write_text(name)
    copy_kept_files(source, destination)
    assert sorted(path.name for path in destination.iterdir()) == [
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
    ]
