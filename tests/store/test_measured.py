"""The store of measured values: whole or not at all, by conditions, damaged counts as absent and is said."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quasar_core.errors import QuasarError
from quasar_core.store.measured import Measured, forget, measured_file, positive, stored

HERE = {"device": "a processor", "torch": "2"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUASAR_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "measured"


def opened(conditions: dict[str, str] = HERE, kind: str = "times") -> Measured[float]:
    return Measured(measured_file(kind, conditions), conditions, positive)


def test_values_come_back_in_another_run_and_nowhere_else() -> None:
    opened().keep({"a": 1.5})
    known = opened().get("a")
    assert known is not None
    assert (known.value, known.measured_at > 0) == (1.5, True)
    assert opened().get("b") is None
    assert opened({**HERE, "torch": "3"}).get("a") is None
    assert opened(kind="others").get("a") is None


def test_what_another_process_kept_meanwhile_stays() -> None:
    mine, other = opened(), opened()
    other.keep({"a": 1.0})
    mine.keep({"b": 2.0})
    assert {name: entry.value for name, entry in next(iter(stored("times", positive)))[1].items()} == {
        "a": 1.0,
        "b": 2.0,
    }


def test_what_many_processes_keep_at_once_is_all_kept(tmp_path: Path) -> None:
    root, count = Path(__file__).parents[2], 12
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, str(root / "tests/helpers/record_many.py"), "times", str(count)]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True)
    ((_, entries),) = stored("times", positive)
    assert {name: entry.value for name, entry in entries.items()} == {str(i): 1.0 + i for i in range(count)}


def test_of_two_values_of_one_name_the_later_stays() -> None:
    opened().keep({"a": 1.0})
    mine = opened()
    opened().keep({"a": 2.0})
    mine.keep({"b": 3.0})
    assert [opened().get(name).value for name in "ab"] == [2.0, 3.0]  # type: ignore[union-attr]


def test_a_value_can_be_forgotten_and_a_whole_kind() -> None:
    opened().keep({"a": 1.0, "b": 2.0})
    opened().drop("a")
    opened().drop("never there")
    assert opened().get("a") is None
    assert opened().get("b") is not None
    forget("times")
    assert opened().get("b") is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"conditions": {}, "values": 3}',
        '{"conditions": {}, "values": {"a": 1}}',
        '{"conditions": {}, "values": {"a": {"value": 1}}}',
        '{"conditions": {}, "values": {}}',
        '{"conditions": CONDITIONS, "values": {"a": {"value": -1.0, "measured_at": 1.0}}}',
        '{"conditions": CONDITIONS, "values": {"a": {"value": NaN, "measured_at": 1.0}}}',
        '{"conditions": CONDITIONS, "values": {"a": {"value": "1", "measured_at": 1.0}}}',
        '{"conditions": CONDITIONS, "values": {"a": {"value": 1.0, "measured_at": -1.0}}}',
    ],
)
def test_a_damaged_file_counts_as_absent_and_that_is_said(content: str) -> None:
    opened().keep({"a": 1.0})
    path = opened().path
    path.write_text(content.replace("CONDITIONS", json.dumps(HERE)))
    again = opened()
    assert again.get("a") is None
    assert again.trouble is not None
    assert again.trouble.startswith(f"measured anew: {path} ")
    with pytest.raises(QuasarError):
        list(stored("times", positive))
    again.keep({"a": 2.0})
    assert (opened().trouble, opened().get("a") is None) == (None, False)


def test_what_cannot_be_written_is_used_and_said(folder: Path) -> None:
    folder.parent.write_text("a file")
    here = opened()
    here.keep({"a": 1.0})
    assert here.trouble is not None
    assert "not kept: " in here.trouble
    assert here.get("a") is not None


def test_nothing_is_left_of_a_write_that_failed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened().keep({"a": 1.0})

    def form(value: float) -> Any:
        raise RuntimeError("the form is gone")

    before = {path: path.read_bytes() for path in folder.iterdir()}
    broken = Measured(measured_file("times", HERE), HERE, positive, form)
    with pytest.raises(RuntimeError, match="gone"):
        broken.keep({"a": 2.0})
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
