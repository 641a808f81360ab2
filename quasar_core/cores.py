"""Count the cores on which a pass is fastest: where a system tells fast cores from efficient ones, those are left out.

A pass's work is shared evenly, so it lasts as long as the slowest of its cores takes. Threads are bound to no core: the
system puts busy ones on fast cores by itself.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from quasar_core.system import usable_cores

CORES = Path("/sys/devices/system/cpu")  # of Linux
FAST_CORES = Path("/sys/devices/cpu_core/cpus")  # of Intel's processors with cores of two kinds


def fast_cores() -> int | None:
    """How many of the cores that this process may use to compute on; None where the system tells no kinds apart."""
    if sys.platform == "darwin":
        return _of_mac()
    return _of_linux(usable_cores(), CORES, FAST_CORES)


def physical_cores(logical: set[int], folder: Path = CORES) -> int:
    """How many cores these are, where several may be threads of one."""
    return len({_siblings(core, folder) for core in logical})


def most_even(capacities: Sequence[int]) -> int:
    """How many cores of these capacities to use, the fastest first: number × slowest is greatest."""
    falling = sorted(capacities, reverse=True)
    return max(range(1, len(falling) + 1), key=lambda count: (count * falling[count - 1], -count))


def _of_linux(usable: set[int], folder: Path, fast: Path) -> int | None:
    try:
        of_kind = usable & parse_list(fast.read_text("ascii"))
        return physical_cores(of_kind, folder) or None
    except (OSError, ValueError):
        pass  # not a processor of that kind: the next question is for all others
    try:
        each = {_siblings(core, folder): int(_text(core, folder, "cpu_capacity")) for core in usable}
    except (OSError, ValueError):
        return None
    return most_even(list(each.values())) if len(set(each.values())) > 1 else None


def _of_mac() -> int | None:
    """Apple's processors: level 0 of performance holds the fast cores."""
    command = ["sysctl", "-n", "hw.perflevel0.physicalcpu"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) or None
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None


def parse_list(text: str) -> set[int]:
    """The numbers of a list such as 0-3,8; ValueError where it is none."""
    ends = [part.partition("-")[::2] for part in text.strip().split(",") if part]
    return {number for first, last in ends for number in range(int(first), int(last or first) + 1)}


def _siblings(core: int, folder: Path) -> frozenset[int]:
    """The logical cores of one physical core; the core alone where the system does not tell."""
    try:
        return frozenset(parse_list(_text(core, folder, "topology/thread_siblings_list"))) or frozenset({core})
    except (OSError, ValueError):
        return frozenset({core})


def _text(core: int, folder: Path, name: str) -> str:
    return (folder / f"cpu{core}" / name).read_text("ascii")
