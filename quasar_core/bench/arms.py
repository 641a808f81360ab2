"""Arms, the ways of decoding that a bench compares; and what one run is asked to do, the same for every arm."""

import hashlib
from dataclasses import dataclass

from quasar_core.config import Auto, DraftKind, GenerationConfig, SamplingConfig, VerifyMode
from quasar_core.errors import UsageError


@dataclass(frozen=True)
class Arm:
    """A name for a verification mode with a drafter; a peer is run by transformers' `generate`."""

    name: str
    verify: VerifyMode
    draft: DraftKind
    is_peer: bool = False

    @property
    def needs_verifier(self) -> bool:
        """Whether the arm runs the low-bit copy."""
        return self.verify != "full"


BASELINE = "vanilla"
ARMS = {
    arm.name: arm
    for arm in (
        Arm(BASELINE, "full", "none"),
        Arm("ngram", "full", "ngram"),
        Arm("full", "full", "auto"),
        Arm("quantized", "quantized", "auto"),
        Arm("exact", "exact", "auto"),
        Arm("suffix", "full", "suffix"),
        Arm("quantized-ngram", "quantized", "ngram"),
        Arm("exact-ngram", "exact", "ngram"),
        Arm("quantized-only", "quantized", "none"),
        Arm("transformers", "full", "none", is_peer=True),
        Arm("transformers-pld", "full", "ngram", is_peer=True),
    )
}
FORMER_NAMES = {"quasar": "quantized"}  # arms as older result files name them
DEFAULT_ARMS = "vanilla,ngram,quantized,exact"


def parse_arms(names: str) -> list[Arm]:
    """The arms of a comma-separated list, each once, in its order."""
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    unknown = [name for name in wanted if name not in ARMS]
    if unknown or not wanted:
        raise UsageError(f"--arms must be a list of {', '.join(ARMS)}, not {', '.join(unknown) or 'empty'}.")
    return [ARMS[name] for name in wanted]


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
    draft_from: tuple[str, ...] = ()
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
            draft_from=self.draft_from if arm.draft not in ("none", "ngram") else (),
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
