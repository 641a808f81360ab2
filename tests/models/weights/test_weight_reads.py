"""Weights that lie together are read together, and arrive as they are stored, however their places are ordered."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_cases import CASES, CPU, save_model
from helpers.quantized_decoder import quantize_layers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from quasar_core import page_cache
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.models.loading import load_models
from quasar_core.models.memory.offload import OffloadPlan, movable_products
from quasar_core.models.weights import weight_reads
from quasar_core.models.weights.direct_reads import DirectFile
from quasar_core.models.weights.weight_reads import OpenFile, StoredWeight, read_weights, runs_of
from quasar_core.store.safetensors_header import read_headers

SIZES = st.lists(
    st.tuples(st.integers(0, 40), st.sampled_from([torch.bfloat16, torch.float32])), min_size=1, max_size=8
)


@pytest.fixture
def through_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a file system has no direct reads."""
    monkeypatch.setattr(DirectFile, "open", lambda path: None)


@pytest.fixture(params=["directly", "through the page cache"])
def either_way(request: pytest.FixtureRequest) -> None:
    if request.param == "through the page cache":
        request.getfixturevalue("through_cache")


def weights_of(folder: Path, places: dict[str, torch.Tensor]) -> list[StoredWeight]:
    files = TensorFiles(folder)
    opened = {files.entry(name).file: OpenFile(files.entry(name).file) for name in places}
    return [StoredWeight(files.entry(name), opened[files.entry(name).file], place) for name, place in places.items()]


@pytest.mark.usefixtures("either_way")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SIZES, st.data())
def test_all_arrive_in_their_places(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, torch.dtype]], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("model")
    stored = {f"w{i}": torch.randn(size).to(dtype) for i, (size, dtype) in enumerate(sizes)}
    save_file(stored, folder / "model.safetensors")
    wanted = data.draw(st.lists(st.sampled_from(sorted(stored)), min_size=1, unique=True))
    places = {name: torch.full(stored[name].shape, -1.0, dtype=torch.float32) for name in wanted}
    read_weights(weights_of(folder, places))
    for name in wanted:
        assert torch.equal(places[name], stored[name].float())


@pytest.mark.usefixtures("through_cache")
def test_a_block_takes_one_read_whatever_the_order_of_its_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = {name: torch.randn(64, 16).to(torch.bfloat16) for name in ("down", "gate", "norm", "up")}
    save_file(stored, tmp_path / "model.safetensors")
    places = {name: torch.empty(64, 16, dtype=torch.bfloat16) for name in ("up", "down", "gate")}
    weights, reads, read = weights_of(tmp_path, places), list[int](), os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        reads.append(read(descriptor, buffers, offset))
        return reads[-1]

    monkeypatch.setattr(weight_reads.os, "preadv", counted)
    read_weights(weights)
    assert reads == [4 * 64 * 16 * 2]  # with the norm, which lies between and is thrown away
    assert all(torch.equal(places[name], stored[name]) for name in places)


def test_what_lies_far_apart_is_read_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_reads, "SMALL_GAP", 100)
    save_file({name: torch.zeros(64) for name in ("a", "b", "c", "d")}, tmp_path / "model.safetensors")
    weights = weights_of(tmp_path, {name: torch.empty(64) for name in ("d", "a", "b")})
    assert [[weight.entry.name for weight in run] for run in runs_of(weights)] == [["a", "b"], ["d"]]


@given(st.lists(st.integers(0, 9), max_size=6), st.integers(1, 30))
def test_reads_are_cut_and_gone_on_with(sizes: list[int], most: int) -> None:
    whole = bytes(range(sum(sizes)))
    buffers, begin = [], 0
    for size in sizes:
        buffers.append(memoryview(whole[begin : begin + size]))
        begin += size
    first = weight_reads._first_bytes(buffers, most)
    rest = weight_reads._behind(buffers, sum(map(len, first)))
    assert b"".join(first) == whole[:most]
    assert b"".join([*first, *rest]) == whole


def test_one_stored_number_may_have_no_dimension(tmp_path: Path) -> None:
    save_file({"one": torch.tensor(2.5)}, tmp_path / "model.safetensors")
    place = torch.zeros(1)
    read_weights(weights_of(tmp_path, {"one": place.view(())}))
    assert place.item() == 2.5


def forgotten(monkeypatch: pytest.MonkeyPatch) -> dict[Path, set[int]]:
    """The bytes of files that the system is told to forget, from now on."""
    found = dict[Path, set[int]]()

    def advise(descriptor: int, start: int, count: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            size = path.stat().st_size
            found.setdefault(path, set()).update(range(start, min(start + count, size) if count else size))

    monkeypatch.setattr(page_cache.os, "posix_fadvise", advise)
    return found


@pytest.mark.usefixtures("either_way")
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="files are known by their descriptors on Linux alone")
@pytest.mark.parametrize("streamed", [True, False])
def test_loading_that_spares_memory_leaves_no_pages_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    model, verifier = tmp_path / "model", tmp_path / "verifier"
    save_model(model, *CASES["llama"])
    checkpoint = quantize_layers(model, verifier, lambda name: 8)
    found = forgotten(monkeypatch)
    load_models(model, checkpoint, CPU, torch.float32, kernel="dense")
    assert found == {}
    movable, count = movable_products(model, checkpoint)
    plan, anew = OffloadPlan(movable, count, 0), VerifierCheckpoint(verifier)
    options: dict[str, Any] = {"offload": plan} if streamed else {"sparing": True}
    load_models(model, anew, CPU, torch.float32, kernel="dense", **options)
    for folder in (model, verifier):
        (file,) = folder.glob("*.safetensors")
        first = min(entry.start for entry in read_headers(folder))
        assert found[file] >= set(range(first, file.stat().st_size))


@pytest.fixture
def ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, through_cache: None
) -> tuple[OpenFile, list[tuple[int, int]]]:
    """A file that is read in pieces of 100 bytes at most, and begins and ends of what the system is told to forget."""
    (tmp_path / "file").write_bytes(bytes(5000))
    asked = list[tuple[int, int]]()
    monkeypatch.setattr(weight_reads, "forget", lambda descriptor, start, count: asked.append((start, start + count)))
    for name, size in (("PIECE_BYTES", 100), ("BEHIND", 250), ("AHEAD", 700), ("SMALL_GAP", 10)):
        monkeypatch.setattr(weight_reads, name, size)
    return OpenFile(tmp_path / "file"), asked


def test_pages_that_a_read_has_ended_in_are_forgotten_by_a_later_one(
    ranges: tuple[OpenFile, list[tuple[int, int]]],
) -> None:
    """As the system lets go of groups of pages, and of none that it is told a part of."""
    file, asked = ranges
    file.read(0, memoryview(bytearray(300)))
    file.read(300, memoryview(bytearray(200)))
    assert asked == [(0, 100), (0, 200), (0, 300), (50, 400), (150, 500)]


def test_what_the_system_read_ahead_in_vain_is_forgotten(ranges: tuple[OpenFile, list[tuple[int, int]]]) -> None:
    file, asked = ranges
    for start in (0, 110, 1000, 990):  # the second nearly goes on where the first ended
        file.read(start, memoryview(bytearray(100)))
    assert asked == [(0, 100), (0, 210), (0, 910), (750, 1100), (750, 1800), (740, 1090)]


@pytest.mark.usefixtures("either_way")
def test_more_weights_lie_together_than_one_read_may_fill(tmp_path: Path) -> None:
    """As those of many small experts: Linux refuses a read into more than 1,024 buffers."""
    stored = {f"w{i:04d}": torch.randn(3) for i in range(1100)}
    save_file(stored, tmp_path / "model.safetensors")
    places = {name: torch.empty(3) for name in stored}
    weights = weights_of(tmp_path, places)
    assert [len(run) for run in runs_of(weights)] == [len(stored)]
    read_weights(weights)
    assert all(torch.equal(places[name], stored[name]) for name in stored)
