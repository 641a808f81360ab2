"""The rules of recurrent layers in C++ (`kernels/cpu/recurrence.h`): over prompts, inside passes, and to go back.

A token leaves the same state to the last bit in each of the three. Letters: T tokens, C channels, K taps.
"""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from quasar_core.kernels.cpu import library as cpp
from quasar_core.models.config.recurrence import RecurrenceConfig
from quasar_core.models.recurrent.states import Inputs, State

KINDS = ("delta", "mamba", "conv")  # in the order of `recurrence.h`
DTYPES = (torch.bfloat16, torch.float32)


def why_not(shape: RecurrenceConfig) -> str | None:
    """Why the C++ does not run a rule, whatever the machine; None where it does."""
    if any(size % 16 for size in (shape.key_size, shape.value_size, shape.width)):
        return "sizes of heads of recurrent layers must be multiples of 16"
    return None


@dataclass(frozen=True)
class CompiledRule:
    """A rule whose weights stay where they are; its states and inputs are of one dtype."""

    shape: RecurrenceConfig
    described: cpp.Recurrence

    def __call__(self, state: State, inputs: Inputs) -> tuple[torch.Tensor, State]:
        """Over T tokens → outputs [T, values] in float32, without gates, and the state behind them."""
        count, channels, rates = len(inputs), inputs.channels.contiguous(), inputs.rates.contiguous()
        before, after = contiguous(state), empty_state(self.shape, channels.dtype)
        outputs = torch.empty(count, self.shape.values)
        place = place_of(before, after, Inputs(channels, rates))
        is_bfloat16, threads = int(channels.dtype == torch.bfloat16), torch.get_num_threads()
        run = cpp.library().quasar_recur
        run(ctypes.byref(self.described), is_bfloat16, count, ctypes.byref(place), outputs.data_ptr(), threads)
        return outputs, after


def describe(shape: RecurrenceConfig, eps: float, weights: Mapping[str, torch.Tensor | None]) -> cpp.Recurrence:
    """A rule by the names that its weights have there."""
    addresses = {name: None if weight is None else weight.data_ptr() for name, weight in weights.items()}
    sizes = {name: getattr(shape, name) for name in SIZES}
    return cpp.Recurrence(kind=KINDS.index(shape.kind), eps=eps, **sizes, **addresses)


SIZES = ("taps", "key_heads", "value_heads", "key_size", "value_size", "channels", "values")


def contiguous(state: State) -> State:
    """The state with its numbers one behind the other: that in front of a text takes no memory."""
    matrices = state.matrices
    return State(state.window.contiguous(), None if matrices is None else matrices.contiguous())


def empty_state(shape: RecurrenceConfig, dtype: torch.dtype) -> State:
    """Memory for a state."""
    window = torch.empty(shape.taps - 1, shape.channels, dtype=dtype)
    sizes = shape.value_heads, shape.key_size, shape.value_size
    return State(window, None if shape.kind == "conv" else torch.empty(*sizes))


def empty_inputs(shape: RecurrenceConfig, count: int, dtype: torch.dtype) -> Inputs:
    """Memory for what the rule reads of T tokens."""
    return Inputs(torch.empty(count, shape.channels, dtype=dtype), torch.empty(count, 2, shape.value_heads))


def place_of(before: State, after: State, inputs: Inputs) -> cpp.StatePlace:
    """Where the C++ finds a state and what is read, and where it leaves the state behind it."""
    return cpp.StatePlace(
        window=before.window.data_ptr(),
        matrices=None if before.matrices is None else before.matrices.data_ptr(),
        window_after=after.window.data_ptr(),
        matrices_after=None if after.matrices is None else after.matrices.data_ptr(),
        channels=inputs.channels.data_ptr(),
        rates=inputs.rates.data_ptr(),
    )
