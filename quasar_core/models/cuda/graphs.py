"""Record launches once and replay them as CUDA graphs, with one small copy each way between host and device.

A graph holds the addresses that it was recorded with, so the buffers of its inputs and outputs stay where they are.
Whatever a launch allocates comes from one pool that all graphs of a device share: graphs run one after the other, and
a graph's last step copies its results out of the pool. On other devices the same interface launches plainly. Letters:
T tokens of a pass, L the most of them.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch

from quasar_core.models.base import MOST_LIKELIEST, Choices, check_likeliest, depths_of

LONGEST_TREE = 16  # nodes: the tokens of one launch of attention


@dataclass(frozen=True)
class GreedyOutput:
    """What a pass chose greedily, on the device: views of one buffer, of a pass's first T tokens or of all L."""

    tokens: torch.Tensor  # [T] int64: the best of each row of logits, or `NO_TOKEN`
    best: torch.Tensor  # [T] float32: its logit
    second: torch.Tensor  # [T] float32: the next logit
    accepted: torch.Tensor  # [1] int64: drafted tokens that the choices confirm
    likeliest: torch.Tensor  # [T, MOST_LIKELIEST] int32: as `Choices` has them, where they were asked for

    def first(self, count: int) -> "GreedyOutput":
        """The views of the first `count` tokens."""
        likeliest = self.likeliest[:count]
        return GreedyOutput(self.tokens[:count], self.best[:count], self.second[:count], self.accepted, likeliest)


@dataclass(frozen=True)
class TreeInputs:
    """What a pass is told of each node of a tree, on the device."""

    depths: torch.Tensor  # [T] int64: how far below the first it stands
    families: torch.Tensor  # [T] int64: bit i is set where node i is an ancestor of it, or itself

    def first(self, count: int) -> "TreeInputs":
        """The views of the first `count` nodes."""
        return TreeInputs(self.depths[:count], self.families[:count])


def describe_tree(parents: Sequence[int], filled: int) -> list[int]:
    """The depths, then the families, of a tree's nodes and of `filled` more, each of which sees itself alone."""
    families: list[int] = []
    for node, parent in enumerate(parents):
        families.append((families[parent] if parent >= 0 else 0) | 1 << node)
    count = len(parents)
    return [*depths_of(parents), *[0] * filled, *families, *(1 << node for node in range(count, count + filled))]


class PinnedBuffers:
    """A pass's inputs and outputs on the device, with pinned buffers on the host to copy them from and to.

    Position, number of drafted tokens and tokens go in; choices, their logits and what they confirm come out.
    """

    def __init__(self, longest: int, device: torch.device) -> None:
        self._longest = longest
        on_cuda = device.type == "cuda"
        self._in = torch.zeros(2 + longest + 2 * LONGEST_TREE, dtype=torch.int64, device=device)
        words = 2 * longest + 1 + longest * MOST_LIKELIEST // 2
        self._out = torch.zeros(words, dtype=torch.int64, device=device)
        self._host_in = torch.zeros(len(self._in), dtype=torch.int64, pin_memory=on_cuda)
        self._host_out = torch.zeros(words, dtype=torch.int64, pin_memory=on_cuda)
        self._fetched = torch.cuda.Event() if on_cuda else None
        self.position, self.drafted, self.tokens = self._in[:1], self._in[1:2], self._in[2 : 2 + longest]
        logits = self._out[longest : 2 * longest].view(torch.float32)
        accepted, likeliest = self._out[2 * longest : 2 * longest + 1], self._out[2 * longest + 1 :].view(torch.int32)
        self.output = GreedyOutput(
            self._out[:longest], logits[:longest], logits[longest:], accepted, likeliest.view(longest, MOST_LIKELIEST)
        )

    def tree(self, count: int) -> TreeInputs:
        """Where a tree of so many nodes is told of, behind its tokens."""
        told = self._in[2 + count :]
        return TreeInputs(told[:count], told[count : 2 * count])

    def send(self, position: int, tokens: Sequence[int], filled: int, parents: Sequence[int] | None = None) -> None:
        """Copy to the device where the pass stands and its tokens, the first not drafted, and `filled` more as padding.

        Waits only for the last copy from the buffer, which is written over.
        """
        if self._fetched:
            self._fetched.synchronize()
        words = [position, len(tokens) - 1, *tokens, *[tokens[-1]] * filled]
        if parents is not None:
            words += describe_tree(parents, filled)
        self._host_in.numpy()[: len(words)] = words
        self._in[: len(words)].copy_(self._host_in[: len(words)], non_blocking=True)
        if self._fetched:
            self._fetched.record(torch.cuda.current_stream(self._in.device))

    def fetch(self, count: int, likeliest: int = 0, is_tree: bool = False) -> Choices:
        """Copy to the host what the pass chose at its first `count` tokens; here the host waits for the device.

        What it counted is of tokens one behind the other: of a tree nothing.
        """
        check_likeliest(likeliest)
        self._host_out.copy_(self._out)
        words, longest = self._host_out.numpy(), self._longest
        best, second = words[longest : 2 * longest].view("float32").reshape(2, longest)[:, :count]
        with np.errstate(invalid="ignore"):  # of two infinities
            margins = (best - second).tolist()
        rows = words[2 * longest + 1 :].view("int32").reshape(longest, MOST_LIKELIEST)[:count, :likeliest]
        accepted = None if is_tree else int(words[2 * longest])
        return Choices(words[:count].tolist(), margins, accepted, rows.tolist() if likeliest else [])


class Timing:
    """How long the device takes from here to `end`; measured on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        if self._events:
            self._events[0].record()

    def end(self) -> None:
        """Behind the last launch."""
        if self._events:
            self._events[1].record()

    @property
    def seconds(self) -> float:
        """Once the device is done; 0 where nothing is measured."""
        return self._events[0].elapsed_time(self._events[1]) / 1000 if self._events else 0.0


Launch = Callable[[], Any]  # reads and writes tensors that outlive it; waits for nothing


class Launcher(Protocol):
    """Runs launches, each kind of them many times."""

    def run(self, owner: Any, kind: Hashable, launch: Launch) -> None:
        """Run `launch`; those of one `owner` and `kind` must do the same on the same tensors, which stay alive."""
        ...


class PlainLauncher:
    """Launches every time."""

    def run(self, owner: Any, kind: Hashable, launch: Launch) -> None:
        """See `Launcher`."""
        launch()


class GraphLauncher:
    """The first launch of a kind runs plainly, so that kernels are compiled and chosen, and is then recorded.

    An owner's graphs are let go of with it: they hold the addresses of its tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._graphs: WeakKeyDictionary[Any, dict[Hashable, Any]] = WeakKeyDictionary()

    def run(self, owner: Any, kind: Hashable, launch: Launch) -> None:
        """See `Launcher`."""
        graphs = self._graphs.setdefault(owner, {})
        if kind in graphs:
            graphs[kind].replay()
        else:
            launch()
            graphs[kind] = record(launch, self.device)


def record(launch: Launch, device: torch.device) -> Any:
    """The CUDA graph of a launch that has run before; recording does not run it."""
    return _record(launch, device, _pool_keeper(device).pool())


def _record(launch: Launch, device: torch.device, pool: Any) -> Any:
    graph = torch.cuda.CUDAGraph()
    alone = "thread_local"  # another thread may have weights copied meanwhile (`device_stream.py`)
    with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, capture_error_mode=alone):
        launch()
    return graph


@functools.cache
def _pool_keeper(device: torch.device) -> Any:
    """The first graph of a device, which does next to nothing: its pool must not be given up between the others."""
    word = torch.zeros(1, device=device)
    return _record(word.zero_, device, pool=None)


def launcher(device: torch.device) -> Launcher:
    """Graphs on CUDA, plain launches elsewhere."""
    return GraphLauncher(device) if device.type == "cuda" else PlainLauncher()
