"""In the place of vLLM: an engine that decodes a batch with a target and checks drafts, and the modules it would have.

Rows change places, prompts come in pieces, and requests end and begin, as in vLLM's own batches.
"""

import random
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from quasar_core.models.base import NO_TOKEN, CausalLM

Propose = Callable[[list[list[int]], Any, Any], list[list[int]]]


@dataclass
class Asked:
    """A request: its text so far, how long it is to become, the drafts for its next pass."""

    prompt: list[int]
    count: int
    tokens: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    accepted: int = 0
    steps: int = 0

    @property
    def answer(self) -> list[int]:
        return self.tokens[len(self.prompt) :][: self.count]


class FakeEngine:
    """Decodes greedily with `target`; `most` rows at once, in an order that changes; `cut` drafts are checked."""

    def __init__(
        self, target: CausalLM, propose: Propose, seed: int = 0, most: int = 4, cut: int | None = None
    ) -> None:
        self.target, self.propose, self.most, self.cut = target, propose, most, cut
        self.luck = random.Random(seed)
        self.drafted: list[list[list[int]]] = []

    def run(self, requests: Sequence[tuple[list[int], int]]) -> list[Asked]:
        """Serve all requests; a few of them at a time."""
        waiting = [Asked(list(prompt), count, list(prompt)) for prompt, count in requests]
        everything, running = list(waiting), list[Asked]()
        while waiting or running:
            while waiting and len(running) < self.most:
                running.append(waiting.pop(0))
            self.luck.shuffle(running)
            self._step(running)
            running = [asked for asked in running if len(asked.answer) < asked.count]
        return everything

    def _step(self, rows: list[Asked]) -> None:
        sampled = []
        for asked in rows:
            if not asked.steps and self.luck.random() < 0.3:  # in the middle of its prompt
                sampled.append([])
                continue
            sampled.append(self._pass(asked))
        ids = np.full((len(rows), 1 + max(len(asked.tokens) for asked in rows)), -7, dtype=np.int32)
        for row, asked in enumerate(rows):
            ids[row, : len(asked.tokens)] = asked.tokens
        lengths = np.array([len(asked.tokens) for asked in rows])
        drafts = self.propose(sampled, lengths, ids)
        self.drafted.append(drafts)
        for asked, draft, new in zip(rows, drafts, sampled, strict=True):
            assert new or not draft, "a row in the middle of its prompt got a draft"
            asked.drafts = draft[: self.cut]

    def _pass(self, asked: Asked) -> list[int]:
        tokens = [*asked.tokens, *asked.drafts]
        choices = self.target.choose(tokens, self.target.new_cache(len(tokens)))
        own = choices.tokens[len(asked.tokens) - 1 :]
        accepted = 0
        while accepted < len(asked.drafts) and asked.drafts[accepted] == own[accepted]:
            accepted += 1
        new = own[: accepted + 1]
        assert NO_TOKEN not in new
        asked.accepted += accepted
        asked.steps += 1
        asked.tokens += new
        asked.drafts = []
        return new


class FakeGroup:
    """The ranks of a tensor-parallel group: what the first one sends, the others get."""

    def __init__(self, rank: int, sent: list[Any]) -> None:
        self.rank_in_group, self.local_rank, self._sent = rank, rank, sent

    def broadcast_object(self, content: Any = None, src: int = 0) -> Any:
        assert src == 0
        if self.rank_in_group == 0:
            self._sent.append(content)
        return self._sent[-1]


def put_in_place(monkeypatch: pytest.MonkeyPatch, group: FakeGroup) -> None:
    """Let `vllm.distributed.parallel_state` be importable, and answer with this group."""
    state = types.ModuleType("vllm.distributed.parallel_state")
    state.get_tp_group = state.get_world_group = lambda: group  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.distributed"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, state.__name__, state)


def config_of_vllm(model: str, additional: Any, count: int = 8, ranks: int = 1) -> Any:
    """What a proposer reads of vLLM's config."""
    space = types.SimpleNamespace
    return space(
        additional_config=additional,
        speculative_config=space(num_speculative_tokens=count),
        model_config=space(model=model, max_model_len=128),
        parallel_config=space(tensor_parallel_size=ranks),
        device_config=space(device=space(type="cpu")),
    )
