"""What a wheel carries is what any processor would ask for, and how it is built for each system."""

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quasar_core.kernels.cpu import build, forms

ROOT = Path(__file__).parents[2]
NAMES = sorted({name for form in forms.FORMS for name in (*form.needs, *(extra for extra, _ in form.extras))})
BY_KEY = {form.key: form for form in forms.all_for("x86_64")}
FORM = BY_KEY["avx512"]
ARCHITECTURES = ["x86_64", "AMD64", "aarch64", "arm64", "riscv64"]


@given(
    has=st.sets(st.sampled_from(NAMES)) | st.just(set(NAMES)),
    architecture=st.sampled_from(ARCHITECTURES),
    refused=st.sampled_from([None, "no"]),
)
def test_whatever_a_processor_has_its_library_is_carried(has: set[str], architecture: str, refused: str | None) -> None:
    forms._chosen.cache_clear()
    with pytest.MonkeyPatch.context() as patch, ExitStack() as ends:
        ends.callback(forms._chosen.cache_clear)
        patch.setattr(forms.tile_permission, "why_refused", lambda: refused)
        patch.delenv(forms.VARIABLE, raising=False)
        patch.setattr(forms, "instructions", lambda: frozenset(has))
        patch.setattr(forms.platform, "machine", lambda: architecture)
        wanted = forms.chosen()
    carried = {(form.key, form.options) for form in forms.all_for(architecture, "linux")}
    assert (wanted.key, wanted.options) in carried


def test_every_machine_has_a_form() -> None:
    assert [form.key for form in forms.all_for("riscv64")] == ["portable"]
    assert {"avx512", "avx512+avx512_vnni", "avx2", "portable"} <= {form.key for form in forms.all_for("AMD64")}


def test_an_extra_without_those_before_it_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = next(form.needs for form in forms.FORMS if form.name == "avx512")
    monkeypatch.delenv(forms.VARIABLE, raising=False)
    monkeypatch.setattr(forms.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(forms, "instructions", lambda: needs | {"avx512_bf16"})
    assert forms.chosen().key == "avx512"


@pytest.mark.parametrize(("system", "name"), [("linux", "so"), ("darwin", "dylib"), ("win32", "dll")])
def test_names_of_libraries(system: str, name: str) -> None:
    assert build.carried_library("quasar", FORM, system).name == f"quasar-avx512.{name}"
    assert build.carried_library("solver", BY_KEY["avx512+avx512_vnni"], system).name == f"solver-avx512.{name}"


def test_each_system_gets_its_options() -> None:
    commands = {
        (compiler, system): build.command_ahead(compiler, Path("x.cpp"), Path("x"), FORM, system)
        for compiler, system in [("g++", "linux"), ("clang++", "darwin"), ("x86_64-w64-mingw32-g++", "win32")]
    }
    commands["clang++", "win32"] = build.command_ahead("clang++", Path("x.cpp"), Path("x"), FORM, "win32")
    assert all(set(FORM.options) < set(command) for command in commands.values())
    assert not any("openmp" in option for command in commands.values() for option in command)
    has = {
        who: [option for option in command if option.startswith(("-fPIC", "-static", "-Wa"))]
        for who, command in commands.items()
    }
    assert has == {
        ("g++", "linux"): ["-fPIC", "-static-libstdc++", "-static-libgcc"],
        ("clang++", "darwin"): ["-fPIC"],
        ("x86_64-w64-mingw32-g++", "win32"): ["-static", "-Wa,-muse-unaligned-vector-move"],
        ("clang++", "win32"): ["-static"],
    }


def test_what_setup_reads_needs_the_standard_library_alone() -> None:
    """Wheels are built where no dependency is installed."""
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from quasar_core.kernels.cpu import build, forms\n"
        "print(*[form.key for form in forms.all_for('x86_64', 'linux')])"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True)
    assert done.stdout.split()[:2] == ["amx", "avx512"], done.stderr
