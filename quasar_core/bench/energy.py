"""Read how much energy the machine has taken: the processor's package by RAPL, a GPU by NVML, where they tell."""

from importlib import import_module
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Tells the joules taken since it was made: of all processors' packages, and of the GPU where the model runs there.

    None where nothing tells, such as without the right to read RAPL's counters.
    """

    def __init__(self, on_gpu: bool = False, powercap: Path = POWERCAP) -> None:
        self._zones = sorted(powercap.glob("intel-rapl:[0-9]*")) if powercap.is_dir() else []
        self._zones = [zone for zone in self._zones if zone.name.count(":") == 1]
        self._gpu = _gpu_counter() if on_gpu else None
        self._start = self._read()

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
        """Joules of each counter, whatever they began at."""
        try:
            found = [int((zone / "energy_uj").read_text()) / 1e6 for zone in self._zones]
        except (OSError, ValueError):
            return None
        if self._gpu is not None:
            found.append(self._gpu())
        return found or None

    def _wraps(self) -> list[float]:
        """Where each counter begins again at 0; 0 where it does not."""
        wraps = []
        for zone in self._zones:
            try:
                wraps.append(int((zone / "max_energy_range_uj").read_text()) / 1e6)
            except (OSError, ValueError):
                wraps.append(0.0)
        return wraps + ([0.0] if self._gpu is not None else [])


def _gpu_counter() -> Any | None:
    """A function that tells the first GPU's joules; None without NVML's Python package, or where it does not count."""
    try:
        nvml = import_module("pynvml")
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # the package, the driver or the device lacks it, each with an error of its own
        return None
    return lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
