"""What is free on this machine, for a plan: memory, within what a container or a scheduler allows, and disk."""

import shutil
from pathlib import Path

from quasar_core.files import exists

MEMORY_INFO, OWN_GROUPS, GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Of a control group: its limit, what it holds of that, and what of this are files' pages that the system may drop.
VERSION_1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
VERSION_2 = "memory.max", "memory.current", "inactive_file"


def free_memory() -> int | None:
    """Bytes that processes may still take without swapping; None where the system does not say."""
    try:
        found = {line.split(":")[0]: line.split()[1] for line in MEMORY_INFO.read_text().splitlines()}
    except OSError:
        return None
    if "MemAvailable" not in found:
        return None
    return min([int(found["MemAvailable"]) * 1024, *_left_by_groups()])


def free_disk(output: Path) -> int:
    """Bytes free where the output will lie."""
    place = output.parent
    while not exists(place):
        place = place.parent
    return shutil.disk_usage(place).free


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
