"""Finished work is never lost: killed, or refused by the file system, at each step from a whole folder to a pair."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.handover_kills import ALONE
from helpers.quantize_cases import CONFIG, quantize

from quasar_core.errors import QuasarError, UsageError
from quasar_core.quantize import handover, run
from quasar_core.store import current_pair, list_pairs
from quasar_core.store.folders import STEPS, replaced_folder

pytest_plugins = ["helpers.quantize_fixtures"]
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "quantize_config.json",
    "quasar.json",
    "successors.tensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def kills(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `handover_kills.py` found; its runs are forks, so it is a process of its own.

    Without what is compiled, as compiling takes longer than all runs.
    """
    folder, tests = tmp_path_factory.mktemp("kills"), Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    environment |= {"QUASAR_CPU_PASS": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tests / "helpers/handover_kills.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks its runs")
@pytest.mark.parametrize(
    ("before", "step"), [*(("older", step) for step in STEPS), *(("empty", step) for step in ALONE)]
)
def test_a_run_killed_at_this_step_is_finished_by_the_next_without_work(
    kills: dict[str, Any], before: str, step: str
) -> None:
    case = kills[f"{before}, {step}"]
    assert case["killed"]
    assert case["again"], "the same command failed, or did work again"
    end = case["end"]
    assert end["beside"] == ["out"]
    assert set(end["inside"]) == FILES
    assert end["current"].endswith("/out")
    assert case["seed"] == 0, "the new verifier stands, not the older one"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks its runs")
def test_the_kills_were_where_they_are_named(kills: dict[str, Any]) -> None:
    after = {name: case["after"] for name, case in kills.items()}
    assert after["older, described"]["beside"] == ["out", "out.partial"]
    assert after["older, set aside"]["beside"] == ["out.partial", "out.replaced-by-quasar"]
    assert {"commits", "lock"} <= set(after["older, in place"]["inside"])
    assert "commits" not in after["older, commits cleared"]["inside"]
    assert after["older, commits cleared"]["beside"] == ["out", "out.replaced-by-quasar"]
    assert after["older, replaced one removed"]["beside"] == ["out"]
    assert after["older, replaced one removed"]["current"] is None
    assert after["older, recorded"]["current"] is not None
    assert "lock" in after["older, recorded"]["inside"]
    assert "lock" not in after["older, unlocked"]["inside"]


def die_at(monkeypatch: pytest.MonkeyPatch, wanted: str, error: BaseException) -> None:
    def reached(step: str) -> None:
        if step == wanted:
            raise error

    monkeypatch.setattr(handover, "reached", reached)


def forbid_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("load_calibration", "quantize_with", "assemble", "measure"):
        monkeypatch.setattr(run, name, lambda *_, **__: pytest.fail("work was done again"))


def test_a_home_that_can_no_longer_be_written_costs_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, home = source.parent / "tiny-gptq-4bit-g32", source.parent / "home"

    def lose_home(*_: Any) -> None:
        if home.is_dir():
            shutil.rmtree(home)
            home.write_text("")  # a file in the place of the folder

    with pytest.raises(QuasarError) as failure:
        quantize(source, progress=lose_home)
    assert "pairs.json cannot be" in str(failure.value)
    assert f"The verifier is finished in {output}; the same command records it" in str(failure.value)
    assert "\n" not in str(failure.value)
    home.unlink()
    forbid_work(monkeypatch)
    assert quantize(source).checkpoint == str(output)
    assert {path.name for path in output.iterdir()} == FILES
    assert [pair.verifier for pair in list_pairs()] == [str(output)]


def test_every_failure_after_it_exists_says_where_it_is(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a whole working folder, each time as it was: the stages before are not run again."""
    output, home = source.parent / "tiny-gptq-4bit-g32", source.parent / "home"
    partial, whole = output.with_name(f"{output.name}.partial"), source.parent / "whole"
    with monkeypatch.context() as patch:
        die_at(patch, "described", KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            quantize(source)
    shutil.copytree(partial, whole)
    forbid_work(monkeypatch)
    errors = (KeyboardInterrupt(), OSError(28, "No space left on device"), QuasarError("broken."))
    for step, error in itertools.product(("in place", "commits cleared", "replaced one removed", "recorded"), errors):
        for place in (output, partial, home):
            shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(whole, partial)
        with monkeypatch.context() as patch:
            die_at(patch, step, error)
            kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else QuasarError
            with pytest.raises(kind, match=r"is finished in .*tiny-gptq-4bit-g32; the same command records"):
                quantize(source)
        quantize(source)
        assert current_pair() is not None, (step, error)


def test_a_finished_verifier_that_no_pair_names_is_recorded_and_one_that_a_pair_names_is_refused(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Path(quantize(source).checkpoint)
    shutil.rmtree(source.parent / "home")
    with monkeypatch.context() as patch:
        forbid_work(patch)
        quantize(source, force=True)
        assert current_pair() is not None
        with pytest.raises(UsageError, match="exists; pass --force to replace it"):
            quantize(source)
    shutil.rmtree(source.parent / "home")
    with pytest.raises(UsageError, match="exists; pass --force"):
        quantize(source, replace(CONFIG, seed=5))
    before = (output / "quasar.json").stat().st_ino
    quantize(source, force=True, resume=False)
    assert (output / "quasar.json").stat().st_ino != before, "--no-resume makes it anew"


def test_another_command_after_a_kill_finds_the_old_verifier_again(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Path(quantize(source, replace(CONFIG, seed=7)).checkpoint)
    card = (output / "quasar.json").read_bytes()
    with monkeypatch.context() as patch:
        die_at(patch, "set aside", KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            quantize(source, force=True)
    assert not output.exists()
    with pytest.raises(UsageError, match="exists; pass --force to replace it"):
        quantize(source, replace(CONFIG, seed=9))
    assert (output / "quasar.json").read_bytes() == card
    assert not replaced_folder(output).exists()


def test_a_run_of_another_identity_cleans_what_an_earlier_one_left_and_records_it(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = source.parent / "tiny-gptq-4bit-g32"
    with monkeypatch.context() as patch:
        die_at(patch, "in place", KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            quantize(source)
    assert (output / "commits").is_dir()
    with pytest.raises(UsageError, match="exists; pass --force"):
        quantize(source, replace(CONFIG, seed=7))
    assert {path.name for path in output.iterdir()} == FILES
    assert current_pair() is not None


def test_what_a_replaced_folder_held_beside_quasars_files_is_kept(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Path(quantize(source).checkpoint)
    for round_number in (1, 2):
        (output / "notes.txt").write_text(f"mine {round_number}")
        (output / "sub").mkdir()
        (output / "sub" / "model.safetensors").write_text("mine too")
        quantize(source, replace(CONFIG, seed=round_number), force=True)
        assert {path.name for path in output.iterdir()} == FILES
    kept = sorted(source.parent.glob("*.replaced-by-quasar*"))
    assert [sorted(str(path.relative_to(place)) for path in place.rglob("*")) for place in kept] == [
        ["notes.txt", "sub", "sub/model.safetensors"]
    ] * 2
    assert (kept[0] / "notes.txt").read_text() == "mine 1"


def test_a_second_run_does_not_disturb_one_that_is_about_to_finish(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command given at each step of another one's end is refused, and that one ends well."""
    seen: list[str] = []

    def reached(step: str) -> None:
        if step in ("unlocked", "described", "set aside"):
            return  # before, the working folder's lock refuses; after, there is nothing to disturb
        with monkeypatch.context() as patch:
            patch.setattr(handover, "reached", lambda _: None)
            with pytest.raises(UsageError, match=r"Another run \(process \d+\) writes"):
                quantize(source, replace(CONFIG, seed=3), force=True)
        seen.append(step)

    monkeypatch.setattr(handover, "reached", reached)
    quantize(source)
    assert seen == ["in place", "commits cleared", "replaced one removed", "recorded"]
