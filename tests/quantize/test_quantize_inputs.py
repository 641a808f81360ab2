"""Inputs that cannot be quantized, and places that cannot be written: one sentence each, nothing half-written."""

import fcntl
import json
import os
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.quantize_cases import CONFIG, quantize, tensors_of
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from quasar_cli.main import run
from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.errors import QuasarError, UsageError
from quasar_core.quantize import text_log
from quasar_core.quantize.checks import check_finite

pytest_plugins = ["helpers.quantize_fixtures"]
WEIGHTS = "model.safetensors"
LAYER = "model.layers.1.mlp.up_proj.weight"


def change_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Write the model again with one tensor changed."""
    tensors = load_file(folder / WEIGHTS)
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def put(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor[3, 5] = value
    return tensor


def truncate(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-100])


def overwrite_header(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:40] + b"\xff" * 40 + content[80:])


def change_config(folder: Path, **changes: Any) -> None:
    """None takes a key away."""
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def resize(folder: Path, **sizes: int) -> None:
    """Another random model of other sizes, with the same tokenizer."""
    config = Qwen3Config.from_pretrained(folder)
    for name, size in sizes.items():
        setattr(config, name, size)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, r"model\.safetensors is not a (whole|readable) safetensors file"),
    "corrupted": (overwrite_header, r"model\.safetensors is not a (whole|readable) safetensors file"),
    "NaN": (
        lambda folder: change_tensor(folder, LAYER, lambda t: put(t, float("nan"))),
        rf"The tensor {LAYER} in .* holds values that are not finite",
    ),
    "infinite": (
        lambda folder: change_tensor(folder, LAYER, lambda t: put(t, float("-inf"))),
        rf"The tensor {LAYER} in .* holds values that are not finite",
    ),
    "integers": (
        lambda folder: change_tensor(folder, LAYER, lambda t: t.to(torch.int8)),
        rf"The tensor {LAYER} in .* is stored as I8: a target has weights of 16 or 32 bits",
    ),
    "fp8": (
        lambda folder: change_tensor(folder, LAYER, lambda t: t.to(torch.float8_e4m3fn)),
        rf"The tensor {LAYER} in .* is stored as F8_E4M3",
    ),
    "another tokenizer": (
        lambda folder: resize(folder, vocab_size=128),
        "The tokenizer has 257 tokens and the model's embedding 128: they do not belong together",
    ),
    "odd outputs": (
        lambda folder: resize(folder, intermediate_size=60),
        r"Layer model\.layers\.0\.mlp\.gate_proj cannot be packed: 60 outputs are not a multiple of 8",
    ),
    "a key missing": (
        lambda folder: change_config(folder, num_key_value_heads=None),
        r"The tensor .*\.0\.self_attn\.[kv]_proj\.weight in .* is \(32, 64\), and by its config \(1024, 64\)",
    ),
    "no type": (lambda folder: change_config(folder, model_type=None), "is not one that transformers understands: "),
    "a tensor missing": (drop_tensor, r"holds no tensor model\.norm\.weight"),
}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_numbers_of_eight_bits_are_checked_too(tmp_path: Path, dtype: torch.dtype) -> None:
    numbers = torch.tensor([1.0, -448.0])
    save_file({"w": numbers.to(dtype)}, tmp_path / WEIGHTS)
    check_finite(TensorFiles(tmp_path))
    save_file({"w": torch.cat((numbers, torch.tensor([float("nan")]))).to(dtype)}, tmp_path / WEIGHTS)
    with pytest.raises(QuasarError, match=r"The tensor w in .* holds values that are not finite"):
        check_finite(TensorFiles(tmp_path))


@pytest.mark.parametrize("kind", BROKEN)
def test_a_model_that_cannot_be_quantized(kind: str, source: Path) -> None:
    spoil, sentence = BROKEN[kind]
    spoil(source)
    with pytest.raises(QuasarError, match=sentence) as caught:
        quantize(source)
    assert "\n" not in str(caught.value)
    assert [path.name for path in source.parent.iterdir() if path.name.startswith("tiny-")] == []


def test_groups_and_words_that_the_inputs_do_not_fill(source: Path) -> None:
    """The last group is shorter; 96 inputs in groups of 64."""
    resize(source, intermediate_size=96)
    quantize(source, replace(CONFIG, group_size=64), output=source.parent / "out")
    assert tensors_of(source.parent / "out")["model.layers.0.mlp.down_proj.scales"].shape == (2, 64)


def test_shards_with_an_index(source: Path) -> None:
    straight = Path(quantize(source, output=source.parent / "straight").checkpoint)
    tensors = load_file(source / WEIGHTS)
    (source / WEIGHTS).unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, source / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = tensors_of(Path(quantize(source, output=source.parent / "sharded").checkpoint))
    assert all(torch.equal(tensor, sharded[name]) for name, tensor in tensors_of(straight).items())
    (source / "b.safetensors").unlink()
    with pytest.raises(QuasarError, match=r"is incomplete: its index names b\.safetensors"):
        quantize(source, output=source.parent / "again")


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": NaN}\n', '{"text": ""}\n'])
def test_a_calibration_text_without_text(content: str, source: Path) -> None:
    (source.parent / "text.jsonl").write_text(content)
    with pytest.raises(UsageError, match=r"text\.jsonl"):
        quantize(source, replace(CONFIG, calibration=str(source.parent / "text.jsonl")))
    assert not (source.parent / "tiny-gptq-4bit-g32.partial").exists()


def test_a_calibration_file_is_looked_at_before_the_weights(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading these takes minutes, and the model's greedy text hours."""
    monkeypatch.setattr("quasar_core.quantize.run.check_finite", lambda *_: pytest.fail("weights are read"))
    with pytest.raises(
        UsageError, match="--calibration must be a file or one of self, generic, wikitext2, c4; nowhere is"
    ):
        quantize(source, replace(CONFIG, calibration="nowhere"))


def test_two_runs_at_once(source: Path) -> None:
    """The second is refused while the first holds the folder, however the first ends; its lock is no lock then."""
    partial = source.parent / "tiny-gptq-4bit-g32.partial"
    partial.mkdir()
    with (partial / "lock").open("w") as held:
        held.write("4242\n")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match=r"Another run \(process 4242\) writes .*tiny-gptq-4bit-g32 at this"):
            quantize(source)
    assert (partial / "lock").exists(), "a stale lock"
    quantize(source)


@pytest.mark.parametrize(
    ("seconds", "room", "file"),
    [
        (0.0, 3_000, r"\.partial"),
        (1e9, 10_000, r"seed-0-row-0\.safetensors"),
        (1e9, 20_000, r"block-00000\.safetensors"),
        (1e9, 50_000, "shard-0"),
    ],
)
def test_a_full_disk(source: Path, seconds: float, room: int, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system refuses files beyond some size; with room again, the same command goes on to the same tensors.

    Text is logged as often as every so many seconds.
    """
    monkeypatch.setattr(text_log, "SECONDS", seconds)
    monkeypatch.setattr(text_log, "SHARE", 0)
    config = replace(CONFIG, fidelity_rows=1, samples=3)
    straight = tensors_of(Path(quantize(source, config, output=source.parent / "straight").checkpoint))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        said = (
            rf"{file} could not be written \(File too large\); what is finished is kept, and the same command goes on"
        )
        with pytest.raises(QuasarError, match=said):
            quantize(source, config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    sizes = [path.stat().st_size for path in source.parent.rglob("*.partial/**/*.safetensors")]
    assert all(size <= room for size in sizes)
    resumed = tensors_of(Path(quantize(source, config).checkpoint))
    assert all(torch.equal(tensor, straight[name]) for name, tensor in resumed.items())


def test_a_home_that_cannot_be_written_is_told_before_the_work(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the pair could not be recorded at the end of it."""
    monkeypatch.setenv("QUASAR_HOME", os.path.join(os.devnull, "home"))
    stages: list[str] = []
    with pytest.raises(QuasarError, match=r"pairs\.json cannot be written: "):
        quantize(source, progress=lambda stage, done, total: stages.append(stage))
    assert not stages
    assert sorted(path.name for path in source.parent.iterdir() if path.name != "home") == ["tiny"]


def test_a_folder_that_cannot_be_written(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Path.mkdir

    def refuse(self: Path, *given: Any, **named: Any) -> None:
        if self.name == "home":
            return make(self, *given, **named)
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(QuasarError, match=r"tiny-gptq-4bit-g32\.partial could not be made \(Read-only file system\)"):
        quantize(source)


def test_a_disk_that_is_full_when_the_shards_are_written(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.fsync

    def full(file: int) -> None:
        if "commits" not in os.readlink(f"/proc/self/fd/{file}"):
            raise OSError(28, "No space left on device")
        original(file)

    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc here to tell files by")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(QuasarError, match=r"could not be written \(No space left on device\)"):
            quantize(source)
    assert not (source.parent / "tiny-gptq-4bit-g32").exists()
    quantize(source)


def test_ctrl_c_says_how_to_go_on(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from quasar_core.quantize.solve import gptq

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    command = ["quantize", str(source), "--group-size", "32", "--samples", "6", "--seq-len", "24", "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(gptq, "solve_layer", interrupt)
        assert run(command) == 130
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines()[-1] == "Interrupted. What is finished is kept: the same command goes on from there."
    with monkeypatch.context() as patch:
        patch.setattr(gptq, "solve_layer", interrupt)
        assert run([*command, "--no-resume"]) == 130
    assert "the same command without --no-resume goes on from there" in capsys.readouterr().err
    assert run(command) == 0
