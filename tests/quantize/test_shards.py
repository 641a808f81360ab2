"""A finished block is a shard of the checkpoint: written once, under the names of the target's files."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.quantize_cases import CONFIG, quantize, save_model, tensors_of
from safetensors.torch import load_file, save_file

from quasar_core.checkpoint import writer
from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.checkpoint.writer import ShardWriter, save_tensors
from quasar_core.errors import QuasarError
from quasar_core.files import read_json
from quasar_core.quantize import commits, plan, run
from quasar_core.quantize.plan import Shape, make_plan, packed_bytes

pytest_plugins = ["helpers.quantize_fixtures"]
SHARDS = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = TensorFiles(folder)
    return {name: files.load(name) for name in files.names()}


def assert_equal(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert some.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in some.items())


def test_a_large_block_is_not_written_again(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commits' own files become shards, and the checkpoint holds what one file would."""
    one = tensors_of(Path(quantize(source, output=source.parent / "one").checkpoint))
    monkeypatch.setattr(commits, "SHARD_BYTES", 1)
    files: dict[str, int] = {}
    close = ShardWriter.close

    def watched(self: ShardWriter) -> dict[str, str]:
        files.update({path.name: path.stat().st_ino for path in (self.folder / "commits").glob("block-*")})
        assert not list(self.folder.glob("shard-*"))
        return close(self)

    monkeypatch.setattr(ShardWriter, "close", watched)
    folder = Path(quantize(source, output=source.parent / "many").checkpoint)
    assert sorted(path.name for path in folder.glob("*.safetensors")) == SHARDS
    assert [(folder / name).stat().st_ino for name in SHARDS[:2]] == [files[name] for name in sorted(files)]
    assert all((folder / name).stat().st_nlink == 1 for name in SHARDS)
    assert_equal(all_tensors(folder), one)
    index = read_json(folder / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    assert index["weight_map"].keys() == one.keys()


@pytest.mark.parametrize("moment", ["close", "measure", "describe"])
def test_a_run_that_ends_with_shards_in_place_goes_on_without_solving(
    source: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    monkeypatch.setattr(commits, "SHARD_BYTES", 1)
    straight = all_tensors(Path(quantize(source, output=source.parent / "straight").checkpoint))

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "close":  # two shards have their names already
            patch.setattr(writer, "write_json", fail)
        else:
            patch.setattr(run, moment, fail)
        with pytest.raises(KeyboardInterrupt):
            quantize(source)
    assert len(list((source.parent / "tiny-gptq-4bit-g32.partial").glob("model-*"))) == 3
    monkeypatch.setattr("quasar_core.quantize.blocks.layerwise.solve_group", fail)
    assert_equal(all_tensors(Path(quantize(source).checkpoint)), straight)


def test_where_no_file_has_two_names_it_is_copied(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commits, "SHARD_BYTES", 1)
    straight = all_tensors(Path(quantize(source, output=source.parent / "straight").checkpoint))

    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert_equal(all_tensors(Path(quantize(source).checkpoint)), straight)


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tensors(tmp_path / "block", {"a": torch.zeros(4)})

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", refuse)
    shards = ShardWriter(tmp_path)
    shards.add_file(tmp_path / "block", "")
    with pytest.raises(OSError, match="No space left"):
        shards.close()


def test_a_shard_has_the_names_of_the_targets_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target whose files lack the prefix `model.`"""
    source = save_model(tmp_path / "tiny", tied=False)
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    one = tensors_of(Path(quantize(source, output=tmp_path / "one").checkpoint))
    assert "layers.0.mlp.up_proj.qweight" in one
    monkeypatch.setattr(commits, "SHARD_BYTES", 1)
    assert_equal(all_tensors(Path(quantize(source, output=tmp_path / "many").checkpoint)), one)


def test_the_plans_disk_counts_a_large_block_once_and_a_small_one_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = {"model.layers.0.a": (64, 64), "model.layers.1.a": (64, 64), "model.layers.1.b": (64, 64)}
    shape = Shape(layers, other_weights=0, ends_weights=0, hidden=64, vocabulary=64)
    one = packed_bytes(64, 64, 4, 32)
    disks = []
    for size in (1, 2 * one, 3 * one):
        monkeypatch.setattr(plan, "SHARD_BYTES", size)
        disks.append(make_plan(shape, CONFIG).disk)
    assert [disk - disks[0] for disk in disks] == [0, one, 3 * one]


def test_a_file_that_is_no_finished_block_is_told(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "assemble", fail)
        with pytest.raises(KeyboardInterrupt):
            quantize(source)
    commit = source.parent / "tiny-gptq-4bit-g32.partial" / "commits" / "block-00001.safetensors"
    save_file(load_file(commit), commit, metadata={"quasar": json.dumps({"layout": "gptq"})})
    with pytest.raises(QuasarError, match=r"block-00001\.safetensors is no finished block .* delete it"):
        quantize(source)
