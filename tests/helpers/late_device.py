"""A device that does what it was asked for late: at random moments, or not before somebody waits for it.

Its products are computed at once, on the CPU, but count as under way until the device has come as far as an event that
was recorded behind them. What it does wrong is what a real device would do if the schedule let it: a copy into a buffer
that is still read, a product of weights whose copy nobody has waited for. A copy that lands late lands with what its
source then holds, and what lies in a buffer until then is no number.
"""

import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from quasar_core.models.cuda import torch_steps
from quasar_core.models.decoder import layer as decoder_layer
from quasar_core.models.weights.device_queues import Link

Linear = Callable[..., torch.Tensor]
COPIES_LATE, COMPUTES_LATE, AT_RANDOM = "copies late", "computes late", "at random"
CHARACTERS = (COPIES_LATE, COMPUTES_LATE, AT_RANDOM)


@dataclass
class LateDevice:
    """Both queues, and what has been done of them."""

    character: str = AT_RANDOM
    seed: int = 0
    wrong: list[str] = field(default_factory=list)
    copies: int = 0  # asked for

    def __post_init__(self) -> None:
        self.random, self.lock = random.Random(self.seed), threading.RLock()
        self.asked = self.done = 0  # steps of computing: asked for, and ended
        self.waiting = deque[tuple[str, Any]]()  # of the queue that copies
        self.recorded = self.reached = 0  # its events: asked for, and reached
        self.seen = 0  # the last of them that computing waits for
        self.buffers = dict[int, int]()  # bytes by address
        self.copied_in = dict[int, int]()  # the event behind the last copy into a buffer
        self.read_in = dict[int, int]()  # the step in which a buffer is read

    def link(self, pinned: frozenset[int] = frozenset()) -> Link:
        """To it."""
        return Link(Computing(self), Copying(self), lambda memory: lambda: None, pinned)

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> "LateDevice":
        """See which weights are multiplied."""
        for module in (decoder_layer, torch_steps):
            monkeypatch.setattr(module, "linear", self._watched(torch.nn.functional.linear))
        return self

    def tick(self) -> None:
        """Let some time pass."""
        if self.character == AT_RANDOM:
            self.done = self.random.randint(self.done, self.asked)
        most = {COPIES_LATE: 0, COMPUTES_LATE: 1000, AT_RANDOM: self.random.randint(0, 3)}[self.character]
        while most and self.waiting and not self._is_held_up():
            self._do_next()
            most -= 1

    def reach(self, event: int) -> None:
        """Do all that stands before an event of the copies; what holds it up is computed."""
        while self.reached < event:
            if self._is_held_up():
                self.done = self.waiting[0][1]
            self._do_next()

    def _is_held_up(self) -> bool:
        what, step = self.waiting[0]
        return what == "wait" and step > self.done

    def _do_next(self) -> None:
        what, given = self.waiting.popleft()
        if what == "record":
            self.reached = given
        elif what == "copy":
            place, source = given
            if self.read_in.get(place.data_ptr(), 0) > self.done:
                self.wrong.append("a copy came into a buffer that was still read")
            place.copy_(source)

    def _watched(self, linear: Linear) -> Linear:
        def watched(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            self._multiply(weight.data_ptr())
            return linear(x, weight, bias)

        return watched

    def _multiply(self, address: int) -> None:
        with self.lock:
            self.tick()
            for buffer, size in self.buffers.items():
                if buffer <= address < buffer + size:
                    self.read_in[buffer] = self.asked + 1  # which ends with the next event
                    if self.copied_in[buffer] > self.seen:
                        self.wrong.append("weights were multiplied before their copy was waited for")


@dataclass
class Computing:
    """Implements `Queue`."""

    device: LateDevice

    def copy(self, place: torch.Tensor, source: torch.Tensor) -> None:
        """No weights are copied by the queue that computes."""
        raise AssertionError

    def record(self) -> "Reached":
        """See `Queue`."""
        with self.device.lock:
            self.device.asked += 1
            self.device.tick()
            return Reached(self.device, self.device.asked, of_copies=False)

    def wait(self, event: "Reached") -> None:
        """See `Queue`."""
        with self.device.lock:
            assert event.of_copies
            self.device.reach(event.number)
            self.device.seen = max(self.device.seen, event.number)


@dataclass
class Copying:
    """Implements `Queue`."""

    device: LateDevice

    @torch.inference_mode()
    def copy(self, place: torch.Tensor, source: torch.Tensor) -> None:
        """See `Queue`."""
        device = self.device
        with device.lock:
            device.copies += 1
            device.buffers[place.data_ptr()] = max(place.nbytes, device.buffers.get(place.data_ptr(), 0))
            device.copied_in[place.data_ptr()] = device.recorded + 1
            place.fill_(255)
            device.waiting.append(("copy", (place, source)))
            device.tick()

    def record(self) -> "Reached":
        """See `Queue`."""
        with self.device.lock:
            self.device.recorded += 1
            self.device.waiting.append(("record", self.device.recorded))
            return Reached(self.device, self.device.recorded, of_copies=True)

    def wait(self, event: "Reached") -> None:
        """See `Queue`."""
        with self.device.lock:
            assert not event.of_copies
            self.device.waiting.append(("wait", event.number))


@dataclass
class Reached:
    """Implements `Event`."""

    device: LateDevice
    number: int
    of_copies: bool

    def synchronize(self) -> None:
        """See `Event`."""
        with self.device.lock:
            assert self.of_copies
            self.device.reach(self.number)
            if threading.current_thread() is threading.main_thread():  # which asks for all that is computed
                self.device.seen = max(self.device.seen, self.number)
