"""One reader of JSON and one writer of files: what is strict about the one, and whole about the other."""

import os
from pathlib import Path
from typing import Any

import pytest

from quasar_core.errors import QuasarError
from quasar_core.files import parse_json, read_json, write_json, write_whole


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[" * 200 + "]" * 200, "nested too deeply"),
        ('{"a":' * 200 + "1" + "}" * 200, "nested too deeply"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands twice"),
        ("1" * 5000, "digits"),
        ("", "line 1, column 1"),
        ('{"a": "\n"}', "line 1, column 8"),
    ],
)
def test_json_is_read_strictly(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text)
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(QuasarError, match=r"x\.json is not readable JSON \("):
        read_json(tmp_path / "x.json")


def test_depth_is_bounded_where_it_says() -> None:
    assert parse_json("[" * 100 + "]" * 100)
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 101 + "]" * 101)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    content = {"a": [1, 2.5, None, True, float("inf")], "é": "\udcff \U0001f600 \u2028"}
    write_json(tmp_path / "deep" / "x.json", content)
    assert read_json(tmp_path / "deep" / "x.json") == content
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.json"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "x", b"before")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(QuasarError, match=r"x cannot be written: No space left on device\.$"):
        write_whole(tmp_path / "x", b"after")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"before"


def test_a_device_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("/dev/null")
    with pytest.raises(QuasarError, match=r"x is a device, not a file"):
        write_whole(tmp_path / "x", b"content")
    assert (tmp_path / "x").is_symlink()


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.json").write_text("{}")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(QuasarError, match=r"x\.json cannot be read: Permission denied\.$"):
        read_json(tmp_path / "x.json")
