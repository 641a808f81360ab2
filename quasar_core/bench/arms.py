"""Arms: the ways of decoding that a bench sets side by side."""

from dataclasses import dataclass

from quasar_core.config import DraftKind, VerifyMode
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
        Arm("quasar", "quantized", "ngram"),
        Arm("exact", "exact", "ngram"),
        Arm("quantized-only", "quantized", "none"),
        Arm("transformers", "full", "none", is_peer=True),
        Arm("transformers-pld", "full", "ngram", is_peer=True),
    )
}
DEFAULT_ARMS = "vanilla,ngram,quasar,exact"


def parse_arms(names: str) -> list[Arm]:
    """The arms of a comma-separated list, each once, in its order."""
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    unknown = [name for name in wanted if name not in ARMS]
    if unknown or not wanted:
        raise UsageError(f"--arms must be a list of {', '.join(ARMS)}, not {', '.join(unknown) or 'empty'}.")
    return [ARMS[name] for name in wanted]
