"""A process in a control group is counted by the kernel, ends with its time, and leaves no group behind."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools import control_group as groups
from tools.control_group import ControlGroup, control_group

HOLDS = "import time; held = bytearray(40_000_000); held[::4096] = b'1' * len(held[::4096]); time.sleep(0.1)"
LIMIT = 400_000_000


@pytest.fixture
def group() -> Iterator[ControlGroup]:
    with control_group(LIMIT) as found:
        if found is None:
            pytest.skip("this machine does not let us make a control group that counts memory")
        yield found


def test_what_a_process_holds_is_counted(group: ControlGroup) -> None:
    done, counted = group.run([sys.executable, "-c", HOLDS], 60)
    assert done.returncode == 0, done.stderr
    assert 40_000_000 < counted.peak <= LIMIT
    assert 40_000_000 < counted.anonymous <= counted.peak


def test_a_process_that_takes_more_is_ended(group: ControlGroup) -> None:
    done, counted = group.run([sys.executable, "-c", HOLDS.replace("40_", "600_")], 60)
    assert done.returncode == -9
    assert counted.peak <= LIMIT
    assert counted.met_limit > 0


def test_no_process_outlives_its_group() -> None:
    with control_group(None) as group:
        if group is None:
            pytest.skip("this machine does not let us make a control group that counts memory")
        with pytest.raises(subprocess.TimeoutExpired):
            group.run([sys.executable, "-c", "import time; time.sleep(60)"], 0.3)
    assert not group.folder.exists()


def test_files_of_both_versions_are_read(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, files in (
        (one, {"memory.stat": "cache 5\nrss 7\ntotal_rss 9", "memory.failcnt": "3"}),
        (two, {"memory.stat": "anon 9\nfile 5", "memory.events": "low 0\nmax 3\noom 0"}),
    ):
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        assert (ControlGroup(folder).anonymous(), ControlGroup(folder).met_limit()) == (9, 3)
    (two / "memory.max").write_text("max")
    ControlGroup(two).limit(700)
    assert (two / "memory.max").read_text() == "700"


def test_where_no_group_can_be_made_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "GROUPS", tmp_path / "missing")
    with control_group(1) as group:
        assert group is None
