"""Ask the system for its processor, free memory and disk, how busy other programs keep it, and what versions run."""

import os
import platform
import shutil
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar

from quasar_core.errors import QuasarError
from quasar_core.files import exists

CPU_INFO, STAT = Path("/proc/cpuinfo"), Path("/proc/stat")
CPU_FOLDERS = Path("/sys/devices/system/cpu")
MEMORY_INFO, OWN_GROUPS, GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
OWN_SIZES = Path("/proc/self/statm")
# Of a control group: its limit, what it holds of that, and what of this are files' pages that the system may drop.
VERSION_1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
VERSION_2 = "memory.max", "memory.current", "inactive_file"

# Packages that change what is computed.
PACKAGES = ("quasar-cli", "torch", "transformers", "safetensors")

# Other programs that take more than this share of the cores disturb what is timed.
BUSY = 0.1
# The system counts in ticks of 1 to 10 ms: shorter times than this say little.
SHORTEST = 0.2  # seconds


@dataclass(frozen=True)
class Usage:
    """Core-seconds of the cores that this process may use: in all, worked, and worked by this process."""

    at: float
    there: float
    worked: float
    own: float


@dataclass(frozen=True)
class Load:
    """The share of the cores that other programs took, a hypervisor included; None where the system does not tell."""

    others: float | None

    @property
    def is_busy(self) -> bool:
        """Whether what was timed meanwhile is not to be trusted."""
        return self.others is not None and self.others > BUSY

    def describe(self) -> str:
        """The load in words, such as "other programs took 53 % of the cores"."""
        if self.others is None:
            return "how busy the machine was is not known"
        return f"other programs took {100 * self.others:.0f} % of the cores"


QUIET = Load(0.0)


class LoadMeter:
    """Tells the load since it was made; where that is too short to tell, since a moment before."""

    _moments: ClassVar[deque[Usage]] = deque(maxlen=16)

    def __init__(self) -> None:
        self._start = read_usage()
        self._moments.append(self._start)

    def read(self) -> Load:
        """The load up to now."""
        now, start = read_usage(), self._start
        if now.at - start.at < SHORTEST:
            start = next(
                (moment for moment in reversed(self._moments) if now.at - moment.at >= SHORTEST), self._moments[0]
            )
        return load_between(start, now)


def load_between(start: Usage, end: Usage) -> Load:
    """What is left of the work of all when this process's own is taken off; None within one tick of the clock."""
    there = end.there - start.there
    if there <= 0:
        return Load(None)
    others = (end.worked - start.worked) - (end.own - start.own)
    return Load(min(max(others / there, 0.0), 1.0))


def read_usage() -> Usage:
    """The counters of this moment."""
    now, own = time.monotonic(), sum(os.times()[:4])  # children that have ended included
    try:
        there, worked = _core_seconds(STAT.read_text(), usable_cores())
    except (OSError, ValueError):
        return _usage_by_load_average(now, own)
    return Usage(now, there, worked, own)


def usable_cores() -> set[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _core_seconds(stat: str, cores: set[int]) -> tuple[float, float]:
    """Seconds since the start that these cores had, and that they worked or were stolen by a hypervisor."""
    names, tick = {f"cpu{core}" for core in cores}, 1 / os.sysconf("SC_CLK_TCK")
    there = worked = 0.0
    for line in stat.splitlines():
        name, *counts = line.split()
        if name in names:
            ticks = [int(count) for count in counts[:8]]  # user nice system idle iowait irq softirq steal
            idle = ticks[3] + ticks[4]
            there, worked = there + sum(ticks) * tick, worked + (sum(ticks) - idle) * tick
    if not there:
        raise ValueError("no cores")
    return there, worked


_counted: list[float] = []  # the moment of the last count, and the core-seconds worked until then


def _usage_by_load_average(now: float, own: float) -> Usage:
    """Where there are no counters: as many cores as the load average of the last minute says work, at most all."""
    cores = len(usable_cores())
    if not hasattr(os, "getloadavg"):
        return Usage(now, 0.0, 0.0, own)
    last, worked = _counted or (now, 0.0)
    worked += (now - last) * min(os.getloadavg()[0], cores)
    _counted[:] = [now, worked]
    return Usage(now, now * cores, worked, own)


LoadMeter._moments.append(read_usage())  # so that the first that is timed has a moment before


# The processor


@cache
def processor_name() -> str:
    """The processor's model; its architecture where the system does not tell."""
    return _cpu_info("model name") or platform.processor() or platform.machine()


@cache
def processor_flags() -> frozenset[str]:
    """The instruction sets of this processor as Linux names them; none where the system does not tell, as Windows."""
    if sys.platform == "darwin":
        return _flags_of_mac()
    return frozenset((_cpu_info("flags") or _cpu_info("Features") or "").split())


# What sysctl says below hw.optional, by Linux's names.
_OF_MAC = {"AdvSIMD": "asimd", "FEAT_DotProd": "asimddp", "FEAT_BF16": "bf16", "FEAT_I8MM": "i8mm"}


def _flags_of_mac() -> frozenset[str]:
    """Read lines such as `hw.optional.arm.FEAT_BF16: 1`; none on Intel's processors."""
    try:
        done = subprocess.run(["sysctl", "hw.optional"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return frozenset()
    told = dict(line.rpartition(".")[2].partition(": ")[::2] for line in done.stdout.splitlines())
    return frozenset(name for feature, name in _OF_MAC.items() if told.get(feature) == "1")


def frequency() -> float | None:
    """The mean of the usable cores' frequencies in MHz; None where the system does not tell."""
    found = []
    for core in usable_cores():
        try:
            found.append(int((CPU_FOLDERS / f"cpu{core}" / "cpufreq" / "scaling_cur_freq").read_text()) / 1000)
        except (OSError, ValueError):
            told = _cpu_info("cpu MHz")
            return float(told) if told else None
    return sum(found) / len(found)


def _cpu_info(field: str) -> str | None:
    """The first core's value of a field of /proc/cpuinfo."""
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        return None
    values = (line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field)
    return next(values, None)


# Memory and disk


def free_memory() -> int | None:
    """Bytes that processes may still take without swapping, within what a container allows; None where not told."""
    try:
        found = {line.split(":")[0]: line.split()[1] for line in MEMORY_INFO.read_text().splitlines()}
    except OSError:
        return None
    if "MemAvailable" not in found:
        return None
    return min([int(found["MemAvailable"]) * 1024, *_left_by_groups()])


def total_memory() -> int | None:
    """Bytes of memory that the machine has; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def peak_memory() -> int:
    """The most bytes that this process has held; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def own_memory() -> int:
    """Bytes that this process holds now; its peak so far where the system tells no more."""
    try:
        return int(OWN_SIZES.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_memory()


def free_disk(output: Path) -> int:
    """Bytes free where the output will lie."""
    place = output.parent
    while not exists(place):
        place = place.parent
    return shutil.disk_usage(place).free


def refuse_too_little(what: str, need: int, free: int | None, remedy: str, who: str = "This") -> None:
    """QuasarError, one sentence, where `who` needs more bytes of disk or memory than are free; None is not known."""
    if free is not None and need > free:
        raise QuasarError(f"{who} needs {_as_bytes(need)} {what}, and {_as_bytes(free)} are free here: {remedy}.")


def _as_bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 10**8 else f"{count / 1e6:.1f} MB"


def _left_by_groups() -> list[int]:
    """Bytes that each control group of this process, from its own up to the root, leaves of its limit."""
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:
        return []
    left: list[int | None] = []
    for line in lines:  # such as 0::/user.slice of version 2, 4:memory:/job of version 1
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            top, names = (GROUPS / controllers, VERSION_1) if controllers else (GROUPS, VERSION_2)
            own = top / path.lstrip("/")
            left += [_left(folder, *names) for folder in (own, *own.parents) if folder.is_relative_to(top)]
    return [count for count in left if count is not None]


def _left(folder: Path, limit: str, usage: str, droppable: str) -> int | None:
    """What a group leaves; None where it has no limit, or is not to be seen from inside a container."""
    try:
        most = (folder / limit).read_text().strip()
        if most == "max":
            return None
        shares = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(0, int(most) - int((folder / usage).read_text()) + int(shares.get(droppable, 0)))
    except OSError:
        return None


def package_versions() -> dict[str, str]:
    """Python's version and those of the packages that change what is computed."""
    return {"python": platform.python_version(), **{name: package_version(name) for name in PACKAGES}}


def package_version(name: str) -> str:
    """The version of a package, which is not imported; a package that runs from a checkout has none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def git_hash() -> str | None:
    """The commit of the source tree that this package runs from; None when it is installed, or git is missing."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
