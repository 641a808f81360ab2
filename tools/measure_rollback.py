"""Compare two ways to go back in a recurrent layer: a state kept for each position, and the rule run again.

`python -m tools.measure_rollback [--shape NAME] [--draft K] [--rounds N]`: bytes by shape, then for a layer of one
shape the seconds of a pass over K + 1 tokens, of copying a state for each of them, and of running the rule again over
those that stay where drafts are refused at a random place.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from quasar_core.models.config.recurrence import RecurrenceConfig
from quasar_core.models.recurrent.rules import Recurrence
from quasar_core.models.recurrent.states import LayerStates


def _delta(keys: int, values: int) -> RecurrenceConfig:
    return RecurrenceConfig("delta", 4, key_heads=keys, value_heads=values, key_size=128, value_size=128)


SHAPES = {  # recurrent layers, and one of them
    "qwen3.5-0.8b": (18, _delta(16, 16)),
    "qwen3.5-9b": (24, _delta(16, 32)),
    "qwen3.5-27b": (48, _delta(16, 48)),
}


def state_bytes(shape: RecurrenceConfig) -> tuple[int, int]:
    """Of a layer in bfloat16: a state, and what is kept of a token."""
    (window, matrices), (channels, rates) = shape.state_elements, shape.journal_elements
    return 2 * window + 4 * matrices, 2 * channels + 4 * rates


def measure(shape: RecurrenceConfig, draft: int, rounds: int) -> dict[str, float]:
    """Median seconds of a pass, of a state kept for each of its positions, and of going back by the rule."""
    rule = Recurrence(
        shape,
        1e-6,
        taps=torch.randn(shape.taps, shape.channels),
        fading=torch.zeros(shape.value_heads),
        step_bias=torch.zeros(shape.value_heads),
        norm=torch.ones(shape.value_size),
    )
    states = LayerStates(rule.empty(torch.device("cpu"), torch.bfloat16))
    count, place = draft + 1, random.Random(0)
    projected = torch.randn(count, shape.channels + shape.values, dtype=torch.bfloat16)
    rates = torch.randn(count, 2 * shape.value_heads, dtype=torch.bfloat16)
    found: dict[str, list[float]] = {"pass": [], "states": [], "again": []}
    for _ in range(rounds):
        found["pass"].append(_seconds(partial(rule, projected, rates, states, 0)))
        found["states"].append(_seconds(partial(_copies, states.at(count, rule.advance).matrices, count)))
        found["again"].append(_seconds(partial(states.at, place.randint(1, count - 1), rule.advance)))
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def _copies(matrices: torch.Tensor | None, count: int) -> list[torch.Tensor]:
    assert matrices is not None
    return [matrices.clone() for _ in range(count)]


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Print bytes of every shape, and the times of one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3.5-0.8b")
    parser.add_argument("--draft", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    for name, (layers, shape) in SHAPES.items():
        whole, token = (layers * size / 1e6 for size in state_bytes(shape))
        print(f"{name}: {layers} layers, a state {whole:.1f} MB, inputs of a token {token:.2f} MB")
    layers, shape = SHAPES[options.shape]
    with torch.inference_mode():
        seconds = measure(shape, options.draft, options.rounds)
    for name, value in seconds.items():
        print(f"{options.shape}, {options.draft} drafted, one layer, {name}: {value * 1e6:.0f} µs")


if __name__ == "__main__":
    main()
