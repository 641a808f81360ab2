"""Blocks in 12 bits on the disk: the same bits in every pass, fewer bytes, written once and whole, made anew if old."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.decoder_cases import CASES, CPU, FLOAT, random_tokens, save_model
from helpers.quantized_decoder import quantize_layers
from helpers.tiny_models import make_pair
from safetensors.torch import load_file, save_file

from quasar_core.config import GenerationConfig, LoadOptions
from quasar_core.decode.generator import Generator
from quasar_core.errors import QuasarError, UsageError
from quasar_core.models.decoder.layer import CompressedLinear
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.loading import attach, load_models
from quasar_core.models.memory import offload
from quasar_core.models.memory.estimate import MemoryNeed
from quasar_core.models.memory.offload import (
    LEAST_RESERVE,
    Budget,
    Movable,
    movable_products,
    plan_offload,
    plan_to_fit,
)
from quasar_core.models.weights import compressed_files
from quasar_core.models.weights.compressed_files import find_copy, forget_copies, make_copy, place_of
from quasar_core.models.weights.lean_weights import attach_verifier, load_target
from quasar_core.models.weights.streaming import LayerStream

BF16 = torch.bfloat16
pytestmark = [pytest.mark.usefixtures("cpp_pass", "own_home")]
COPIED_CASES = ("qwen3, listed windows, biases", "gemma 2", "llama, all biases")


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUASAR_HOME", str(tmp_path / "home"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", *CASES["llama"]).to(BF16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def from_copy(folder: Path, blocks: list[int], fast: bool = True) -> LeanDecoder:
    """The model, of which these blocks are streamed and the others stay, all in 12 bits."""
    products, _ = movable_products(folder, None)
    streamed = {block: products[block] for block in blocks}
    kept = {block: products[block] for block in products.keys() - streamed.keys()}
    decoder = load_target(folder, CPU, BF16, streamed=streamed, kept=kept, copy=make_copy(folder))
    if fast:
        attach(decoder)
    return decoder


def passes(decoder: LeanDecoder) -> list[torch.Tensor]:
    """A prompt in three chunks, and passes of several tokens and of one."""
    tokens = random_tokens(40)
    cache = decoder.new_cache(48)
    found = [decoder.pass_prompt(tokens[:20], cache, 8)]
    found += [decoder.forward(tokens[begin:end], cache) for begin, end in ((20, 27), (27, 28), (28, 40))]
    return [*found, *(states[:, :, : cache.length].clone() for states in cache.layers)]


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "cpp"])
@pytest.mark.parametrize("case", COPIED_CASES)
def test_every_share_gives_the_bits_of_the_weights_as_they_were(tmp_path: Path, case: str, fast: bool) -> None:
    save_model(tmp_path / "model", *CASES[case])
    whole = load_target(tmp_path / "model", CPU, BF16)
    if fast:
        attach(whole)
    expected = passes(whole)
    for blocks in ([0, 1, 2, 3], [0, 2, 3], [1]):
        decoder = from_copy(tmp_path / "model", blocks, fast)
        assert all(isinstance(layer.down, CompressedLinear) for layer in decoder.layers)
        for _ in range(2):  # and when the buffers hold the first blocks already
            assert all(torch.equal(one, other) for one, other in zip(passes(decoder), expected, strict=True))


def test_a_sweep_reads_three_quarters_of_the_bytes(model: Path) -> None:
    products, _ = movable_products(model, None)
    plain = load_target(model, CPU, BF16, streamed=products).source
    source = from_copy(model, [0, 1, 2, 3]).source
    assert isinstance(plain, LayerStream)
    assert isinstance(source, LayerStream)
    assert source.pass_bytes < 0.8 * plain.pass_bytes


def test_answers_are_those_of_plain_decoding(model: Path, tmp_path: Path) -> None:
    checkpoint = quantize_layers(model, tmp_path / "verifier", lambda name: 8 if "_proj" in name else 16)
    whole = load_target(model, CPU, BF16)
    attach(whole)
    expected = Generator(make_pair(whole, dtype=BF16), GenerationConfig(60, "full", "none")).generate([5, 6, 7, 8])
    target = from_copy(model, [0, 2, 3])
    verifier = attach_verifier(target, checkpoint, "vnni")
    attach(verifier)
    answer = Generator(make_pair(target, verifier, dtype=BF16), GenerationConfig(60, window=20)).generate([5, 6, 7, 8])
    assert answer.token_ids == expected.token_ids


def test_it_is_written_once_and_goes_on_where_it_was_interrupted(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_copy(model) is None
    written, write = list[str](), compressed_files._write_block

    def interrupted(files: object, products: object, path: Path) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write(files, products, path)  # type: ignore[arg-type]

    monkeypatch.setattr(compressed_files, "_write_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_copy(model)
    assert find_copy(model) is None
    written.append("again")
    make_copy(model)
    assert written == ["block-00000.safetensors", "block-00001.safetensors", "again", *written[3:]]
    assert written[3:] == ["block-00002.safetensors", "block-00003.safetensors"]
    assert make_copy(model) == find_copy(model)
    assert len(written) == 5


KILLED = """
import os, signal, sys
from pathlib import Path
from quasar_core.kernels.cpu.library import library
from quasar_core.models.weights.compressed_files import make_copy
library()  # which may be compiled, and written, first
written, fsync = [], os.fsync

def kill_in_the_third(file):
    if os.fstat(file).st_size and len(written) == 4:  # of each block its content and its folder
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(file)
    fsync(file)

os.fsync = kill_in_the_third
make_copy(Path(sys.argv[1]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="nothing is killed there as elsewhere")
@pytest.mark.usefixtures("compiled_at_home")
def test_a_kill_leaves_whole_blocks_and_the_next_run_goes_on_with_them(model: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(model)], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    names = sorted(file.name for file in place_of(model).iterdir())
    assert [name for name in names if name.startswith("block-")] == [
        "block-00000.safetensors",
        "block-00001.safetensors",
    ]
    assert len(names) == 3  # and what was being written
    assert find_copy(model) is None
    kept = {name: (place_of(model) / name).stat().st_ino for name in names if name.startswith("block-")}
    make_copy(model)
    assert {name: (place_of(model) / name).stat().st_ino for name in kept} == kept
    found = {file.name: file.read_bytes() for file in place_of(model).iterdir()}
    assert sorted(found) == [f"block-{block:05d}.safetensors" for block in range(4)]
    forget_copies()
    make_copy(model)
    assert {file.name: file.read_bytes() for file in place_of(model).iterdir()} == found


def spoil(file: Path, kind: str) -> None:
    """Make of a block's file what another version, or a damaged disk, may leave."""
    if kind == "cut":
        file.write_bytes(file.read_bytes()[:-5])
        return
    parts = load_file(file)
    strips = next(name for name in parts if name.endswith(".strips"))
    if kind == "another format":
        parts = {name: part.flip(0) if name.endswith(".strips") else part for name, part in parts.items()}
    elif kind == "other sizes":
        parts[strips] = parts[strips][:-1]
    else:
        del parts[strips]
    save_file({name: part.contiguous() for name, part in parts.items()}, file)


@pytest.mark.parametrize(
    ("kind", "blocks"),
    [
        ("another format", slice(4)),
        ("a part is missing", slice(4)),
        ("a part is missing", slice(2, 3)),
        ("other sizes", slice(2, 3)),
        ("cut", slice(2, 3)),
    ],
)
def test_what_is_not_as_it_should_be_is_made_anew(model: Path, kind: str, blocks: slice) -> None:
    make_copy(model)
    expected = {file.name: file.read_bytes() for file in place_of(model).iterdir()}
    for file in sorted(place_of(model).iterdir())[blocks]:
        spoil(file, kind)
    assert find_copy(model) is None
    make_copy(model)
    assert {file.name: file.read_bytes() for file in place_of(model).iterdir()} == expected


def test_a_model_that_was_written_anew_has_a_copy_of_its_own(model: Path) -> None:
    """Of one that was changed between the bytes that its fingerprint knows too."""
    make_copy(model)
    path = model / "model.safetensors"
    before = path.stat().st_mtime_ns
    os.utime(path, ns=(before, before + 1))
    assert find_copy(model) is None
    os.utime(path, ns=(before, before))
    assert find_copy(model) is not None


def test_a_full_disk_is_told_before_anything_is_written(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed_files, "free_disk", lambda place: 1000)
    with pytest.raises(
        QuasarError, match=r"^--compress needs \d\.\d MB of disk, and 0\.0 MB are free here: .* QUASAR_HOME"
    ):
        make_copy(model)
    assert not place_of(model).exists()


def test_a_copy_is_used_where_it_is_there_and_written_where_it_is_asked_for(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "free_memory", lambda: None)

    def planned(dtype: torch.dtype = BF16, compress: bool | None = None) -> offload.OffloadPlan:
        options = LoadOptions(offload="target", verify="full", compress=compress)
        plan = plan_offload(model, None, dtype, 100, options)
        assert plan is not None
        return plan

    assert planned().copy is None
    assert planned(compress=True).copy is not None
    assert planned().copy is not None
    assert planned(compress=False).copy is None
    assert planned(FLOAT).copy is None
    with pytest.raises(UsageError, match=r"^--compress keeps a streamed model's blocks in 12 bits: only bfloat16 is"):
        planned(FLOAT, compress=True)
    assert forget_copies() == 1
    assert planned().copy is None


def test_blocks_that_stay_take_less_too(model: Path) -> None:
    movable = Movable(*movable_products(model, None), BF16)
    copied = movable.compressed(make_copy(model))
    need = MemoryNeed(sum(movable.sizes.values()), 0, 0, 0)
    room = sum(copied.sizes.values()) + copied.sizes[0]  # all in 12 bits, one of them in a buffer, and a further buffer
    budget = Budget(room + LEAST_RESERVE, asked=True)
    plain, plan = plan_to_fit(movable, need, 1, budget), plan_to_fit(copied, need, 1, budget)
    assert plain is not None
    assert plan is not None
    assert sorted(plain.streamed) == [0, 1, 2]
    assert (sorted(plan.streamed), sorted(plan.kept)) == ([0], [1, 2, 3])
    assert plan.held <= room
    notes = load_models(model, None, CPU, BF16, offload=plan).notes
    said = next(note for note in notes if note.startswith("offload:"))
    assert said.startswith("offload: all of the target's 4 blocks stay in memory, in 12 bits, with all else 0.")
