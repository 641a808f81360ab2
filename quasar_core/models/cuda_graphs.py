"""Launches recorded once and replayed: a CUDA graph costs one launch where a pass would cost hundreds.

A graph holds the addresses that it was recorded with. Whatever a launch allocates comes from one pool that all graphs
of a device share: graphs run one after the other, and what a graph leaves behind is copied out of the pool by its last
step, so any of them may write where another one has. On other devices the same interface launches plainly.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch

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
    with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool):
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
