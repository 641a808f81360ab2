"""A verifier on its way to the hub: the real client against a small local server."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.hub_server import HubServer, log_in, use_hub
from helpers.quantize_cases import save_model
from helpers.verifier_cards import write_card

from quasar_cli import main
from quasar_core.errors import QuasarError, UsageError
from quasar_core.quantize import calibration
from quasar_core.store import push_folder, record_pair, resolve_model


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(uploads=tmp_path / "uploads") as server:
        use_hub(monkeypatch, server, tmp_path / "cache")
        log_in(monkeypatch)
        yield server


@pytest.fixture
def verifier(tmp_path: Path) -> Path:
    """A folder with what matters: configs, weights, the card."""
    folder = tmp_path / "tiny-gptq-4bit-g32"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    write_card(folder)
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# tiny\n")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_folder_arrives_as_it_is(hub: HubServer, verifier: Path, tmp_path: Path) -> None:
    assert push_folder(verifier, "somebody/tiny-4bit") == f"{hub.url}/somebody/tiny-4bit"
    assert files_of(tmp_path / "uploads" / "somebody" / "tiny-4bit") == files_of(verifier)
    assert "visibility" not in hub.created["somebody/tiny-4bit"]
    assert "private" not in hub.created["somebody/tiny-4bit"]
    (verifier / "README.md").write_text("---\nlibrary_name: transformers\n---\n# changed\n")
    push_folder(verifier, "somebody/tiny-4bit")
    assert files_of(tmp_path / "uploads" / "somebody" / "tiny-4bit") == files_of(verifier)


def test_what_quasar_does_not_write_into_a_verifier_is_not_uploaded(
    hub: HubServer, verifier: Path, tmp_path: Path
) -> None:
    """What a killed run leaves, and what a user put there."""
    own = files_of(verifier)
    for name in ("commits/block-00000.safetensors", "old/config.json", "lock", "notes.txt", "x.safetensors", ".env"):
        (verifier / name).parent.mkdir(exist_ok=True)
        (verifier / name).write_text("mine")
    push_folder(verifier, "somebody/tiny-4bit")
    uploaded = tmp_path / "uploads" / "somebody" / "tiny-4bit"
    assert {str(path.relative_to(uploaded)) for path in uploaded.rglob("*")} == own.keys()


def test_a_new_repository_is_private_where_asked_and_ones_own_without_a_name(hub: HubServer, verifier: Path) -> None:
    push_folder(verifier, "tiny-4bit", private=True)
    wanted = hub.created["somebody/tiny-4bit"]
    assert wanted.get("visibility") == "private" or wanted.get("private") is True


def test_a_pair_is_pushed_by_its_name(
    hub: HubServer, verifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record_pair("demo", verifier)
    assert main.run(["models", "push", "tiny-gptq-4bit-g32", "somebody/tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["url"] == f"{hub.url}/somebody/tiny"
    assert files_of(tmp_path / "uploads" / "somebody" / "tiny") == files_of(verifier)


def test_quantizing_pushes_what_it_made(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibration, "HELD_OUT_ROWS", 3)
    monkeypatch.setattr(calibration, "GREEDY_LENGTH", 40)
    source = save_model(tmp_path / "tiny", tied=True)
    command = f"quantize {source} --method w8a8 --samples 4 --seq-len 24 --push-to-hub somebody/tiny-w8a8 --json"
    assert main.run(command.split()) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["url"] == f"{hub.url}/somebody/tiny-w8a8"
    pushed = tmp_path / "uploads" / "somebody" / "tiny-w8a8"
    assert files_of(pushed) == files_of(Path(report["checkpoint"]))
    card = (pushed / "README.md").read_text()
    assert f"agreement on the target's greedy text | {report['fidelity']['agreement']:.4f}" in card
    assert "quasar quantize tiny --method w8a8" in card
    assert (resolve_model("somebody/tiny-w8a8").folder / "quasar.json").is_file()


@pytest.mark.parametrize(
    ("repository", "words"),
    [
        ("a/b/c", "a/b/c is not a hub id"),
        ("other/tiny", "This account may not write to other/tiny on the hub"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(hub: HubServer, verifier: Path, repository: str, words: str) -> None:
    with pytest.raises(QuasarError) as failure:
        push_folder(verifier, repository)
    assert str(failure.value).startswith(words)
    assert "\n" not in str(failure.value)


def test_nothing_is_quantized_for_nobody(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    source = save_model(tmp_path / "tiny", tied=True)
    assert main.run(["quantize", str(source), "--push-to-hub", "somebody/tiny"]) == 2
    assert "Nobody is logged in to the hub here: run `hf auth login`" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("tiny")] == ["tiny"]


def test_a_token_that_the_hub_does_not_know(hub: HubServer, verifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_in(monkeypatch, "hf_stolen")
    with pytest.raises(QuasarError, match="The hub does not know this token: log in again"):
        push_folder(verifier, "somebody/tiny")
    assert not hub.created


def test_no_connection(hub: HubServer, verifier: Path) -> None:
    hub.stop()
    with pytest.raises(QuasarError, match="the hub cannot be reached; check the connection"):
        push_folder(verifier, "somebody/tiny")


def test_a_folder_of_another_tool_is_not_pushed(hub: HubServer, verifier: Path) -> None:
    (verifier / "quasar.json").unlink()
    with pytest.raises(UsageError, match="was not written by quasar"):
        push_folder(verifier, "somebody/tiny")
    assert not hub.requests
