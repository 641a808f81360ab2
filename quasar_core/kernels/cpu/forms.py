"""Choose the instruction set for which the C++ is compiled: the best that this processor has, or the one asked for.

Each form is `lanes.h` with one of the headers beside it, by the macro that its options define. What a processor may
have besides (its extras) is used where it is there. Names of what processors have are those of Linux's /proc/cpuinfo.
"""

import os
import platform
import sys
from dataclasses import dataclass
from functools import cache
from itertools import takewhile

from quasar_core.errors import UsageError
from quasar_core.kernels.cpu import tile_permission
from quasar_core.system import processor_flags

VARIABLE = "QUASAR_ISA"
_X86, _ARM = frozenset({"x86_64", "AMD64"}), frozenset({"aarch64", "arm64"})
_TILES = "amx_tile"  # which the system has to permit


@dataclass(frozen=True)
class Form:
    """An instruction set: the architectures that have it, what it needs, the compiler's options, and its extras.

    An extra's option that begins with + is added to `-march=armv8.2-a`. Extras came one after the other: each is used
    where those before it are there too, so that a wheel need not carry every choice of them. A form that needs a
    `system` is carried by that system's wheels alone.
    """

    name: str
    title: str
    architectures: frozenset[str] | None  # None: all
    needs: frozenset[str]
    options: tuple[str, ...]
    extras: tuple[tuple[str, str], ...] = ()
    system: str | None = None

    def missing(self) -> list[str]:
        """What it needs and this processor lacks."""
        return sorted(self.needs - instructions())


_AVX512 = Form(
    "avx512",
    "AVX-512",
    _X86,
    frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "f16c"}),
    ("-DQUASAR_AVX512", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"),
    (("avx512_vnni", "-mavx512vnni"), ("avx512_bf16", "-mavx512bf16")),
)
FORMS = (
    Form(
        "amx",
        "AVX-512 with AMX",
        _X86,
        _AVX512.needs | {"avx512_vnni", "avx512_bf16", _TILES, "amx_int8", "amx_bf16"},
        (*_AVX512.options, "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
        system="linux",
    ),
    _AVX512,
    Form(
        "avx2",
        "AVX2",
        _X86,
        frozenset({"avx2", "fma", "f16c"}),
        ("-DQUASAR_AVX2", "-mavx2", "-mfma", "-mf16c"),
        (("avx_vnni", "-mavxvnni"),),
    ),
    Form(
        "neon",
        "NEON",
        _ARM,
        frozenset({"asimd"}),
        ("-DQUASAR_NEON",),
        (("asimddp", "+dotprod"), ("bf16", "+bf16"), ("i8mm", "+i8mm")),
    ),
    Form("portable", "any processor", None, frozenset(), ("-DQUASAR_PORTABLE",)),
)
NAMES = tuple(form.name for form in FORMS)


@dataclass(frozen=True)
class Chosen:
    """A form, which of its extras this processor has, and why it was chosen."""

    form: Form
    extras: tuple[str, ...]
    reason: str

    @property
    def key(self) -> str:
        """A name such as avx512+avx512_vnni: what is compiled alike has the same."""
        return "+".join([self.form.name, *self.extras])

    @property
    def options(self) -> tuple[str, ...]:
        """The compiler's options."""
        extras = [option for name, option in self.form.extras if name in self.extras]
        additions = "".join(option for option in extras if option.startswith("+"))
        machine = [f"-march=armv8.2-a{additions}"] if additions else []
        return (*self.form.options, *machine, *(option for option in extras if not option.startswith("+")))


def chosen() -> Chosen:
    """The form that QUASAR_ISA names, else the best; UsageError where that cannot be."""
    return _chosen(os.environ.get(VARIABLE) or "", instructions(), platform.machine())


@cache
def _chosen(asked: str, _has: frozenset[str], _machine: str) -> Chosen:
    """The form of `chosen`, found out once for each processor, as every call of a kernel asks for it."""
    if not asked:
        return _with_extras(*_best())
    form = find_form(asked)
    if obstacle := why_not(form):
        raise UsageError(f"{VARIABLE}={asked} cannot be: {obstacle}.")
    return _with_extras(form, f"as {VARIABLE} asks")


def has_lanes() -> bool:
    """Whether the C++ runs on an instruction set with vectors, and not as on any processor."""
    return chosen().form.architectures is not None


def all_for(architecture: str, system: str = sys.platform) -> list[Chosen]:
    """What a wheel carries: each form of an architecture, with none of its extras, the first, the first two …"""
    forms = [form for form in FORMS if form.architectures is None or architecture in form.architectures]
    forms = [form for form in forms if form.system in (None, system)]
    extras = [(form, tuple(name for name, _ in form.extras)) for form in forms]
    return [Chosen(form, names[:count], "carried") for form, names in extras for count in range(len(names) + 1)]


def find_form(name: str) -> Form:
    """The form of a name; UsageError where there is none."""
    form = next((form for form in FORMS if form.name == name), None)
    if form is None:
        raise UsageError(f"{VARIABLE} must be one of {', '.join(NAMES)}, not {name}.")
    return form


def usable() -> list[Form]:
    """The forms that this processor can run, the best first."""
    return [form for form in FORMS if why_not(form) is None]


def why_not(form: Form) -> str | None:
    """Why this processor, or the system on it, cannot run a form."""
    if form.architectures is not None and platform.machine() not in form.architectures:
        return f"{form.title} is not of {platform.machine()} processors"
    if missing := form.missing():
        return f"this processor lacks {', '.join(missing)}"
    return tile_permission.why_refused() if _TILES in form.needs else None


def instructions() -> frozenset[str]:
    """What this processor has: by Linux, or where the system does not tell, what can be known otherwise."""
    if told := processor_flags():
        return told
    if platform.machine() in _ARM:
        return frozenset({"asimd", "asimddp"} if platform.system() == "Darwin" else {"asimd"})
    import torch  # not where wheels are built

    has_avx2 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return frozenset({"avx2", "fma", "f16c"} if has_avx2 else ())


def _best() -> tuple[Form, str]:
    """The best, and why."""
    best = next(form for form in FORMS if why_not(form) is None)
    better = [form for form in FORMS[: FORMS.index(best)] if platform.machine() in (form.architectures or ())]
    obstacle = why_not(better[-1]) if better else None
    return best, f"as {obstacle}" if obstacle else "the best that this processor has"


def _with_extras(form: Form, reason: str) -> Chosen:
    has = instructions()
    return Chosen(form, tuple(takewhile(has.__contains__, (name for name, _ in form.extras))), reason)
