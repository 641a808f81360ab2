"""What of a target stays on a GPU, what in main memory and what on the disk; what cannot be is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_cases import CPU, FLOAT, random_tokens, save_model
from helpers.quantized_decoder import quantize_layers
from hypothesis import given
from hypothesis import strategies as st

from quasar_core import load_pair
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.config import LoadOptions
from quasar_core.errors import QuasarError, UsageError
from quasar_core.models.config.decoder import DecoderConfig
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.loading import load_models
from quasar_core.models.memory import device_offload, offload
from quasar_core.models.memory.device_offload import (
    DeviceBudget,
    DevicePlan,
    held_blocks,
    plan_on_device,
    plan_within_device,
)
from quasar_core.models.memory.estimate import LEAST_SLACK, MemoryNeed, pair_need, sweep_bytes
from quasar_core.models.memory.offload import LEAST_RESERVE, Budget, Movable, movable_products
from quasar_core.models.weights.device_stream import DeviceStream, memory_bytes
from quasar_core.store.model_config import read_config

GPU, BF16, GB = torch.device("cuda", 0), torch.bfloat16, 10**9
INNER = 1024
BLOCK = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * INNER * 64)  # bytes
SIZES = st.dictionaries(st.integers(0, 99), st.integers(1, 50), min_size=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of four blocks."""
    save_model(tmp_path / "model", "Llama", {"intermediate_size": INNER})
    return tmp_path / "model"


Ask = Callable[..., DevicePlan | None]


@pytest.fixture
def ask(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """A plan for a GPU that has so much free, beside so much free main memory."""

    def asked(
        free: int, main: int = 10 * GB, checkpoint: VerifierCheckpoint | None = None, **options: Any
    ) -> DevicePlan | None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 24 * GB))
        monkeypatch.setattr(offload, "free_memory", lambda: main)
        monkeypatch.setattr(offload, "own_memory", lambda: GB)
        return plan_on_device(folder, checkpoint, GPU, BF16, 128, LoadOptions(**options))

    return asked


def whole_of(folder: Path, tokens: int = 128) -> int:
    """Bytes of the model on the GPU, its passes those of streamed blocks."""
    need = pair_need(folder, None, BF16)
    assert need is not None
    return need.total(tokens) + sweep_bytes(DecoderConfig.parse(read_config(folder)), BF16)


def test_what_fits_as_it_always_did_stays(folder: Path, ask: Ask) -> None:
    need = pair_need(folder, None, BF16)
    assert need is not None
    fits = need.total(128) + LEAST_SLACK
    assert ask(fits) is None
    assert ask(fits, offload="none") is None
    assert ask(fits - 1) is not None
    assert ask(fits - 1, offload="none") is None  # and is refused by the check of what fits
    assert ask(fits - 1, use_target=False, verify="quantized") is None
    assert ask(24 * GB, max_device_memory=fits) is None
    assert ask(24 * GB, max_device_memory=fits - 1) is not None


def test_as_few_blocks_move_as_must(folder: Path, ask: Ask) -> None:
    """Two buffers are as large as two blocks: with three that move one block's bytes are saved."""
    whole = whole_of(folder)
    for less, moved in ((1, [0, 1, 2]), (BLOCK, [0, 1, 2]), (BLOCK + 1, [0, 1, 2, 3])):
        found = ask(whole + LEAST_SLACK - less, max_context=128)
        if less == 1:  # without the logits of long passes it fits whole
            assert found is None
            continue
        assert found is not None
        assert sorted(found.streamed) == moved
        assert found.held == whole - (len(moved) - 2) * BLOCK <= whole - less
        assert found.pinned == frozenset(moved)
        assert found.tokens == 128
        assert found.longest is None  # the longest text of the model fits
    every = ask(24 * GB, offload="target")
    assert every is not None
    assert sorted(every.streamed) == [0, 1, 2, 3]


def test_a_context_is_counted_that_was_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Unasked, blocks stay where a context of 1,024 tokens fits beside them."""
    save_model(tmp_path, "Llama", {"max_position_embeddings": 8192})
    need = pair_need(tmp_path, None, BF16)
    assert need is not None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (need.total(1024) + LEAST_SLACK, 24 * GB))
    assert plan_on_device(tmp_path, None, GPU, BF16, 8192, LoadOptions()) is None
    with pytest.raises(
        QuasarError, match=r"--max-device-memory must be at least .* with a context of 4100 tokens, even"
    ):
        plan_on_device(tmp_path, None, GPU, BF16, 8192, LoadOptions(max_context=4100))


@given(sizes=SIZES, verifier=st.integers(0, 500), room=st.integers(1, 4000))
def test_what_is_held_fits_and_one_block_less_would_not_do(sizes: dict[int, int], verifier: int, room: int) -> None:
    need = MemoryNeed(sum(sizes.values()), verifier, 100, 2)
    budget = DeviceBudget(room + LEAST_SLACK, asked=True)
    movable = FakeMovable({block: [] for block in sizes}, 100, BF16, None, sizes)
    try:
        found = plan_within_device(movable, need, 10, budget, moves_all=False)
    except UsageError:
        all_moved = offload.saved_bytes(sizes, sorted(sizes))
        assert need.total(10) - all_moved > room
        return
    moved = sorted(found.streamed)
    assert found.held == need.total(10) - offload.saved_bytes(sizes, moved) <= room
    if len(set(sizes.values())) == 1 and len(moved) > 2 and need.total(10) > room:
        assert need.total(10) - offload.saved_bytes(sizes, moved[:-1]) > room


class FakeMovable(Movable):
    """Blocks of sizes that are given."""

    def __init__(self, products: Any, count: int, dtype: torch.dtype, copy: None, sizes: dict[int, int]) -> None:
        super().__init__(products, count, dtype, copy)
        object.__setattr__(self, "_sizes", sizes)

    @property
    def sizes(self) -> dict[int, int]:
        """As given."""
        return self._sizes  # type: ignore[attr-defined, no-any-return]


@given(sizes=SIZES, room=st.integers(1, 3000), asked=st.booleans())
def test_main_memory_holds_as_many_as_it_has_room_for(sizes: dict[int, int], room: int, asked: bool) -> None:
    budget = Budget(room + LEAST_RESERVE, asked)
    try:
        held = held_blocks(sizes, budget)
    except UsageError:
        assert asked
        assert memory_bytes(sizes, []) > room
        return
    except QuasarError:
        assert not asked
        assert memory_bytes(sizes, []) > room
        return
    assert held <= sizes.keys()
    assert memory_bytes(sizes, [*held]) <= room
    assert (held == sizes.keys()) == (sum(sizes.values()) <= room)
    assert held_blocks(sizes, None) == frozenset(sizes)


def test_main_memory_is_what_is_allowed(ask: Ask) -> None:
    """Of a process that holds a gigabyte already."""
    for room, held in ((4 * BLOCK, [0, 1, 2, 3]), (4 * BLOCK - 1, [3]), (3 * BLOCK - 1, [])):
        found = ask(24 * GB, offload="target", max_memory=GB + LEAST_RESERVE + room)
        assert found is not None
        assert sorted(found.pinned) == held
    with pytest.raises(
        UsageError, match=r"^--max-memory must be at least 1\.07 GB, for blocks of the target on their way"
    ):
        ask(24 * GB, offload="target", max_memory=GB + LEAST_RESERVE + BLOCK)
    with pytest.raises(
        QuasarError, match=r"^Too little main memory is free: --max-memory must be at least 1\.07 GB, for"
    ):
        ask(24 * GB, main=LEAST_RESERVE, offload="target")


def test_too_little_of_a_gpu_is_refused(folder: Path, ask: Ask) -> None:
    least = whole_of(folder) - 2 * BLOCK + LEAST_SLACK
    assert ask(24 * GB, max_device_memory=least, max_context=128) is not None
    said = (
        r"--max-device-memory must be at least 0\.71\d? GB with a context of 128 tokens, even with the target's blocks"
    )
    with pytest.raises(UsageError, match=f"^{said}"):
        ask(24 * GB, max_device_memory=least - 1, max_context=128)
    with pytest.raises(QuasarError, match=rf"^The GPU has 0\.71\d? GB free, too little for the pair: {said}"):
        ask(least - 1, max_context=128)
    shorter = least - 100 * (whole_of(folder, 1) - whole_of(folder, 0))
    with pytest.raises(UsageError, match=r"streamed: --max-context 28 would fit, and --verify quantized --no-target"):
        ask(24 * GB, max_device_memory=shorter, max_context=128)


def test_what_cannot_be_is_refused(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"^--compress is for passes on the CPU: leave it out"):
        ask(24 * GB, offload="target", compress=True)
    assert ask(24 * GB, compress=True) is None  # all stays, and weights too, as they are
    with pytest.raises(UsageError, match="--max-device-memory streams what does not fit: leave --offload none out"):
        LoadOptions(offload="none", max_device_memory=1)
    with pytest.raises(UsageError, match="--max-device-memory must be more than nothing"):
        LoadOptions(max_device_memory=0)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(UsageError, match=r"^--offload target streams .*: nobody has tried it on AMD's GPUs\.$"):
        ask(24 * GB, offload="target")
    with pytest.raises(
        UsageError, match=r"^--max-device-memory streams blocks of our own decoder: nobody has tried it"
    ):
        ask(24 * GB, max_device_memory=GB)
    assert ask(GB // 2) is None  # which the check of what fits refuses


def test_a_pair_is_planned_before_it_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is planned is not checked to fit whole; a CPU has no memory of a GPU's."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (LEAST_SLACK + 25_000_000, 24 * GB))
    checkpoint = quantize_layers(folder, tmp_path / "verifier", lambda name: 8 if "_proj" in name else 16)
    numbers = load_pair._Numbers(GPU, BF16, 128, False, [])
    place = folder, checkpoint, numbers
    monkeypatch.setattr(load_pair, "require_room", lambda *given: pytest.fail("it was planned"))
    monkeypatch.setattr(device_offload, "budget_here", lambda allowed: None)
    notes, plan = load_pair._plan_memory(*place, LoadOptions(offload="target", max_device_memory=3 * GB), no_progress)
    assert notes == []
    assert isinstance(plan, DevicePlan)
    assert plan.pinned == plan.streamed.keys()
    assert not load_pair._rounds_head(LoadOptions(max_device_memory=3 * GB))
    monkeypatch.setattr(load_pair, "require_room", lambda *given: "memory: enough")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (24 * GB, 24 * GB))
    assert load_pair._plan_memory(*place, LoadOptions(), no_progress) == (["memory: enough"], None)
    on_cpu = folder, checkpoint, replace(numbers, device=CPU)
    with pytest.raises(
        UsageError, match=r"^--max-device-memory is for a GPU, and the device is cpu: see --max-memory\.$"
    ):
        load_pair._plan_memory(*on_cpu, LoadOptions(max_device_memory=GB), no_progress)


def no_progress(*given: object) -> None: ...


def test_a_planned_pair_is_loaded_and_described(folder: Path, tmp_path: Path) -> None:
    """On the CPU, in the place of a GPU: what stays, what moves, and how fast."""
    checkpoint = quantize_layers(folder, tmp_path / "verifier", lambda name: 8 if "_proj" in name else 16)
    movable = Movable(*movable_products(folder, checkpoint), FLOAT)
    need = pair_need(folder, checkpoint, FLOAT)
    assert need is not None
    budget = DeviceBudget(need.total(100) + LEAST_SLACK - 1, asked=True)
    plan = replace(plan_within_device(movable, need, 100, budget, moves_all=True), pinned=frozenset([1]))
    loaded = load_models(folder, checkpoint, CPU, FLOAT, offload=plan, kernel="dense")
    said = next(note for note in loaded.notes if note.startswith("offload:"))
    assert said.startswith(
        "offload: 0 of the target's 4 blocks stay in the GPU's memory, with all else and a cache of 100"
    )
    assert "; 4 are copied there, 3 of them from the disk, whenever it passes, 0.00334 GB in " in said
    target, verifier = loaded.target, loaded.verifier
    assert isinstance(target, LeanDecoder)
    assert isinstance(target.source, DeviceStream)
    assert target.streamed == "4 of 4 blocks, 3 from the disk"
    assert verifier is not None
    assert verifier.streamed is None
    whole = load_models(folder, None, CPU, FLOAT, compress=False).target
    assert whole is not None
    tokens = random_tokens(40)
    logits = [model.pass_prompt(tokens, model.new_cache(60), 16) for model in (target, whole)]
    torch.testing.assert_close(*logits)
    held = replace(plan, pinned=frozenset(range(4)))
    assert "; 4 are copied there whenever it passes, " in held.describe(target.source)
