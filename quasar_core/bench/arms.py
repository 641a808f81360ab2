"""Arms, the ways of decoding that a bench compares; and what one run is asked to do, the same for every arm."""

import hashlib
from dataclasses import dataclass, field
from typing import Literal

from quasar_core.bench.run_code import why_not as why_no_code
from quasar_core.config import Auto, DraftKind, GenerationConfig, SamplingConfig, VerifyMode
from quasar_core.errors import UsageError

Program = Literal["quasar", "transformers", "llama.cpp", "vllm"]


@dataclass(frozen=True)
class Arm:
    """A name for a verification mode with a drafter; of another program, which runs in a process of its own."""

    name: str
    verify: VerifyMode
    draft: DraftKind
    program: Program = "quasar"
    trees: bool = True

    @property
    def is_peer(self) -> bool:
        """Whether another program answers."""
        return self.program != "quasar"

    @property
    def needs_verifier(self) -> bool:
        """Whether the arm runs the low-bit copy."""
        return self.verify != "full"


BASELINE = "vanilla"
TWIN = "vanilla-again"  # asked beside vanilla: what differs between the two is the machine's noise
TWIN_EVERY = 4  # questions
ARMS = {
    arm.name: arm
    for arm in (
        Arm(BASELINE, "full", "none"),
        Arm("ngram", "full", "ngram"),
        Arm("full", "full", "auto"),
        Arm("quantized", "quantized", "auto"),
        Arm("exact", "exact", "auto"),
        Arm("gated", "gated", "auto"),
        Arm("suffix", "full", "suffix"),
        Arm("recycle", "full", "recycle"),
        Arm("recycle-chain", "full", "recycle", trees=False),
        Arm("assistant", "full", "assistant"),
        Arm("layer-skip", "full", "layer-skip"),
        Arm("mtp", "full", "mtp"),
        Arm("exact-mtp", "exact", "mtp"),
        Arm("quantized-ngram", "quantized", "ngram"),
        Arm("exact-ngram", "exact", "ngram"),
        Arm("quantized-only", "quantized", "none"),
        Arm(TWIN, "full", "none"),
        Arm("transformers", "full", "none", "transformers"),
        Arm("transformers-pld", "full", "ngram", "transformers"),
        Arm("transformers-assisted", "full", "none", "transformers"),
        Arm("llama.cpp", "full", "none", "llama.cpp"),
        Arm("llama.cpp-spec", "full", "ngram", "llama.cpp"),
        Arm("vllm", "full", "none", "vllm"),
        Arm("vllm-ngram", "full", "ngram", "vllm"),
        Arm("vllm-draft", "full", "none", "vllm"),
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
class PeerOptions:
    """What the peers are given: each field is the option of that name."""

    assistant: str | None = None  # transformers-assisted, vllm-draft: the folder of a small model
    gguf: str | None = None  # llama.cpp: the model's file
    llama_server: str | None = None  # llama.cpp: the program
    spec_type: str = "ngram-simple"  # llama.cpp-spec: as llama-server's --spec-type
    vllm_python: str | None = None  # vllm: the interpreter of the environment that it is installed in


@dataclass(frozen=True)
class BenchConfig:
    """Arms by name, lengths, sampling, repeats; checked once, in messages that name the flag."""

    arms: tuple[str, ...]
    temperatures: tuple[float, ...] = (0.0,)
    seed: int = 0
    limit: int | None = None
    repeats: int = 1
    max_new_tokens: int = 256
    num_draft_tokens: int | Auto = "auto"
    draft_from: tuple[str, ...] = ()
    window: int | Auto = "auto"
    ignore_eos: bool = False
    processors: bool = True
    fidelity: float = 0.999
    run_code: bool = False
    peers: PeerOptions = field(default_factory=PeerOptions)

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"--limit must be at least 1, not {self.limit}.")
        if not 1 <= self.repeats <= MOST_REPEATS:
            raise UsageError(f"--repeats must be from 1 to {MOST_REPEATS}, not {self.repeats}.")
        if not self.temperatures or len(set(self.temperatures)) < len(self.temperatures):
            raise UsageError("--temperature must be numbers, each once, separated by commas.")
        if self.run_code and (obstacle := why_no_code()):
            raise UsageError(f"--run-code cannot be: {obstacle}.")
        for arm in parse_arms(",".join(self.arms)):
            for temperature in self.temperatures:
                self.generation(arm, temperature)

    def generation(self, arm: Arm, temperature: float) -> GenerationConfig:
        """The generation that `arm` makes of this run's settings."""
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            verify=arm.verify,
            draft=arm.draft,
            trees=arm.trees,
            draft_from=self.draft_from if arm.draft not in ("none", "ngram") else (),
            num_draft_tokens=self.num_draft_tokens,
            window=self.window,
            sampling=SamplingConfig(temperature=temperature, seed=self.seed),
            ignore_eos=self.ignore_eos,
            processors=self.processors,
            fidelity=self.fidelity,
        )

    def seed_of(self, dataset: str, question_id: int | str, turn: int, repeat: int) -> int:
        """A seed below 2^31 of its own for each answer; every arm gets the same."""
        key = f"{self.seed}/{dataset}/{question_id}/{turn}/{repeat}"
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") >> 1
