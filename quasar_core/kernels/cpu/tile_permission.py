"""Ask the system whether this process may use AMX's tiles: they make a thread's state larger, so Linux has to be asked.

What it permits holds for all threads of the process and for its forks; a program that is started asks anew
(Documentation/arch/x86/xstate.rst of Linux).
"""

import ctypes
import os
import sys
from functools import cache

_ARCH_PRCTL, _REQUEST, _TILE_DATA = 158, 0x1023, 18  # of x86-64: the system call, ARCH_REQ_XCOMP_PERM, XTILEDATA


@cache
def why_refused() -> str | None:
    """Why this process may not use tiles; None where it may, from now on."""
    if sys.platform != "linux":
        return "only Linux can be asked for AMX's tiles here"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(*map(ctypes.c_long, (_ARCH_PRCTL, _REQUEST, _TILE_DATA))) == 0:
        return None
    return f"the system refuses AMX's tiles to this process ({os.strerror(ctypes.get_errno())})"
