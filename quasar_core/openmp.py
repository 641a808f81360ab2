"""Set how PyTorch's threads wait for work: OpenMP reads that from variables when PyTorch is imported."""

import os

_SPINS, _POLICY = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"
_FEW = "3000"  # looks for work before a thread sleeps: measured in dev/log.md
_chosen = set[str]()  # variables that were set here


def sleep_soon() -> None:
    """Let threads that wait sleep soon, unless somebody chose otherwise; to be called before PyTorch is imported.

    Spinning, they keep those that they wait for, and quasar's own, off the cores.
    """
    if _SPINS not in os.environ and _POLICY not in os.environ:
        os.environ[_SPINS] = _FEW
        _chosen.add(_SPINS)


def environment_of_others() -> dict[str, str]:
    """The environment for a program that is started, without the variables that were set here."""
    return {name: value for name, value in os.environ.items() if name not in _chosen}
