"""Which instruction set the C++ is compiled for, and what is said of it."""

import platform
from collections.abc import Callable, Iterator

import pytest

from quasar_core.errors import UsageError
from quasar_core.kernels.cpu import forms, tile_permission
from quasar_core.kernels.cpu.library import describe_form
from quasar_core.quantize.solve.cpp import describe_loops

AVX2 = frozenset({"avx2", "fma", "f16c"})
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
AMX = AVX512 | {"avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"}
LACKS = "as this processor lacks amx_bf16, amx_int8, amx_"
NEON = frozenset({"asimd", "asimddp", "bf16"})
Processor = Callable[[str, frozenset[str]], None]


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Processor:
    """Sets this machine's architecture and what its processor has; nothing is asked for yet."""
    monkeypatch.delenv(forms.VARIABLE, raising=False)

    def be(architecture: str, flags: frozenset[str]) -> None:
        monkeypatch.setattr(platform, "machine", lambda: architecture)
        monkeypatch.setattr(forms, "processor_flags", lambda: flags)

    return be


@pytest.mark.parametrize(
    ("architecture", "flags", "key", "reason"),
    [
        ("x86_64", AVX512 | {"avx512_vnni", "avx512_bf16"}, "avx512+avx512_vnni+avx512_bf16", f"{LACKS}tile"),
        ("x86_64", AVX512, "avx512", f"{LACKS}tile, avx512_bf16, avx512_vnni"),
        ("x86_64", AVX2 | {"avx_vnni"}, "avx2+avx_vnni", "as this processor lacks avx512bw, avx512dq, avx512f"),
        ("AMD64", AVX2, "avx2", "as this processor lacks avx512"),
        ("x86_64", frozenset({"sse2"}), "portable", "as this processor lacks avx2, f16c, fma"),
        ("aarch64", NEON, "neon+asimddp+bf16", "the best"),
        ("aarch64", frozenset({"fp"}), "portable", "as this processor lacks asimd"),
        ("riscv64", AVX512, "portable", "the best"),
    ],
)
def test_the_best_that_a_processor_has(
    processor: Processor, architecture: str, flags: frozenset[str], key: str, reason: str
) -> None:
    processor(architecture, flags)
    found = forms.chosen()
    assert found.key == key
    assert found.reason.startswith(reason)


def test_a_form_is_forced_by_a_variable(processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    processor("x86_64", AVX512 | {"avx512_vnni"})
    for name, key in (("avx2", "avx2"), ("portable", "portable"), ("avx512", "avx512+avx512_vnni")):
        monkeypatch.setenv(forms.VARIABLE, name)
        assert (forms.chosen().key, forms.chosen().reason) == (key, "as QUASAR_ISA asks")
    monkeypatch.setenv(forms.VARIABLE, "")
    assert forms.chosen().form.name == "avx512"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("sse9", "QUASAR_ISA must be one of amx, avx512, avx2, neon, portable, not sse9."),
        ("avx512", "QUASAR_ISA=avx512 cannot be: this processor lacks avx512bw, avx512dq, avx512f, avx512vl."),
        ("neon", "QUASAR_ISA=neon cannot be: NEON is not of x86_64 processors."),
    ],
)
def test_what_cannot_be_is_refused(
    processor: Processor, name: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor("x86_64", AVX2)
    monkeypatch.setenv(forms.VARIABLE, name)
    with pytest.raises(UsageError) as refused:
        forms.chosen()
    assert str(refused.value) == sentence


@pytest.fixture
def permission(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str | None], None]]:
    """Sets what the system answers that is asked for tiles; forms are chosen anew, then and afterwards."""

    def answer(refused: str | None) -> None:
        monkeypatch.setattr(tile_permission, "why_refused", lambda: refused)
        forms._chosen.cache_clear()

    yield answer
    forms._chosen.cache_clear()


def test_tiles_are_taken_where_they_are_permitted(
    processor: Processor, permission: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    processor("x86_64", AMX)
    permission(None)
    assert (forms.chosen().key, forms.chosen().reason) == ("amx", "the best that this processor has")
    assert "-mamx-tile" in forms.chosen().options
    assert [form.name for form in forms.usable()] == ["amx", "avx512", "avx2", "portable"]
    permission("the system does not")
    assert (forms.chosen().key, forms.chosen().reason) == ("avx512+avx512_vnni+avx512_bf16", "as the system does not")
    assert [form.name for form in forms.usable()] == ["avx512", "avx2", "portable"]
    monkeypatch.setenv(forms.VARIABLE, "amx")
    with pytest.raises(UsageError, match=r"^QUASAR_ISA=amx cannot be: the system does not\.$"):
        forms.chosen()


def test_nobody_asks_for_tiles_that_a_processor_lacks_or_that_are_not_wanted(
    processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(tile_permission, "why_refused", lambda: asked.append(1))
    processor("x86_64", AMX - {"amx_int8"})
    assert forms.chosen().form.name == "avx512"
    processor("x86_64", AMX)
    monkeypatch.setenv(forms.VARIABLE, "avx512")
    assert forms.chosen().form.name == "avx512"
    assert not asked


def test_a_wheel_carries_what_processes_of_its_system_can_have() -> None:
    carried = {
        system: {chosen.form.name for chosen in forms.all_for("x86_64", system)} for system in ("linux", "darwin")
    }
    assert carried["linux"] - carried["darwin"] == {"amx"}


def test_options_of_the_compiler(processor: Processor) -> None:
    processor("x86_64", AVX2 | {"avx_vnni"})
    assert forms.chosen().options == ("-DQUASAR_AVX2", "-mavx2", "-mfma", "-mf16c", "-mavxvnni")
    processor("aarch64", NEON)
    assert forms.chosen().options == ("-DQUASAR_NEON", "-march=armv8.2-a+dotprod+bf16")
    processor("aarch64", frozenset({"asimd"}))
    assert forms.chosen().options == ("-DQUASAR_NEON",)


@pytest.mark.parametrize(
    ("architecture", "system", "name"),
    [("arm64", "Darwin", "neon"), ("AMD64", "Windows", "avx2"), ("AMD64", "Windows", "portable")],
)
def test_systems_that_do_not_tell(
    processor: Processor, architecture: str, system: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(architecture, frozenset())
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2" if name == "avx2" else "DEFAULT")
    assert forms.chosen().form.name == name


def test_the_library_says_what_it_was_compiled_for(form: str) -> None:
    title = forms.find_form(form).title
    assert describe_form().startswith(title)
    assert describe_form().endswith(", as QUASAR_ISA asks")


@pytest.mark.usefixtures("cpp_solver")
def test_the_quantizers_loops_say_it_too() -> None:
    assert describe_loops() == f"in C++ for {forms.chosen().form.title}, compiled here"
