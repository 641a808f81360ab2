"""Hears what `torch.cuda` is asked for, where there is none."""

from collections.abc import Callable
from typing import Any

import pytest
import torch


class Context:
    """Of a device or a stream."""

    def __init__(self, say: Callable[[str], None], given: Any) -> None:
        say(f"on {getattr(given, 'name', given)}")

    def __enter__(self) -> None: ...

    def __exit__(self, *given: Any) -> None: ...


class Stream:
    """Of the device's own, or the current one."""

    def __init__(self, say: Callable[[str], None], name: str) -> None:
        self._say, self.name = say, name

    def wait_event(self, event: Any) -> None:
        """Hear it."""
        self._say(f"{self.name} waits")


class Event:
    """That one stream records."""

    def __init__(self, say: Callable[[str], None], blocking: bool) -> None:
        assert blocking  # a host that waits leaves its core to others
        self._say = say

    def record(self, stream: Stream) -> None:
        """Hear it."""
        self._say(f"recorded in {stream.name}")


class Runtime:
    """Pins memory, or refuses to."""

    def __init__(self, say: Callable[[str], None], refused: int) -> None:
        def register(address: int, size: int, flags: int) -> int:
            say(f"registered {size}")
            return refused

        self.cudaHostRegister, self.cudaHostUnregister = register, lambda address: say("unregistered")


def hear_cuda(monkeypatch: pytest.MonkeyPatch, refused: int = 0) -> list[str]:
    """What is asked for from now on; `refused` is what pinning memory returns."""
    heard = list[str]()
    say = heard.append
    for name, found in {
        "Stream": lambda device: Stream(say, "own"),
        "current_stream": lambda device: Stream(say, "current"),
        "Event": lambda blocking: Event(say, blocking),
        "stream": lambda stream: Context(say, stream),
        "device": lambda device: Context(say, device),
        "synchronize": lambda device: say("synchronized"),
        "cudart": lambda: Runtime(say, refused),
    }.items():
        monkeypatch.setattr(torch.cuda, name, found)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: say(f"kept for {stream.name}"))
    return heard
