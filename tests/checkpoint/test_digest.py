"""A checkpoint's weights carry their digests, which `inspect --verify` and `--check-digest` hold them to."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.tiny_model import save_tiny_model

from quasar_cli.main import run
from quasar_core.api import decoding
from quasar_core.checkpoint.checks import NONE_RECORDED, check_digest
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.checkpoint.writer import ShardWriter
from quasar_core.errors import QuasarError

NAME = "tiny-gptq-4bit-g32"
GENERATE = ["generate", "--prompt", "abc", "--raw", "-n", "2", "--no-stats"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and its verifier."""
    folder = tmp_path_factory.mktemp("made")
    save_tiny_model(folder / "tiny", seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUASAR_HOME", str(folder / "home"))
        patch.chdir(folder)
        assert run(["quantize", "--group-size", "32", "--samples", "4", "--seq-len", "32", "tiny"]) == 0
    return folder


@pytest.fixture
def verifier(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The verifier, restored after the test; the home that knows it."""
    monkeypatch.setenv("QUASAR_HOME", str(made / "home"))
    monkeypatch.chdir(made)
    folder, kept = made / NAME, made / "kept"
    shutil.copytree(folder, kept)
    yield folder
    shutil.rmtree(folder)
    kept.rename(folder)


def flip_a_bit(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-40] ^= 4
    file.write_bytes(content)


def add_a_file(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "more.safetensors")


def rename_a_file(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")


def spoil_the_record(folder: Path) -> None:
    write_record(folder, ["x"])


def write_record(folder: Path, record: object) -> None:
    card = json.loads((folder / "quasar.json").read_text())
    card["sha256"] = record
    if record is None:
        del card["sha256"]
    (folder / "quasar.json").write_text(json.dumps(card))


def test_quantize_records_what_sha256sum_prints(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made / NAME
    card = json.loads((folder / "quasar.json").read_text())
    content = (folder / "model.safetensors").read_bytes()
    assert card["sha256"] == {"model.safetensors": hashlib.sha256(content).hexdigest()}
    assert run(["inspect", str(folder), "--verify"]) == 0
    assert "1 file of weights as they were written" in capsys.readouterr().out
    assert run(["inspect", str(folder), "--json"]) == 0
    assert "digest" not in json.loads(capsys.readouterr().out)


def test_shards_have_a_digest_each(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, max_bytes=64)
    for i in range(3):
        writer.add(f"t{i}", torch.full((10,), float(i)))
    digests = writer.close()
    assert sorted(digests) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert all(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digests[name] for name in digests)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip_a_bit, "model.safetensors is damaged or was changed: its SHA-256 is not the one in quasar.json."),
        (add_a_file, "more.safetensors is not among those that quasar.json records."),
        (rename_a_file, "model.safetensors is missing."),
        (spoil_the_record, "quasar.json holds no digests under sha256."),
    ],
)
def test_other_weights_are_refused(
    verifier: Path, damage: Callable[[Path], None], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(verifier)
    for command in (["inspect", str(verifier), "--verify"], [*GENERATE, "--check-digest"]):
        assert run(command) == 1
        assert said in " ".join(capsys.readouterr().err.split())
    with pytest.raises(QuasarError):
        decoding.load_pair(check_digest=True)


def test_loading_checks_when_asked_and_says_so(verifier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*GENERATE, "--check-digest"]) == 0
    assert "digest: 1 file of weights as they were written" in capsys.readouterr().err
    assert run([*GENERATE, "--verify", "full", "--check-digest"]) == 0
    assert "digest: no verifier is loaded, so nothing was checked" in capsys.readouterr().err
    assert "digest" not in "".join(decoding.load_pair().notes)
    Path("questions.jsonl").write_text('{"question_id": 1, "category": "c", "turns": ["abc"]}\n')
    bench = ["bench", "--dataset", "questions.jsonl", "--max-new-tokens", "2", "--arms", "quantized"]
    flip_a_bit(verifier)
    assert run([*bench, "--check-digest"]) == 1
    assert "is damaged or was changed" in capsys.readouterr().err


def test_a_checkpoint_without_digests_says_that_nothing_was_checked(
    verifier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_record(verifier, None)
    assert check_digest(VerifierCheckpoint(verifier)) == NONE_RECORDED
    assert run(["inspect", str(verifier), "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["digest"] == NONE_RECORDED
    assert run([*GENERATE, "--check-digest"]) == 0
    assert f"digest: {NONE_RECORDED}" in " ".join(capsys.readouterr().err.split())
