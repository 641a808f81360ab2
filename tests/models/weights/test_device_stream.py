"""Weights that are copied to a device for every pass give what weights there give, however late the device is."""

import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_cases import CASES, CPU, FLOAT, random_tokens, save_model
from helpers.heard_cuda import hear_cuda
from helpers.late_device import CHARACTERS, COMPUTES_LATE, COPIES_LATE, Computing, Copying, LateDevice, Reached
from helpers.streamed import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_core.errors import QuasarError
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.memory.offload import movable_products
from quasar_core.models.weights import weight_reads
from quasar_core.models.weights.device_queues import Link, PinnedMemory, PlainQueue, open_link
from quasar_core.models.weights.device_stream import DeviceStream
from quasar_core.models.weights.lean_weights import load_target

BF16 = torch.bfloat16
TOKENS = random_tokens(14)
MOST_BLOCKS = 6


def over(link: Link, folder: Path, blocks: Iterable[int], dtype: torch.dtype = FLOAT) -> LeanDecoder:
    """The model of a folder, whose products in these blocks come over a link for every pass."""
    movable, _ = movable_products(folder, None)
    return load_target(folder, CPU, dtype, streamed={block: movable[block] for block in blocks}, link=link)


def source_of(decoder: LeanDecoder) -> DeviceStream:
    assert isinstance(decoder.source, DeviceStream)
    return decoder.source


def passes(decoder: LeanDecoder) -> list[torch.Tensor]:
    """A prompt in two chunks, passes of one token and of several."""
    cache = decoder.new_cache(32)
    found = [decoder.pass_prompt(TOKENS[:9], cache, 5)]
    found += [decoder.forward(TOKENS[begin:end], cache) for begin, end in ((9, 10), (10, 14))]
    return [*found, *(states[:, :, : cache.length].clone() for states in cache.layers)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, list[torch.Tensor]]]:
    """A model of each number of blocks, and what its passes give with all weights in memory."""
    found = []
    for count in range(1, MOST_BLOCKS + 1):
        folder = tmp_path_factory.mktemp(f"blocks-{count}")
        save_model(folder, "Llama", {"num_hidden_layers": count, "hidden_size": 32, "intermediate_size": 48})
        found.append((folder, passes(load_target(folder, CPU, FLOAT))))
    return found


@st.composite
def shares(draw: st.DrawFn) -> tuple[int, list[int], list[int]]:
    """A number of blocks, which of them are streamed, and which of these main memory holds."""
    count = draw(st.integers(1, MOST_BLOCKS))
    streamed = draw(st.lists(st.integers(0, count - 1), unique=True, min_size=1))
    return count, sorted(streamed), draw(st.lists(st.sampled_from(streamed), unique=True))


@settings(deadline=None, max_examples=60)
@given(share=shares(), character=st.sampled_from(CHARACTERS), seed=st.integers(0, 999), start=st.booleans())
def test_every_share_gives_the_same_bits(
    models: list[tuple[Path, list[torch.Tensor]]],
    share: tuple[int, list[int], list[int]],
    character: str,
    seed: int,
    start: bool,
) -> None:
    (folder, expected), (_, blocks, held) = models[share[0] - 1], share
    with pytest.MonkeyPatch.context() as patch:
        device = LateDevice(character, seed).watch(patch)
        decoder = over(device.link(frozenset(held)), folder, blocks)
        assert_same(passes(decoder), expected)
        if start:
            source_of(decoder).start()
        assert_same(passes(decoder), expected)  # and when the buffers hold the first blocks already
        assert device.wrong == []
        assert device.copies > len(blocks) * 4 or len(blocks) <= 2


@settings(deadline=None, max_examples=40)
@given(share=shares(), character=st.sampled_from(CHARACTERS), seed=st.integers(0, 999), at=st.integers(1, 20))
def test_a_pass_that_ends_in_its_middle_leaves_the_next_one_right(
    models: list[tuple[Path, list[torch.Tensor]]],
    share: tuple[int, list[int], list[int]],
    character: str,
    seed: int,
    at: int,
) -> None:
    """Ctrl-C before a block, and in the middle of one, whose products are still under way then."""
    (folder, expected), (_, blocks, held) = models[share[0] - 1], share
    with pytest.MonkeyPatch.context() as patch:
        device = LateDevice(character, seed).watch(patch)
        decoder = over(device.link(frozenset(held)), folder, blocks)
        run, seen = LeanDecoder._mlp, [0]

        def interrupted(self: LeanDecoder, *given: Any) -> torch.Tensor:
            seen[0] += 1
            if seen[0] == at:
                raise KeyboardInterrupt
            return run(self, *given)

        patch.setattr(LeanDecoder, "_mlp", interrupted)
        try:
            passes(decoder)
        except KeyboardInterrupt:
            assert seen[0] == at
        seen[0] = at  # no further one
        assert_same(passes(decoder), expected)
        assert device.wrong == []


def nothing(*given: Any) -> None:
    """In the place of what keeps the order."""


@pytest.mark.parametrize(
    ("queue", "character", "said"),
    [
        (Computing, COPIES_LATE, "weights were multiplied before their copy was waited for"),
        (Copying, COMPUTES_LATE, "a copy came into a buffer that was still read"),
    ],
)
def test_an_order_that_is_not_kept_is_seen(
    models: list[tuple[Path, list[torch.Tensor]]],
    monkeypatch: pytest.MonkeyPatch,
    queue: type,
    character: str,
    said: str,
) -> None:
    """The stand-in would tell: otherwise the tests above could not fail."""
    folder, _ = models[4]
    device = LateDevice(character).watch(monkeypatch)
    link = device.link(frozenset(range(5)))
    monkeypatch.setattr(queue, "wait", nothing)
    passes(over(link, folder, range(5)))
    assert said in device.wrong


@pytest.mark.parametrize("waits", [True, False], ids=["in order", "out of order"])
def test_a_block_is_read_into_a_room_when_the_one_before_has_left(
    models: list[tuple[Path, list[torch.Tensor]]], monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    """The host is far ahead of the copies: block 3 takes the room from which block 0 has yet to be copied."""
    folder, _ = models[4]
    device = LateDevice(COPIES_LATE)
    decoder, whole = over(device.link(frozenset([1])), folder, range(5)), load_target(folder, CPU, FLOAT)
    source = source_of(decoder)
    assert source.rooms[0].data_ptr() == source.rooms[3].data_ptr()
    if not waits:
        monkeypatch.setattr(Reached, "synchronize", nothing)
    for block in (0, 3):
        source._fetch(block)
        reading = source._buffers[block % 2].reading
        assert reading is not None
        reading.result()
    device.reach(device.recorded)
    same = [
        torch.equal(one.weight, other.weight)  # type: ignore[attr-defined]
        for block in (0, 3)
        for one, other in zip(decoder.layers[block].linears, whole.layers[block].linears, strict=True)
    ]
    assert all(same) == waits


def test_plain_queues_and_16_bits_and_every_architecture(tmp_path: Path) -> None:
    """On a device that does all at once; weights stored in 32 bits are brought in 16."""
    cases = "gemma 4, shared states and own inputs", "muse glimmer", "qwen 2 moe", "qwen3, listed windows, biases"
    for case in cases:
        folder = tmp_path / case
        save_model(folder, *CASES[case])
        movable, count = movable_products(folder, None)
        expected = passes(load_target(folder, CPU, BF16))
        decoder = over(open_link(CPU, frozenset([0, 3])), folder, movable, BF16)
        assert_same(passes(decoder), expected)
        source = source_of(decoder)
        assert source.streamed == f"{len(movable)} of {count} blocks, {len(set(movable) - {0, 3})} from the disk"


def test_bytes_and_bandwidth(models: list[tuple[Path, list[torch.Tensor]]]) -> None:
    folder, _ = models[4]
    block = 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    held = source_of(over(open_link(CPU, frozenset(range(5))), folder, range(5)))
    held.start()
    assert (held.pass_bytes, held.read_bytes, held.bytes_read) == (5 * block, 0, 2 * block)
    assert held.bandwidth == held.link_rate > 0
    assert held.streamed == "5 of 5 blocks"
    assert len(held.memory.bytes) == 5 * block
    read = source_of(over(open_link(CPU, frozenset([0, 1, 2])), folder, range(5)))
    read.start()
    assert (read.pass_bytes, read.read_bytes) == (5 * block, 2 * block)
    assert len(read.memory.bytes) == 5 * block  # three that are held, and two rooms
    read.seconds_reading, read._bytes_stored, read.link_rate = 1.0, 1000, 1e9
    assert read.bandwidth == pytest.approx(2500)  # the disk takes longer: two of five blocks at 1000 bytes a second
    read.link_rate = 10.0
    assert read.bandwidth == pytest.approx(10)
    few = source_of(over(open_link(CPU, frozenset([0, 1])), folder, [0, 1]))
    assert (few.pass_bytes, few.streamed) == (0, None)


# What fails


def fail(*given: Any) -> int:
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize("held", [[], [0, 2, 4]])
def test_a_read_that_fails_ends_the_answer_and_the_next_one_is_right(
    models: list[tuple[Path, list[torch.Tensor]]], monkeypatch: pytest.MonkeyPatch, held: list[int]
) -> None:
    folder, expected = models[4]
    device = LateDevice(seed=3).watch(monkeypatch)
    decoder = over(device.link(frozenset(held)), folder, range(5))
    decoder.forward([5], decoder.new_cache(20))
    read = os.preadv
    monkeypatch.setattr(weight_reads.os, "preadv", fail)
    with pytest.raises(QuasarError, match=r"model.safetensors cannot be read: Input/output error\.$"):
        passes(decoder)
    monkeypatch.setattr(weight_reads.os, "preadv", read)
    assert_same(passes(decoder), expected)
    assert device.wrong == []


def test_what_main_memory_holds_needs_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path, *CASES["llama"])
    expected = passes(load_target(tmp_path, CPU, FLOAT))
    decoder = over(open_link(CPU, frozenset(range(4))), tmp_path, range(4))
    (tmp_path / "model.safetensors").unlink()
    monkeypatch.setattr(weight_reads.os, "preadv", fail)
    assert_same(passes(decoder), expected)


def test_a_file_that_is_replaced_while_it_is_loaded_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, *CASES["llama"])
    movable, _ = movable_products(tmp_path, None)
    path = tmp_path / "model.safetensors"

    def replace_it(stage: str, *counts: int) -> None:
        if stage == "reading streamed blocks" and counts == (1, 4):
            path.with_name("other").write_bytes(path.read_bytes())
            path.with_name("other").replace(path)

    with pytest.raises(QuasarError, match=r"model.safetensors was replaced while its weights were loaded: start again"):
        load_target(tmp_path, CPU, FLOAT, replace_it, movable, link=open_link(CPU, frozenset(range(4))))


def test_no_thread_and_no_pinned_memory_outlive_their_model(tmp_path: Path) -> None:
    save_model(tmp_path, *CASES["llama"])
    let_go = list[int]()

    def pin(memory: torch.Tensor) -> Callable[[], None]:
        size = memory.nbytes
        return lambda: let_go.append(size)

    decoder = over(replace(open_link(CPU, frozenset(range(4))), pin=pin), tmp_path, range(4))
    source_of(decoder).start()
    size, alive = source_of(decoder).memory.bytes.nbytes, weakref.ref(source_of(decoder))
    assert let_go == []
    del decoder
    gc.collect()
    assert alive() is None
    assert let_go == [size]
    for thread in threading.enumerate():
        if thread.name.startswith("quasar weights"):
            thread.join(5)
            assert not thread.is_alive()


# What a GPU would be asked for


def test_cuda_is_asked_for_copies_beside_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    heard, link = hear_cuda(monkeypatch), open_link(torch.device("cuda", 0), frozenset())
    place = torch.zeros(3)
    link.copying.wait(link.computing.record())
    link.copying.copy(place, torch.ones(3))
    link.computing.wait(link.copying.record())
    assert place.tolist() == [1, 1, 1]
    before, behind = (
        ("on cuda:0", "recorded in current", "own waits"),
        ("on cuda:0", "recorded in own", "current waits"),
    )
    assert heard == [*before, "on own", "kept for own", *behind]


def test_memory_is_pinned_for_as_long_as_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = hear_cuda(monkeypatch)
    memory = PinnedMemory(100, open_link(torch.device("cuda", 0), frozenset()).pin)
    assert heard == ["on cuda:0", "registered 100"]
    view = memory.bytes[:10]
    del memory
    gc.collect()
    assert heard[2:] == ["synchronized", "unregistered"]
    assert len(view) == 10


def test_memory_that_cannot_be_pinned_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    hear_cuda(monkeypatch, refused=2)
    with pytest.raises(QuasarError, match=r"^3e-08 GB of main memory cannot be pinned for cuda:0 \(CUDA's error 2\)"):
        PinnedMemory(30, open_link(torch.device("cuda", 0), frozenset()).pin)


def test_elsewhere_all_is_done_at_once() -> None:
    queue, place = PlainQueue(), torch.zeros(2)
    queue.copy(place, torch.ones(2))
    queue.record().synchronize()
    queue.wait(queue.record())
    assert place.tolist() == [1, 1]


def test_one_copy_brings_a_block(tmp_path: Path) -> None:
    """Rooms have the layout of their buffers."""
    save_model(tmp_path, *CASES["llama"])
    decoder = over(open_link(CPU, frozenset(range(4))), tmp_path, range(4))
    source = source_of(decoder)
    for block, layer in enumerate(decoder.layers):
        base, room = source.buffers[block % 2].data_ptr(), source.rooms[block].data_ptr()
        stored = {weight.place.data_ptr() - room for weight in source.weights[block]}
        assert {product.weight.data_ptr() - base for product in layer.linears} <= stored  # type: ignore[attr-defined]
