"""Which blocks are streamed: the fewest that make a pair fit, spread evenly, and never what the verifier needs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.decoder_cases import CASES, CPU, save_model
from helpers.quantized_decoder import quantize_layers
from hypothesis import given
from hypothesis import strategies as st

from quasar_core.errors import UsageError
from quasar_core.models.loading import load_models
from quasar_core.models.memory import offload
from quasar_core.models.memory.estimate import MemoryNeed, pair_need
from quasar_core.models.memory.offload import (
    LEAST_RESERVE,
    Budget,
    Movable,
    OffloadPlan,
    budget_here,
    fewest_to_move,
    movable_products,
    plan_all,
    plan_to_fit,
    plan_within,
    saved_bytes,
)

BF16 = torch.bfloat16


@given(st.dictionaries(st.integers(0, 99), st.integers(1, 50), min_size=1), st.integers(1, 3000))
def test_one_block_less_would_not_do(sizes: dict[int, int], excess: int) -> None:
    moved = fewest_to_move(sizes, excess)
    assert moved == sorted(set(moved))
    assert set(moved) <= sizes.keys()
    if saved_bytes(sizes, moved) < excess:
        assert moved == sorted(sizes)
    if len(set(sizes.values())) == 1 and len(moved) > 1:
        assert saved_bytes(sizes, moved[:-1]) < excess


def test_moved_blocks_are_spread_evenly() -> None:
    assert fewest_to_move(dict.fromkeys(range(12), 10), 20) == [0, 3, 6, 9]
    assert fewest_to_move(dict.fromkeys(range(12), 10), 100) == list(range(12))
    assert fewest_to_move(dict.fromkeys(range(12), 10), 1000) == list(range(12))


def plan(tmp_path: Path, room: int, asked: bool = True) -> OffloadPlan | None:
    need = pair_need(tmp_path, None, BF16)
    assert need is not None
    return plan_to_fit(Movable(*movable_products(tmp_path, None), BF16), need, 100, Budget(room + LEAST_RESERVE, asked))


def test_what_fits_stays_and_what_does_not_moves(tmp_path: Path) -> None:
    save_model(tmp_path, *CASES["llama"])
    need = pair_need(tmp_path, None, BF16)
    assert need is not None
    whole, block = need.total(100), 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)
    assert plan(tmp_path, whole) is None
    for less, moved, held in ((1, [0, 1, 2], whole - block), (block + 1, [0, 1, 2, 3], whole - 2 * block)):
        found = plan(tmp_path, whole - less)
        assert found is not None
        assert (sorted(found.streamed), found.held) == (moved, held)
        assert found.held <= whole - less


def test_too_little_memory_is_refused_where_it_was_asked_for(tmp_path: Path) -> None:
    save_model(tmp_path, *CASES["llama"])
    with pytest.raises(UsageError, match=r"^--max-memory must be at least .* GB with a context of 100 tokens, even"):
        plan(tmp_path, 1000)
    estimated = plan(tmp_path, 1000, asked=False)
    assert estimated is not None
    assert len(estimated.streamed) == 4


def test_how_long_a_text_fits_is_told(tmp_path: Path) -> None:
    """With a room for 100 tokens beside all streamed blocks; what is told fits, and a token more does not."""
    save_model(tmp_path, *CASES["llama"])
    need = pair_need(tmp_path, None, BF16)
    assert need is not None
    movable = Movable(*movable_products(tmp_path, None), BF16)
    budget = Budget(plan_all(movable, need, 100).held + LEAST_RESERVE, asked=True)
    found = plan_within(movable, need, 60, budget, moves_all=False)
    assert found is not None
    assert (found.tokens, found.longest, len(found.streamed)) == (60, 100, 4)
    assert found.spare == 40 * need.per_token
    assert plan_within(movable, need, 100, budget, moves_all=False) is not None
    with pytest.raises(
        UsageError, match=r"with a context of 101 tokens, .* streamed: --max-context 100 would fit, and"
    ):
        plan_within(movable, need, 101, budget, moves_all=False)
    with pytest.raises(UsageError, match=r"streamed: no text would fit; --verify quantized --no-target takes less\.$"):
        plan_within(movable, need, 101, Budget(LEAST_RESERVE, asked=True), moves_all=False)
    target = load_models(tmp_path, None, CPU, BF16, offload=found).target
    assert target is not None
    said = found.describe(target.source)
    assert "with all else and a cache of 60 tokens" in said
    assert said.endswith("; memory holds texts of up to 100 tokens (--max-context)")
    assert found.within(101) == found
    assert "memory holds" not in found.within(100).describe(target.source)


def test_a_budget_counts_what_the_process_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "own_memory", lambda: 300)
    for free, most, expected in (
        (None, None, None),
        (500, None, Budget(500, False)),
        (500, 700, Budget(400, True)),
        (500, 900, Budget(500, True)),
        (None, 700, Budget(400, True)),
    ):
        monkeypatch.setattr(offload, "free_memory", lambda free=free: free)
        assert budget_here(most) == expected


PEAK = """
import sys
from pathlib import Path
import torch
from quasar_core.config import LoadOptions
from quasar_core.models.loading import load_models
from quasar_core.models.memory.offload import plan_offload
from quasar_core.system import own_memory
folder, place = Path(sys.argv[1]), (torch.device("cpu"), torch.bfloat16)
most = own_memory() + int(sys.argv[2])
plan = plan_offload(folder, None, torch.bfloat16, 256, LoadOptions(verify="full", max_memory=most))
target = load_models(folder, None, *place, offload=plan).target
cache = target.new_cache(256)
target.pass_prompt([i % 90 for i in range(100)], cache, 64)
for token in range(8):
    target.choose([token], cache)
status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
peak = 1024 * int(status["VmHWM"].split()[0])  # getrusage counts the program that started this one too
print(len(plan.streamed), plan.count, most - peak)
"""


@pytest.mark.machine
def test_the_process_stays_within_what_was_allowed(tmp_path: Path) -> None:
    """Its peak, as the kernel counts it; without blocks that move it would be beyond."""
    size = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16}
    save_model(tmp_path, "Llama", {**size, "num_key_value_heads": 16}).to(BF16).save_pretrained(tmp_path)
    need = pair_need(tmp_path, None, BF16)
    assert need is not None
    room = need.total(256) - 150_000_000 + LEAST_RESERVE
    command = [sys.executable, "-c", PEAK, str(tmp_path), str(room)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    moved, count, left = map(int, done.stdout.split())
    assert 4 < moved < count
    assert left > 0


def test_all_that_can_move_moves_when_asked(tmp_path: Path) -> None:
    save_model(tmp_path, *CASES["llama"])
    checkpoint = quantize_layers(tmp_path, tmp_path / "verifier", lambda name: 16 if "layers.2" in name else 8)
    need = MemoryNeed(1_000_000, 100, 10, 1)
    asked = plan_all(Movable(*movable_products(tmp_path, checkpoint), BF16), need, 5)
    assert (sorted(asked.streamed), asked.count) == ([0, 1, 3], 4)
    loaded = load_models(tmp_path, checkpoint, CPU, BF16, offload=asked)
    said = next(note for note in loaded.notes if note.startswith("offload:"))
    assert said.startswith("offload: 1 of the target's 4 blocks stay in memory, with all else 0.000939 GB; 3 are read")
    assert loaded.target is not None
    assert loaded.target.streamed == "3 of 4 blocks"
    assert loaded.verifier is not None
    assert loaded.verifier.streamed is None
