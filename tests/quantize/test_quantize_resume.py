"""A verifier is written whole or not at all: interrupted, resumed, refused, replaced."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.quantize_cases import CONFIG, quantize, save_model, tensors_of

from quasar_core.errors import QuasarError, UsageError
from quasar_core.quantize import assemble, calibration, measure_fidelity, run
from quasar_core.quantize.solve import gptq
from quasar_core.store import current_pair

pytest_plugins = ["helpers.quantize_fixtures"]


def fail_once(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, error: BaseException, calls: int = 1) -> None:
    """Let the n-th call of a function raise, and all others through."""
    original, count = getattr(module, name), iter(range(1, 10_000))

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        if next(count) == calls:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, stand_in)


@pytest.mark.parametrize(
    ("module", "name", "calls", "error"),
    [
        (run, "load_calibration", 1, QuasarError("broken")),
        (gptq, "solve_layer", 11, KeyboardInterrupt()),  # inside the second block
        (run, "assemble", 1, QuasarError("broken")),
        (measure_fidelity, "measure_fidelity", 1, QuasarError("broken")),
        (assemble, "model_card", 1, KeyboardInterrupt()),
    ],
    ids=["calibrating", "solving", "writing", "measuring", "describing"],
)
def test_whole_or_not_at_all_and_resumed_to_the_same_bits(
    source: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, calls: int, error: BaseException
) -> None:
    output = source.parent / "tiny-gptq-4bit-g32"
    with monkeypatch.context() as patch:
        fail_once(patch, module, name, error, calls)
        with pytest.raises(type(error)):
            quantize(source)
    assert not output.exists()
    begun = name != "load_calibration"  # a run that finished nothing leaves nothing
    assert (source.parent / "tiny-gptq-4bit-g32.partial").is_dir() == begun
    assert current_pair() is None
    quantize(source)
    assert not (source.parent / "tiny-gptq-4bit-g32.partial").exists()
    resumed = tensors_of(output)
    quantize(source, output=source.parent / "straight")
    straight = tensors_of(source.parent / "straight")
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(tensor, straight[name]) for name, tensor in resumed.items())


def count_calls(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[int]:
    calls: list[int] = []
    original = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))[1])
    return calls


def interrupt(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a run that has finished its first block."""
    with monkeypatch.context() as patch:
        fail_once(patch, gptq, "solve_layer", QuasarError("broken"), 11)
        with pytest.raises(QuasarError, match="broken"):
            quantize(source)


@pytest.mark.parametrize(("resume", "texts", "layers"), [(True, 0, 7), (False, 2, 14)])
def test_what_a_second_run_does_again(
    source: Path, monkeypatch: pytest.MonkeyPatch, resume: bool, texts: int, layers: int
) -> None:
    interrupt(source, monkeypatch)
    written = count_calls(monkeypatch, calibration, "write_self_text")
    solved = count_calls(monkeypatch, gptq, "solve_layer")
    quantize(source, resume=resume)
    assert (len(written), len(solved)) == (texts, layers)


def test_a_run_of_another_identity_is_not_resumed(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(source, monkeypatch)
    with pytest.raises(
        UsageError, match=r"holds an interrupted run of another kind: seed was 0 and is 1\. Run it as it was begun, or"
    ):
        quantize(source, replace(CONFIG, seed=1))
    save_model(source, tied=True)
    with pytest.raises(UsageError, match=r"target was [0-9a-f]{12} and is [0-9a-f]{12}, seed was 0 and is 1\."):
        quantize(source, replace(CONFIG, seed=1))
    quantize(source, replace(CONFIG, seed=1), resume=False)


def said_by_the_next(source: Path, **options: Any) -> list[str]:
    """What a run tells of the interrupted one before it."""
    stages: list[str] = []
    quantize(source, progress=lambda stage, done, total: stages.append(stage), **options)
    return [stage for stage in stages if "interrupted" in stage]


def test_it_is_said_what_is_gone_on_from(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(source, monkeypatch)
    assert said_by_the_next(source) == ["going on from an interrupted run: its text, 1 block"]
    assert said_by_the_next(source, output=source.parent / "another") == []


def test_a_run_that_is_begun_anew_on_purpose_tells_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(source, monkeypatch)
    assert said_by_the_next(source, resume=False) == []


def test_a_run_that_left_no_word_of_its_options_is_begun_anew(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(source, monkeypatch)
    (next(source.parent.glob("*.partial")) / "commits" / "identity.json").unlink()
    assert said_by_the_next(source) == ["beginning anew, as an interrupted run left no word of its options"]


@pytest.mark.parametrize("content", ["", "[1]"])
def test_options_that_cannot_be_read(content: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(source, monkeypatch)
    (next(source.parent.glob("*.partial")) / "commits" / "identity.json").write_text(content)
    with pytest.raises(QuasarError, match=r"identity\.json .*\. Pass --no-resume to begin anew\.$"):
        quantize(source)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("calibration", r"is not readable \(.*\): pass --no-resume to begin anew\.$"),
        ("block-00000", r"is not a readable safetensors file: .*\. Delete it, and it is made anew\.$"),
    ],
)
def test_a_commit_that_was_cut_short(name: str, sentence: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(source, monkeypatch)
    file = next(source.parent.glob("*.partial")) / "commits" / f"{name}.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(QuasarError, match=rf"{name}\.safetensors {sentence}"):
        quantize(source)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("calibration", r"is not readable \(its check sum is of another content\): pass --no-resume to begin anew\.$"),
        ("block-00000", r"is not what was written: delete it, and it is made anew\.$"),
    ],
)
def test_a_commit_with_a_changed_byte(name: str, sentence: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(source, monkeypatch)
    file = next(source.parent.glob("*.partial")) / "commits" / f"{name}.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(QuasarError, match=rf"{name}\.safetensors {sentence}"):
        quantize(source)


def test_an_existing_output_is_refused_without_force_and_replaced_with_it(source: Path) -> None:
    output = Path(quantize(source).checkpoint)
    (output / "left-over").touch()
    before = tensors_of(output)
    with pytest.raises(UsageError, match="tiny-gptq-4bit-g32 exists; pass --force to replace it"):
        quantize(source)
    quantize(source, replace(CONFIG, seed=7), force=True)
    assert not (output / "left-over").exists()
    after = tensors_of(output)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_a_forced_run_that_fails_leaves_the_old_output(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Path(quantize(source).checkpoint)
    before = tensors_of(output)
    fail_once(monkeypatch, measure_fidelity, "measure_fidelity", QuasarError("broken"))
    with pytest.raises(QuasarError, match="broken"):
        quantize(source, replace(CONFIG, seed=7), force=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(output).items())


def test_a_quantized_model_is_refused(source: Path) -> None:
    quantize(source)
    with pytest.raises(
        UsageError, match="tiny-gptq-4bit-g32 is quantized already; name the model that it was made from"
    ):
        quantize(source.parent / "tiny-gptq-4bit-g32")


def test_a_model_that_mlx_quantized_is_refused(source: Path) -> None:
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization": {"group_size": 64, "bits": 4}}))
    with pytest.raises(UsageError, match="is quantized already; name the model that it was made from"):
        quantize(source)


def test_an_output_that_cannot_be_made(source: Path) -> None:
    (source.parent / "file").touch()
    with pytest.raises(QuasarError, match=r"x\.partial cannot be read: Not a directory"):
        quantize(source, output=source.parent / "file" / "x")
