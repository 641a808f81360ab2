"""What the command line's tests put in the place of models: a generator that answers at once, figures by hand."""

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from quasar_core.config import GenerationConfig
from quasar_core.records import Confirm, FidelityReport, GenerationResult, MarginTable, Stats, Step

MARGINS = MarginTable(edges=[0.5, 2.0], counts=[10, 20, 0], agreed=[5, 19, 0])
FIDELITY = FidelityReport("self", 30, 0.9471, 0.93, 0.9, 0.0412, 0.31, 5.123, 5.234, MARGINS)
STATS = Stats(
    new_tokens=7,
    prompt_tokens=4,
    prefill_tokens=1,
    step_log=[Step(4, 3), Step(0, 0)],
    confirm_log=[Confirm(6, 5)],
    prefill_s=0.1,
    decode_s=0.5,
    ttft_s=0.1,
    peak_memory_bytes=1_500_000,
)


class StandInGenerator:
    """Answers every prompt with `[bold]Hé` and the prompt's length, in two pieces."""

    resets = 0

    def __init__(self, pair: Any, config: GenerationConfig, progress: Any = None) -> None:
        self.pair, self.config = pair, config

    def reset(self) -> None:
        StandInGenerator.resets += 1

    def generate(self, prompt_ids: Sequence[int], on_text: Callable[[str], None]) -> GenerationResult:
        pieces = ["[bold]Hé", f" {len(prompt_ids)}"]
        if on_text is not None:
            for piece in pieces:
                on_text(piece)
        return GenerationResult(prompt_ids, [5, 6, 7], "".join(pieces), "eos", replace(STATS))


def encode(tokenizer: Any, messages: Any, *, raw: bool = False, think: bool | None = None) -> list[int]:
    """One token per character of the messages, and one more through the template."""
    if isinstance(messages, list):
        return [1] * sum(len(message["content"]) for message in messages)
    return [1] * (len(messages) + (0 if raw else 1))


def type_lines(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Make `text` the standard input."""
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
