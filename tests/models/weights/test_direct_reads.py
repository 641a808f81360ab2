"""Direct reads bring the bytes of the file, wherever they lie; what they cannot do is told."""

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quasar_core.errors import QuasarError
from quasar_core.models.weights import direct_reads
from quasar_core.models.weights.direct_reads import SECTOR, DirectFile, EndOfFile
from quasar_core.models.weights.weight_reads import OpenFile

SIZE = 5 * SECTOR + 77


def read(file: DirectFile, start: int, sizes: Sequence[int]) -> list[bytes]:
    buffers = [bytearray(size) for size in sizes]
    file.read(start, [memoryview(buffer) for buffer in buffers])
    return [bytes(buffer) for buffer in buffers]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_reads, "PIECE_BYTES", 2 * SECTOR)


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    whole = torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (tmp_path / "file").write_bytes(whole.numpy().tobytes())
    return whole.numpy().tobytes()


@pytest.fixture
def file(tmp_path: Path, content: bytes, small_pieces: None) -> DirectFile:
    opened = DirectFile.open(tmp_path / "file")
    if opened is None:
        pytest.skip("this file system has no direct reads")
    return opened


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_read_is_what_the_file_holds(file: DirectFile, content: bytes, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, SIZE))
    sizes = data.draw(st.lists(st.integers(0, SIZE), max_size=5))
    ends = [sum(sizes[:count]) for count in range(len(sizes) + 1)]
    if start + ends[-1] > SIZE:
        with pytest.raises(EndOfFile) as told:
            read(file, start, sizes)
        assert told.value.place == SIZE
        return
    expected = [content[start + begin : start + end] for begin, end in pairwise(ends)]
    assert read(file, start, sizes) == expected


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.integers(0, SIZE), most=st.integers(SECTOR, 3 * SECTOR))
def test_reads_that_come_short_are_gone_on_with(file: DirectFile, content: bytes, start: int, most: int) -> None:
    whole = os.preadv
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", lambda number, buffers, place: min(whole(number, buffers, place), most))
        assert read(file, start, [SIZE - start]) == [content[start:]]


def test_a_file_that_refuses_direct_reads_is_read_through_the_cache(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems open a file for them and refuse the reads."""

    def refuse(file: DirectFile, start: int, buffers: Sequence[memoryview]) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(DirectFile, "open", lambda path: DirectFile(os.open(path, os.O_RDONLY)))
    monkeypatch.setattr(DirectFile, "read", refuse)
    opened, place = OpenFile(tmp_path / "file"), bytearray(100)
    assert opened.direct
    opened.read(1000, memoryview(place))
    assert bytes(place) == content[1000:1100]
    assert not opened.direct


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_later_read_that_is_refused_is_done_over(
    file: DirectFile, tmp_path: Path, content: bytes, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, place, whole, direct = OpenFile(tmp_path / "file"), bytearray(SIZE - 9), os.preadv, list[int]()

    def refuse_the_second(descriptor: int, buffers: Sequence[memoryview], start: int) -> int:
        if threading.current_thread().name == "quasar disk":
            direct.append(start)
            if len(direct) == 2:
                raise OSError(number, os.strerror(number))
        return whole(descriptor, buffers, start)

    monkeypatch.setattr(os, "preadv", refuse_the_second)
    opened.read(9, memoryview(place))
    assert bytes(place) == content[9:]
    assert len(direct) == 2
    assert not opened.direct


def test_direct_reads_of_less_than_a_sector_are_no_end_of_the_file(
    file: DirectFile, tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, place, whole = OpenFile(tmp_path / "file"), bytearray(SIZE - 9), os.preadv
    monkeypatch.setattr(os, "preadv", lambda number, buffers, start: min(whole(number, buffers, start), 100))
    opened.read(9, memoryview(place))
    assert bytes(place) == content[9:]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no forks")
@pytest.mark.usefixtures("file")
def test_a_fork_reads_with_pieces_of_its_own(tmp_path: Path) -> None:
    """Also where it was forked in the middle of a read."""
    (tmp_path / "forked").write_bytes(bytes(range(256)) * 64)
    program = [sys.executable, "-c", FORKED, tmp_path / "forked"]
    assert subprocess.run(program, timeout=90, check=False).returncode == 7


FORKED = """
import os, signal, sys, threading
from pathlib import Path
from quasar_core.models.weights.direct_reads import DirectFile
path = Path(sys.argv[1])
begun, go_on, whole = threading.Event(), threading.Event(), os.preadv
def slow(*given):
    begun.set()
    go_on.wait()
    return whole(*given)
def read(place):
    DirectFile.open(path).read(1, [memoryview(place)])
os.preadv, places = slow, (bytearray(1000), bytearray(1000))
reading = threading.Thread(target=read, args=(places[0],))
reading.start()
begun.wait()
child = os.fork()
os.preadv = whole
if child == 0:
    signal.alarm(60)
    read(places[1])
    assert places[1] == path.read_bytes()[1:1001]
    os._exit(7)
go_on.set()
reading.join()
assert places[0] == path.read_bytes()[1:1001]
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_where_the_system_has_none_nothing_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    assert DirectFile.open(tmp_path / "file") is None


def test_an_error_of_the_disk_is_told(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(number: int, buffers: Sequence[memoryview], place: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    opened = OpenFile(tmp_path / "file")
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(QuasarError, match=r"file cannot be read: Input/output error\.$"):
        opened.read(0, memoryview(bytearray(10)))
