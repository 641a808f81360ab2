"""Models and datasets from a hub, asked by the real client of a small local server."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.hub_server import HubServer, use_hub
from safetensors.numpy import save_file

from quasar_core.errors import QuasarError
from quasar_core.store import resolve_model


def _make_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("card")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    save_file({"weight": np.ones((4, 4), np.float32)}, folder / "model.safetensors")
    save_file({"weight": np.ones((4, 4), np.float32)}, folder / "consolidated.safetensors")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    return folder


def _make_pickled(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    data = tmp_path / "served" / "data"
    data.mkdir(parents=True)
    (data / "question.jsonl").write_text('{"turns": ["Hello?"]}\n')
    model = _make_model(tmp_path / "served" / "tiny")
    models = {
        "test-org/tiny": model,
        "Qwen/Qwen-tiny": model,
        "test-org/gated": model,
        "test-org/pickled": _make_pickled(tmp_path / "served" / "pickled"),
        "test-org/bare": data,
    }
    with HubServer(models, {"test-org/data": data}, gated=frozenset({"test-org/gated"})) as server:
        use_hub(monkeypatch, server, tmp_path / "cache")
        monkeypatch.chdir(tmp_path)
        yield server


def test_a_model_is_downloaded_once_and_found_without_the_hub(hub: HubServer) -> None:
    source = resolve_model("test-org/tiny")
    assert (source.name, source.label, source.kind) == ("test-org/tiny", "test-org/tiny", "hub")
    assert sorted(path.name for path in source.folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    asked = [request for request in hub.requests if request.startswith("GET") and "/resolve/" in request]
    resolve_model("test-org/tiny")
    assert [request for request in hub.requests if request.startswith("GET") and "/resolve/" in request] == asked
    hub.stop()
    assert resolve_model("test-org/tiny") == source


def test_a_bare_name_finds_its_organisation(hub: HubServer) -> None:
    assert resolve_model("Qwen-tiny").name == "Qwen/Qwen-tiny"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "test-org/pickled",
            "test-org/pickled on the hub has no safetensors weights; pickled weights are never loaded.",
        ),
        ("test-org/bare", "test-org/bare on the hub holds no model: it has no config.json."),
        (
            "test-org/missing",
            "There is no folder test-org/missing here. The hub has no test-org/missing, or it is",
        ),
        ("Qwen-missing", "There is no folder Qwen-missing here. The hub has no Qwen/Qwen-missing, or it is private"),
        ("test-org/gated", "test-org/gated is gated on the hub: accept its terms there"),
        ("test-org/a..b", "There is no folder test-org/a..b here. test-org/a..b is not a hub id."),
    ],
)
def test_what_the_hub_cannot_give_is_one_sentence(hub: HubServer, name: str, words: str) -> None:
    with pytest.raises(QuasarError) as failure:
        resolve_model(name)
    assert str(failure.value).startswith(words)
    assert "\n" not in str(failure.value)


def test_no_connection_is_one_sentence(hub: HubServer) -> None:
    hub.stop()
    with pytest.raises(
        QuasarError,
        match=r"^There is no folder test-org/tiny here\. test-org/tiny is not .* the hub cannot be reached: check the "
        r"connection\.$",
    ):
        resolve_model("test-org/tiny")


def test_a_full_disk_is_one_sentence(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(QuasarError, match=r"^The disk is full: test-org/tiny could not be downloaded whole\.$"):
        resolve_model("test-org/tiny")


def test_the_server_serves_datasets_and_ranges(hub: HubServer) -> None:
    import urllib.request

    from huggingface_hub import hf_hub_download

    path = Path(hf_hub_download("test-org/data", "question.jsonl", repo_type="dataset"))
    assert json.loads(path.read_text()) == {"turns": ["Hello?"]}
    address = f"{hub.url}/datasets/test-org/data/resolve/main/question.jsonl"
    with urllib.request.urlopen(urllib.request.Request(address, headers={"Range": "bytes=2-6"})) as answer:
        assert (answer.status, answer.read()) == (206, b"turns")


def test_a_fresh_process_takes_the_endpoint_from_its_environment(hub: HubServer, tmp_path: Path) -> None:
    program = "from quasar_core.store import resolve_model; print(resolve_model('test-org/tiny').folder.parts[-4:-2])"
    environment = {**os.environ, **hub.environment(tmp_path / "other")}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "('hub', 'models--test-org--tiny')\n"
