"""What a bench run is asked to do: the same for every arm and question."""

import hashlib
from dataclasses import dataclass
from typing import Any

from quasar_core.bench.arms import Arm, parse_arms
from quasar_core.config import Auto, GenerationConfig, SamplingConfig
from quasar_core.errors import UsageError
from quasar_core.typed import build

MOST_REPEATS = 10_000

MOST_REPEATS = 1000  # every answer is scheduled before the first


@dataclass(frozen=True)
class BenchConfig:
    """Arms by name, lengths, sampling, repeats; checked once, in messages that name the flag."""

    arms: tuple[str, ...]
    temperature: float = 0.0
    seed: int = 0
    limit: int | None = None
    repeats: int = 1
    max_new_tokens: int = 256
    num_draft_tokens: int | Auto = "auto"
    window: int | Auto = "auto"
    ignore_eos: bool = False
    processors: bool = True

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"--limit must be at least 1, not {self.limit}.")
        if not 1 <= self.repeats <= MOST_REPEATS:
            raise UsageError(f"--repeats must be from 1 to {MOST_REPEATS}, not {self.repeats}.")
        for arm in parse_arms(",".join(self.arms)):
            self.generation(arm, self.seed)

    def generation(self, arm: Arm, seed: int) -> GenerationConfig:
        """The generation that `arm` makes of this run's settings."""
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            verify=arm.verify,
            draft=arm.draft,
            num_draft_tokens=self.num_draft_tokens,
            window=self.window,
            sampling=SamplingConfig(temperature=self.temperature, seed=seed),
            ignore_eos=self.ignore_eos,
            processors=self.processors,
        )

    def seed_of(self, dataset: str, question_id: int | str, turn: int, repeat: int) -> int:
        """A seed below 2^31 of its own for each answer; every arm gets the same."""
        key = f"{self.seed}/{dataset}/{question_id}/{turn}/{repeat}"
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") >> 1

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "BenchConfig":
        """Rebuild from its JSON form; ValueError for what does not fit."""
        return build(cls, content)
