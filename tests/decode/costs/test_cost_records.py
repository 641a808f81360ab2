"""Costs of passes: measured once, kept on the disk, measured again when a condition changes or a file is damaged."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_models import TableModel, make_pair

from quasar_core.decode.costs import cost_records
from quasar_core.decode.costs.cost_records import cost_record, forget_cost, stored_costs
from quasar_core.decode.costs.pass_costs import PassCost
from quasar_core.errors import QuasarError

# By the number of the measurement.
TROUBLE: dict[int, str] = {}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Measuring replaced by figures: the n-th measurement gives a cost of n seconds."""
    models: list[Any] = []

    def measure(pair: Any, model: Any, **_: Any) -> tuple[PassCost, str | None]:
        models.append(model)
        return PassCost((1, 33), (float(len(models)), 50.0)), TROUBLE.get(len(models))

    monkeypatch.setattr(cost_records, "measure_pass", measure)
    return models


def stored_pair(**changes: Any) -> Any:
    """A pair as a run loads it from files."""
    prints = {"target_fingerprint": "t", "verifier_fingerprint": "v"}
    return make_pair(TableModel(8, 0), TableModel(8, 1), **{**prints, **changes})


def the_file(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "home" / "measured").glob("passes-*.json")
    return path


def test_a_later_run_remembers(measured: list[Any], tmp_path: Path) -> None:
    first = cost_record(stored_pair(), "verifier")
    assert (first.remembered, first.when) == (False, "measured now")
    again = cost_record(stored_pair(), "verifier")
    assert len(measured) == 1
    assert (again.cost, again.remembered) == (first.cost, True)
    assert again.when == "remembered from less than a minute ago"
    assert json.loads(the_file(tmp_path).read_text())["conditions"]["role"] == "verifier"


@pytest.mark.parametrize(
    "changes", [{"target_fingerprint": "u"}, {"verifier_fingerprint": "w"}], ids=["target", "verifier"]
)
def test_another_model_is_measured_anew(measured: list[Any], changes: dict[str, str]) -> None:
    cost_record(stored_pair(), "verifier")
    assert not cost_record(stored_pair(**changes), "verifier").remembered


def test_a_targets_cost_does_not_depend_on_its_verifier(measured: list[Any]) -> None:
    cost_record(stored_pair(), "target")
    assert cost_record(stored_pair(verifier_fingerprint=None), "target").remembered
    assert len(measured) == 1


@pytest.mark.parametrize("condition", ["device", "kernels", "torch"])
def test_another_device_or_version_is_measured_anew(
    measured: list[Any], condition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost_record(stored_pair(), "target")
    own = cost_records.measured_on
    monkeypatch.setattr(cost_records, "measured_on", lambda *where: {**own(*where), condition: "another"})
    assert not cost_record(stored_pair(), "target").remembered


def test_measuring_again_replaces_what_was_kept(measured: list[Any]) -> None:
    pair = stored_pair()
    assert cost_record(pair, "target").cost(1) == 1.0
    assert cost_record(pair, "target", remeasure=True).cost(1) == 2.0
    assert cost_record(stored_pair(), "target").cost(1) == 2.0


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "is not readable JSON (Expecting value in line 1, column 1)"),
        ("[]", "does not hold a JSON object"),
        ('{"conditions": {}}', "is damaged"),
        ('{"conditions": {}, "values": {"cost": {"measured_at": 1.0, "value": {"1": 1.0}}}}', "is damaged"),
    ],
)
def test_a_damaged_file_is_measured_anew_and_said(
    measured: list[Any], tmp_path: Path, content: str, reason: str
) -> None:
    cost_record(stored_pair(), "target")
    path = the_file(tmp_path)
    path.write_text(content)
    record = cost_record(stored_pair(), "target")
    assert record.when == f"measured now (measured anew: {path} {reason})"
    assert len(measured) == 2
    assert cost_record(stored_pair(), "target").remembered


def test_what_cannot_be_kept_is_used_and_said(measured: list[Any], tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    record = cost_record(stored_pair(), "target")
    assert record.cost(1) == 1.0
    assert "not kept: " in record.when


def test_models_without_files_are_measured_in_each_run(measured: list[Any], tmp_path: Path) -> None:
    pair = stored_pair(target_fingerprint=None)
    for _ in range(2):
        cost_record(pair, "target")
    cost_record(stored_pair(target_fingerprint=None), "target")
    assert len(measured) == 2
    assert not (tmp_path / "home").exists()


def test_the_stored_costs_come_latest_first(measured: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    for age, name in ((90_000, "a"), (7_200, "b")):
        monkeypatch.setattr(cost_records.time, "time", lambda age=age: now - age)
        cost_record(stored_pair(target_fingerprint=name), "target")
    monkeypatch.setattr(cost_records.time, "time", lambda: now)
    records = list(stored_costs())
    assert [record.conditions["target"] for record in records] == ["b", "a"]
    assert [record.when for record in records] == ["remembered from 2 hours ago", "remembered from 1 day ago"]


def test_a_damaged_store_is_an_error_for_who_lists_it(measured: list[Any], tmp_path: Path) -> None:
    cost_record(stored_pair(), "target")
    the_file(tmp_path).write_text("{")
    with pytest.raises(QuasarError, match="is not readable JSON"):
        list(stored_costs())


@pytest.mark.parametrize(
    "value", [{}, {"1": -1.0}, {"4": 1.0, "1": 2.0}, {"1": 2.0, "4": 1.0}, {"one": 1.0}, {"1": "1"}, [1.0]]
)
def test_values_that_are_no_costs_are_damage(measured: list[Any], tmp_path: Path, value: Any) -> None:
    cost_record(stored_pair(), "target")
    content = json.loads(the_file(tmp_path).read_text())
    content["values"]["cost"]["value"] = value
    the_file(tmp_path).write_text(json.dumps(content))
    assert "is damaged" in cost_record(stored_pair(), "target").when


def test_what_a_busy_machine_gave_is_used_said_and_not_kept(
    measured: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TROUBLE, 1, "the machine was busy: other programs took 53 % of the cores")
    record = cost_record(stored_pair(), "target")
    assert record.cost(1) == 1.0
    assert record.when == ("measured now (not kept, as the machine was busy: other programs took 53 % of the cores)")
    assert not (tmp_path / "home").exists()
    assert not cost_record(stored_pair(), "target").remembered
    assert cost_record(stored_pair(), "target").remembered


def test_what_was_wrong_is_forgotten(measured: list[Any]) -> None:
    cost_record(stored_pair(), "target")
    forget_cost(stored_pair(), "target")
    assert not cost_record(stored_pair(), "target").remembered
