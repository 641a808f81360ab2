"""The registry of pairs under load: no recording is lost, no temporary file stays, a held lock is one sentence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quasar_core import files as files
from quasar_core import store
from quasar_core.errors import QuasarError

RECORDINGS = int(os.environ.get("QUASAR_RECORDINGS", "24"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks its processes")
def test_parallel_recordings_are_all_kept(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, str(root / "tests/helpers/record_many.py"), "pairs", str(RECORDINGS)]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True)
    names = {pair.name for pair in store.list_pairs()}
    assert names == {f"verifier-{number}" for number in range(RECORDINGS)}
    current = store.current_pair()
    assert current is not None
    assert current == store.list_pairs()[-1]
    assert sorted(os.listdir(tmp_path / "home")) == [".pairs.json.lock", "pairs.json"]


def test_what_an_ended_process_left_is_cleared(tmp_path: Path) -> None:
    store.record_pair("demo", tmp_path / "a")
    left: list[Path] = []

    def die(path: Path) -> None:
        left.append(path)
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "sync", die)
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # as killed: nothing is tidied up
        with pytest.raises(SystemExit):
            store.record_pair("demo", tmp_path / "b")
    assert left[0].exists()
    renamed = left[0].with_name(left[0].name.replace(str(os.getpid()), "1"))
    left[0].rename(renamed)
    assert [pair.name for pair in store.list_pairs()] == ["a"]
    store.record_pair("demo", tmp_path / "c")
    assert not renamed.exists()
    assert [pair.name for pair in store.list_pairs()] == ["a", "c"]


def test_file_and_folder_are_synced_in_that_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    sync, replace = files.sync, os.replace
    monkeypatch.setattr(files, "sync", lambda path: (seen.append(path.suffix or "folder"), sync(path)))
    monkeypatch.setattr(os, "replace", lambda *paths: (seen.append("renamed"), replace(*paths)))
    files.write_text(tmp_path / "x.json", "{}")
    assert seen == [".tmp", "renamed", "folder"]


def test_a_lock_that_is_never_given_up_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock

    monkeypatch.setattr(files, "LOCK_SECONDS", 0)
    store.record_pair("demo", tmp_path / "a")
    with (
        FileLock(tmp_path / "home" / ".pairs.json.lock"),
        pytest.raises(QuasarError, match=r"pairs\.json has been held by another process for 0 seconds\.$"),
    ):
        store.record_pair("demo", tmp_path / "b")


def test_names_as_long_as_a_file_system_allows(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250 + ".json")
    files.write_text(path, "{}")
    assert os.listdir(tmp_path) == [path.name]


def test_a_young_stray_of_another_process_stays_where_no_lock_is_held(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with files.written_whole(path) as beside:
        beside.write_text("first")
        other = beside.with_name(beside.name.replace(str(os.getpid()), "1"))
        other.write_text("second, at work")
    files.write_text(path, "third")
    assert other.exists()
    os.utime(other, (0, 0))
    files.write_text(path, "fourth")
    assert os.listdir(tmp_path) == ["results.json"]


@pytest.mark.skipif(os.name != "posix", reason="asks for a process's number")
def test_a_stray_of_a_process_that_ended_is_cleared_at_once(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with files.written_whole(path) as beside:
        beside.write_text("first")
        beside.with_name(beside.name.replace(str(os.getpid()), str(ended.pid))).write_text("second, cut sh")
    files.write_text(path, "third")
    assert os.listdir(tmp_path) == ["results.json"]


def test_a_registry_of_an_older_version_is_read(tmp_path: Path) -> None:
    store.home().mkdir()
    pair = {"name": "x", "target": "demo", "verifier": "/v"}
    (store.home() / "pairs.json").write_text(json.dumps({"format_version": 1, "current": "x", "pairs": [pair]}))
    assert store.current_pair() == store.PairRecord("x", "demo", "/v", added=False)
    store.use_pair("x")
    assert json.loads((store.home() / "pairs.json").read_text())["pairs"] == [pair], "and an older one reads it"
