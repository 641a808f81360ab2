"""Our proposer as vLLM calls it, in the place of which stands a module of the same names."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.copy_pair import pair_of, plain
from helpers.fake_vllm import FakeEngine, FakeGroup, config_of_vllm, put_in_place
from helpers.tiny_models import TableModel
from safetensors.torch import save_file

from quasar_core.deploy import vllm_proposer
from quasar_core.deploy.commands import PROPOSER
from quasar_core.deploy.vllm_proposer import VllmProposer
from quasar_core.errors import UsageError

TARGET = TableModel(17, seed=3)
SETTINGS = {"quasar": {"verifier": "copy", "window": 5}}


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[VllmProposer]:
    """Proposers of two ranks, loaded."""
    loaded: list[Any] = []

    def load(config: Any, verifier: str) -> Any:
        loaded.append(verifier)
        return pair_of(TARGET.disturbed(0.3))

    monkeypatch.setattr(vllm_proposer, "_load", load)
    monkeypatch.setattr(vllm_proposer, "_cost_ratio", lambda config, verifier: 4.0)
    sent: list[Any] = []
    proposers = []
    for rank in (0, 1):
        put_in_place(monkeypatch, FakeGroup(rank, sent))
        proposer = VllmProposer(config_of_vllm("target", SETTINGS, count=6, ranks=2))
        proposer.load_model(None)
        proposers.append(proposer)
    assert loaded == ["copy"], "the copy is held once"
    return proposers


def test_every_rank_has_the_same_drafts(ranks: list[VllmProposer]) -> None:
    def propose(*rows: Any) -> list[list[int]]:
        first, second = (proposer.propose(*rows, slot_mappings=None) for proposer in ranks)
        assert first == second
        return first

    engine = FakeEngine(TARGET, propose)
    requests = [([1, 2, 3], 30), ([4, 5], 20), ([1, 2, 3], 25)]
    found = engine.run(requests)
    assert [asked.answer for asked in found] == [plain(prompt, count) for prompt, count in requests]
    assert sum(asked.accepted for asked in found) > 10


def test_a_failure_of_the_first_rank_ends_the_others_too(
    ranks: list[VllmProposer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would wait for its drafts for good."""

    def fails(*rows: Any) -> Any:
        raise MemoryError("too little")

    monkeypatch.setattr(ranks[0]._batch, "propose", fails)
    rows = ([[7]], np.array([4]), np.array([[1, 2, 3, 7]]))
    with pytest.raises(MemoryError):
        ranks[0].propose(*rows)
    with pytest.raises(RuntimeError, match="MemoryError: too little"):
        ranks[1].propose(*rows)


def test_the_command_names_it() -> None:
    assert f"{VllmProposer.__module__}.{VllmProposer.__name__}" == PROPOSER


def test_odd_settings_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match="lacks quasar"):
        VllmProposer(config_of_vllm("target", {}))
    with pytest.raises(UsageError, match="--draft"):
        VllmProposer(config_of_vllm("target", {"quasar": {"verifier": "x", "draft": "nobody"}}))


def test_the_ratio_of_costs_is_that_of_the_weights_each_rank_reads(tmp_path: Path) -> None:
    sizes = {"target": 90_000, "copy": 15_000}
    for name, size in sizes.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        save_file({"weight": torch.zeros(size)}, tmp_path / name / "model.safetensors")
    config = config_of_vllm(str(tmp_path / "target"), {}, ranks=2)
    assert vllm_proposer._cost_ratio(config, str(tmp_path / "copy")) == pytest.approx(3.0, rel=0.02)


def test_rows_come_as_vllm_has_them(ranks: list[VllmProposer]) -> None:
    """Tokens as int32 in rows of the longest context, of which each row's length counts."""
    ids = np.full((4, 128), -1, dtype=np.int32)
    ids[0, :4] = [1, 2, 3, 7]
    drafts = ranks[0].propose([[7], []], np.array([4, 0, 9, 9], dtype=np.int32), ids)
    assert len(drafts) == 2
    assert drafts[1] == []
    assert all(isinstance(token, int) for token in drafts[0])
