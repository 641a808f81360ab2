"""Take from a part what may have ended it: each rung leaves out one more thing, and says so by a variable.

For a dry run a part can be made to crash, to hang, or to fail to compile at its first rungs, so that every rung is
walked without a GPU.
"""

import os
import signal
import time
from dataclasses import dataclass

FALL_BACKS = ("QUASAR_OVERLAP", "QUASAR_TUNE", "QUASAR_TRITON")  # one more is 0 at each rung
LAST = len(FALL_BACKS)


def variables(rung: int) -> dict[str, str]:
    """Of the environment at a rung; none at the first."""
    return dict.fromkeys(FALL_BACKS[:rung], "0")


def describe(rung: int) -> str:
    """What a rung leaves out."""
    return ", ".join(f"{name}=0" for name in FALL_BACKS[:rung]) or "nothing is left out"


@dataclass(frozen=True)
class Fault:
    """What is done to a part on purpose at its first rungs."""

    kind: str  # crash, hang or compile
    part: str
    rungs: int

    @classmethod
    def parse(cls, text: str) -> "Fault":
        """Such as crash:headline:2."""
        kind, part, rungs = text.split(":")
        if kind not in ("crash", "hang", "compile"):
            raise ValueError(f"a fault is crash, hang or compile, not {kind}")
        return cls(kind, part, int(rungs))

    def strike(self, part: str, rung: int) -> None:
        """Do it, where it is this part's turn."""
        if part != self.part or rung >= self.rungs:
            return
        if self.kind == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "compile":
            raise RuntimeError("PassManager::run failed")
        while True:
            time.sleep(1)
