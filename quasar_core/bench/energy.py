"""Read how much energy the machine has taken: the processor's package by RAPL, a GPU by NVML, if they can be read."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Tells the joules taken since it was made: of all processors' packages, and of the GPU where the model runs there.

    None where nothing tells, such as without the right to read RAPL's counters, which Linux gives to root alone.
    """

    def __init__(self, on_gpu: bool = False, powercap: Path = POWERCAP) -> None:
        self._zones = [zone for zone in _packages(powercap) if _joules(zone) is not None]
        self._gpu = _gpu_counter() if on_gpu else None
        self._start = self._read()

    @property
    def sources(self) -> str | None:
        """What is counted, in words; None where nothing is."""
        packages = f"{len(self._zones)} processor package{'s' if len(self._zones) > 1 else ''} by RAPL"
        found = [*([packages] if self._zones else []), *(["the GPU by NVML"] if self._gpu is not None else [])]
        return " and ".join(found) or None

    def read(self) -> float | None:
        """Joules up to now."""
        now = self._read()
        if now is None or self._start is None:
            return None
        return sum(
            (end - begin) % wrap if wrap else end - begin
            for end, begin, wrap in zip(now, self._start, self._wraps(), strict=True)
        )

    def _read(self) -> list[float] | None:
        """Joules of each counter, whatever they began at; None without counters, or where one tells no more."""
        found = [_joules(zone) for zone in self._zones]
        known = [joules for joules in found if joules is not None]
        if len(known) < len(found):
            return None
        if self._gpu is not None:
            known.append(self._gpu())
        return known or None

    def _wraps(self) -> list[float]:
        """Where each counter begins again at 0; 0 where it does not."""
        wraps = [_joules(zone, "max_energy_range_uj") or 0.0 for zone in self._zones]
        return wraps + ([0.0] if self._gpu is not None else [])


def _packages(powercap: Path) -> list[Path]:
    """The zones of whole packages: not their parts, nor the platform's, which holds them all (psys)."""
    zones = sorted(powercap.glob("intel-rapl:[0-9]*")) if powercap.is_dir() else []
    return [zone for zone in zones if zone.name.count(":") == 1 and _name(zone) != "psys"]


def _name(zone: Path) -> str:
    try:
        return (zone / "name").read_text().strip()
    except (OSError, ValueError):
        return ""


def _joules(zone: Path, file: str = "energy_uj") -> float | None:
    try:
        return int((zone / file).read_text()) / 1e6
    except (OSError, ValueError):
        return None


def _gpu_counter() -> Callable[[], float] | None:
    """A function that tells the first GPU's joules; None without NVML's Python package, or where it does not count."""
    try:
        nvml: Any = import_module("pynvml")
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # the package, the driver or the device lacks it, each with an error of its own
        return None
    return lambda: float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000
