"""What is loaded as code: whose it is, whether it is whole, and what is said where it is not."""

import ctypes
import os
import stat
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from quasar_core.errors import QuasarError, UsageError
from quasar_core.kernels.cpu import build, library, private_files
from quasar_core.kernels.cpu import library as compiling
from quasar_core.kernels.cpu.forms import chosen
from quasar_core.models import loading
from quasar_core.quantize.solve import cpp
from quasar_core.records import no_progress
from quasar_core.store.folders import home

NO_COMPILER = compiling.find_compiler() is None
compiled = pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler was found")
SEVEN = {"seven": []}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source of one function, and a home without libraries."""
    monkeypatch.setattr(compiling, "_rebuilt", {})
    path = tmp_path / "seven.cpp"
    path.write_text('extern "C" int seven() { return 7; }\n')
    return path


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of the two libraries yet; afterwards all that was known is."""
    for module in (library, cpp):
        for name in ("_why_not_in", "_library_in"):
            monkeypatch.setattr(module, name, cache(getattr(module, name).__wrapped__))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@compiled
def test_a_library_lies_in_folders_of_the_user_alone_with_its_digest(source: Path) -> None:
    old = os.umask(0)
    try:
        library = compiling.shared_library(source)
    finally:
        os.umask(old)
    assert {mode(library.parent), mode(library.parent.parent)} == {0o700}
    assert mode(library) == 0o600
    assert sorted(path.name for path in library.parent.iterdir()) == ["seven.so", "seven.so.sha256"]
    assert compiling.load_library(source, SEVEN).seven() == 7
    assert compiling.remark(source) == ", compiled here"


@compiled
def test_whether_a_library_would_be_compiled_is_known_before(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiling.needs_compiling(source)
    library = compiling.shared_library(source)
    assert compiling.remark(source) == ", compiled here"  # to ask left nothing that looked like damage
    assert not compiling.needs_compiling(source)
    cut(library)
    assert compiling.needs_compiling(source)
    monkeypatch.setenv(compiling.SWITCH, "0")
    assert not compiling.needs_compiling(source)


@compiled
def test_nothing_is_compiled_where_it_cannot_be_kept(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda place, mode: not home().is_relative_to(place))
    assert not compiling.needs_compiling(source)


def test_where_there_is_no_cpp_that_is_said_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(compiling.SWITCH, raising=False)
    monkeypatch.setattr(loading, "needs_compiling", lambda source: False)
    monkeypatch.setattr(loading, "why_not_here", lambda: "its library could not be written")
    said = loading._load_kernels(no_progress)
    assert said == "kernels: PyTorch's operations, several times slower than C++: its library could not be written"
    monkeypatch.setattr(loading, "why_not_here", lambda: None)
    assert loading._load_kernels(no_progress) is None


@pytest.mark.parametrize(
    ("needed", "switch", "said"),
    [(True, "1", ["compiling kernels"]), (False, "1", ["loading kernels"]), (False, "0", [])],
)
def test_compiling_is_said_only_where_something_is_compiled(
    needed: bool, switch: str, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(compiling.SWITCH, switch)
    monkeypatch.setattr(loading, "needs_compiling", lambda source: needed)
    monkeypatch.setattr(loading, "why_not_here", lambda: None)
    stages: list[str] = []
    loading._load_kernels(lambda stage, done, total: stages.append(stage))
    assert list(dict.fromkeys(stages)) == said


@compiled
def test_an_open_folder_is_closed(source: Path) -> None:
    library = compiling.shared_library(source)
    for folder in (library.parent, library.parent.parent):
        folder.chmod(0o777)
    assert compiling.load_library(source, SEVEN).seven() == 7
    assert {mode(library.parent), mode(library.parent.parent)} == {0o700}


def cut(library: Path) -> None:
    library.write_bytes(library.read_bytes()[:5000])


def empty(library: Path) -> None:
    library.write_bytes(b"")


def fill_with_garbage(library: Path) -> None:
    library.write_bytes(bytes(range(256)) * 64)


def change_one_bit(library: Path) -> None:
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.write_bytes(content)


def remove(library: Path) -> None:
    library.unlink()


def remove_digest(library: Path) -> None:
    private_files._digest_file(library).unlink()


def pipe_as_digest(library: Path) -> None:
    remove_digest(library)
    os.mkfifo(private_files._digest_file(library))


def spoil_digest(library: Path) -> None:
    private_files._digest_file(library).write_bytes(b"\xff\xfe")


def link(library: Path) -> None:
    library.rename(library.with_suffix(".elsewhere"))
    library.symlink_to(library.with_suffix(".elsewhere"))


def stand_a_pipe_in_its_place(library: Path) -> None:
    library.unlink()
    os.mkfifo(library)


def let_others_write(library: Path) -> None:
    library.chmod(0o666)


DAMAGES = [
    cut,
    empty,
    fill_with_garbage,
    change_one_bit,
    remove,
    remove_digest,
    pipe_as_digest,
    spoil_digest,
    link,
    stand_a_pipe_in_its_place,
    let_others_write,
]


@compiled
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_compiled_anew_and_that_is_said(source: Path, damage: object) -> None:
    library = compiling.shared_library(source)
    assert callable(damage)
    damage(library)
    with pytest.raises(QuasarError):
        private_files.load(library)
    assert compiling.load_library(source, SEVEN).seven() == 7
    assert compiling.remark(source).startswith(f", compiled anew since {library} ")
    assert sorted(path.name for path in library.parent.iterdir()) == ["seven.so", "seven.so.sha256"]


@compiled
def test_what_a_killed_compiler_left_is_cleared(source: Path) -> None:
    kernels = compiling.shared_library(source).parent.parent
    left = kernels / "building-x"
    left.mkdir()
    (left / "seven.so").write_text("half")
    compiling.shared_library(source)
    assert not left.exists()


@compiled
def test_another_library_that_is_being_compiled_is_left_alone_and_not_waited_for(source: Path) -> None:
    kernels = compiling.shared_library(source).parent.parent
    building = kernels / "building-0123-x"
    building.mkdir()
    with FileLock(kernels / ".0123.lock"):
        source.write_text(source.read_text() + "// changed\n")
        assert compiling.shared_library(source).is_file()
    assert building.is_dir()


def test_a_folder_of_another_user_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "find_compiler", lambda: "/bin/false")
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    with pytest.raises(QuasarError, match=r"kernels, which belongs to another user"):
        compiling.shared_library(source)


def test_a_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "library.so"
    library.write_text("x")
    monkeypatch.setattr(private_files, "make_private", lambda folder: None)
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    assert private_files.damage(library) == f"{library} belongs to another user, or others may write it"


def test_a_folder_that_is_a_link_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "find_compiler", lambda: "/bin/false")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "kernels").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(QuasarError, match="kernels, which is not a folder"):
        compiling.shared_library(source)


@compiled
def test_a_missing_function_is_a_reason(source: Path) -> None:
    with pytest.raises(QuasarError, match=r"its library .*seven\.so has no function eight: delete it"):
        compiling.load_library(source, {"seven": [], "eight": []})


@compiled
def test_two_libraries_are_two(source: Path, tmp_path: Path) -> None:
    """The loader knows a library by its path."""
    other = tmp_path / "other" / "seven.cpp"
    other.parent.mkdir()
    other.write_text('extern "C" int seven() { return 8; }\n')
    both = [compiling.load_library(path, SEVEN) for path in (source, other)]
    assert [library.seven() for library in both] == [7, 8]


@compiled
def test_a_library_that_the_package_carries_is_taken_and_nothing_compiled(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "HERE", tmp_path)
    monkeypatch.setattr(build, "CARRIED", tmp_path / "built")
    carried = build.carried_library("seven", chosen())
    carried.parent.mkdir()
    carried.write_bytes(compiling.shared_library(source).read_bytes())
    monkeypatch.setenv("CXX", "/nowhere")
    monkeypatch.setenv("QUASAR_HOME", str(tmp_path / "empty"))
    assert compiling.load_library(source, SEVEN).seven() == 7
    assert compiling.remark(source) == ", built into the package"
    assert not (tmp_path / "empty").exists()
    build.carried_library("broken", chosen()).write_text("no library")
    with pytest.raises(QuasarError, match="its library could not be loaded: "):
        compiling.load_library(tmp_path / "broken.cpp", SEVEN)
    carried.unlink()
    with pytest.raises(QuasarError, match=r"no C\+\+ compiler was found .* and the package carries no library"):
        compiling.load_library(source, SEVEN)


@compiled
def test_two_sources_of_one_folder_keep_both_their_libraries(source: Path) -> None:
    other = source.with_name("eight.cpp")
    other.write_text('extern "C" int eight() { return 8; }\n')
    paths = [compiling.shared_library(path) for path in (source, other)]
    built = [path.stat().st_mtime_ns for path in paths]
    assert [compiling.shared_library(path).stat().st_mtime_ns for path in (source, other)] == built
    assert compiling.remark(other) == ", compiled here"


@compiled
def test_processes_that_compile_at_once_all_load_it(source: Path) -> None:
    program = (
        "from pathlib import Path; from quasar_core.kernels.cpu.library import load_library\n"
        f"print(load_library(Path({str(source)!r}), {{'seven': []}}).seven())"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=_environment())
        for _ in range(3)
    ]
    assert [run.communicate()[0].strip() for run in runs] == ["7", "7", "7"]


def _environment() -> dict[str, str]:
    root = str(Path(compiling.__file__).parents[3])
    return {**os.environ, "PYTHONPATH": root}


@pytest.mark.parametrize("module", [library, cpp])
def test_the_switch_turns_off_what_is_compiled_without_a_compiler(
    module: object, forgotten: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUASAR_CPU_PASS", "0")
    monkeypatch.setenv("CXX", "/nowhere")
    assert module.why_not_here() == "QUASAR_CPU_PASS=0 switches it off"  # type: ignore[attr-defined]
    assert not cpp.runs(torch.zeros(1))
    assert cpp.describe_loops() == "PyTorch's operations, not C++: QUASAR_CPU_PASS=0 switches it off"
    assert not (tmp_path / "home").exists()


def test_other_values_of_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUASAR_CPU_PASS", "off")
    with pytest.raises(UsageError, match="QUASAR_CPU_PASS must be 0 or 1, not off"):
        compiling.why_switched_off()
    for value in ("1", ""):
        monkeypatch.setenv("QUASAR_CPU_PASS", value)
        assert compiling.why_switched_off() is None


@pytest.mark.usefixtures("compiled_at_home")
def test_descriptions_of_other_bytes_are_refused(forgotten: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(ctypes.Structure):
        _fields_ = (("x", ctypes.c_int),)

    if library.why_not_here() is not None:
        pytest.skip(str(library.why_not_here()))
    library._library_in.cache_clear()
    monkeypatch.setitem(library.DESCRIBED, "layer", Other)
    with pytest.raises(QuasarError, match="describes models in other bytes"):
        library.library()
