"""Quantize once, generate, chat, inspect, remove: the real commands on a tiny random model, and what they refuse."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.hub_server import HubServer, use_hub
from helpers.stand_ins import type_lines
from helpers.tiny_model import save_tiny_model

from quasar_cli.main import run
from quasar_core import store
from quasar_core.decode.costs import cost_records
from quasar_core.decode.costs.pass_costs import PassCost

QUANTIZE = ["quantize", "--group-size", "32", "--samples", "4", "--seq-len", "32"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `tiny`, its verifier, another model `other`, and the home that knows the pair."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny_model(folder / "tiny", seed=0)
    save_tiny_model(folder / "other", seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUASAR_HOME", str(folder / "home"))
        patch.chdir(folder)
        assert run([*QUANTIZE, "tiny"]) == 0
    return folder


@pytest.fixture
def place(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That folder as the working folder, and its home."""
    monkeypatch.setenv("QUASAR_HOME", str(made / "home"))
    monkeypatch.chdir(made)
    return made


def test_quantize_writes_beside_the_target_and_makes_the_pair_current(place: Path) -> None:
    verifier = place / "tiny-gptq-4bit-g32"
    assert (verifier / "quasar.json").is_file()
    pair = store.current_pair()
    assert pair is not None
    assert (pair.target, pair.verifier) == (str(place / "tiny"), str(verifier))


def test_the_checkpoint_names_no_folder_of_this_machine(place: Path) -> None:
    card = json.loads((place / "tiny-gptq-4bit-g32" / "quasar.json").read_text())
    assert card["target"]["name"] == "tiny"
    for name in ("config.json", "README.md", "quantize_config.json"):
        assert str(place) not in (place / "tiny-gptq-4bit-g32" / name).read_text()


def test_exact_is_full_and_both_say_what_they_counted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = []
    for verify in ("full", "exact"):
        command = ["generate", "--prompt", "abcabcabc", "--raw", "-n", "12", "--window", "4", "--json"]
        assert run([*command, "--verify", verify]) == 0
        documents.append(json.loads(capsys.readouterr().out))
    full, exact = documents
    assert exact["token_ids"] == full["token_ids"]
    assert (full["verifier"], exact["verifier"]) == (None, "tiny-gptq-4bit-g32")
    assert (full["verified_by"], exact["verified_by"]) == ("target", "verifier")
    assert exact["stats"]["confirms"] > 0
    assert exact["stats"]["new_tokens"] == len(exact["token_ids"])


@pytest.mark.slow
def test_two_processes_that_begin_in_a_fresh_home_write_the_text_of_plain_decoding(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both compile, both measure what passes cost, and both keep it."""
    asked = ["--prompt", "abcabcabc", "--raw", "-n", "24", "--model", "tiny", "--verifier", "tiny-gptq-4bit-g32"]
    assert run(["generate", *asked, "--draft", "none", "--verify", "full", "--no-stats"]) == 0
    plain = capsys.readouterr().out
    environment = {**os.environ, "QUASAR_HOME": str(tmp_path / "fresh")}
    command = [sys.executable, "-m", "quasar_cli", "generate", *asked]
    runs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    shown = [process.communicate() for process in runs]
    assert [process.returncode for process in runs] == [0, 0], shown
    assert [out for out, _ in shown] == [plain, plain]
    assert not any("Traceback" in err or "damaged" in err for _, err in shown), shown
    left = [path.name for path in (tmp_path / "fresh").rglob("*") if path.name.endswith((".tmp", ".building"))]
    assert not left


def test_streamed_weights_write_the_same_and_that_is_said_before(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for options in (["--offload", "none"], ["--offload", "target"], ["--offload", "auto", "--max-memory", "100GB"]):
        assert run(["generate", "--prompt", "abcabc", "--raw", "-n", "12", *options]) == 0
        shown = capsys.readouterr()
        texts.append(shown.out)
        said = (
            "offload: all of the target's 2 blocks stay in memory, with all else" in shown.err
        )  # two buffers hold them
        assert said == (options[-1] == "target")
    assert len(set(texts)) == 1


@pytest.mark.parametrize(
    ("options", "sentence", "code"),
    [
        (["--max-memory", "1MB"], "--max-memory must be at least", 2),
        (["--max-memory", "much"], "--max-memory must be a size such as 8GB or 500MB, not much.", 2),
        (["--max-memory", "1GB", "--offload", "none"], "leave --offload none out", 2),
        (
            ["--max-device-memory", "1GB"],
            "--max-device-memory is for a GPU, and the device is cpu: see --max-memory.",
            2,
        ),
        (["--max-device-memory", "much"], "--max-device-memory must be a size such as 8GB or 500MB, not much.", 2),
        (
            ["--offload", "target", "--no-target", "--verify", "quantized"],
            "--offload target streams the target: leave --no-target out.",
            2,
        ),
    ],
)
def test_memory_that_cannot_do_is_refused(
    options: list[str], sentence: str, code: int, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "--prompt", "abc", *options]) == code
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_streamed_text_is_the_text(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for stream in ("--stream", "--no-stream"):
        assert run(["generate", "--prompt", "abc", "--raw", "-n", "16", stream, "--no-stats"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_quantized_runs_without_the_target(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--prompt", "abc", "--raw", "-n", "4", "--verify", "quantized", "--no-target", "-v"]
    assert run(command) == 0
    shown = capsys.readouterr().err
    assert "measured agreement with the target" in shown
    assert "- kernel: " in shown
    assert "target: " not in shown


def test_chat_takes_turns(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    type_lines(monkeypatch, "ab\ncd\n")
    assert run(["chat", "-n", "3", "--json"]) == 0
    turns = json.loads(capsys.readouterr().out)["turns"]
    assert len(turns) == 2
    assert turns[1]["stats"]["cached_tokens"] > 0


def test_inspect_the_current_pair(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["target"], document["packed_layers"]) == ("tiny", 14)
    assert document["bits_per_weight"] == pytest.approx(document["report"]["bits_per_weight"], abs=0.001)


def test_costs_are_remembered_until_doctor_measures_again(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The n-th measurement finds a pass to take n seconds, whatever it takes here."""
    counted = itertools.count(1)
    monkeypatch.setattr(
        cost_records, "measure_pass", lambda pair, model, **_: (PassCost((1, 33), (next(counted), 99.0)), None)
    )
    assert run(["doctor", "--remeasure", "--json"]) == 0
    speed = json.loads(capsys.readouterr().out)["speed"]
    assert [verifier["name"] for verifier in speed["verifiers"]] == ["tiny-gptq-4bit-g32", "8 bits, not made yet"]
    assert {speed["target"]["ms"][0], speed["verifiers"][0]["passes"]["ms"][0]} == {1000.0, 2000.0}
    kept = {path: path.read_text() for path in (place / "home" / "measured").glob("passes-*.json")}
    assert len(kept) == 2
    assert run(["generate", "--prompt", "abc", "--raw", "-n", "2", "-v"]) == 0
    shown = capsys.readouterr().err
    assert shown.count("remembered from") == 2
    assert {path: path.read_text() for path in kept} == kept
    assert run(["doctor", "--remeasure", "--json"]) == 0
    assert all(path.read_text() != text for path, text in kept.items())


def test_a_hub_model_is_quantized_into_the_home(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QUASAR_HOME", str(tmp_path / "home"))
    with HubServer({"Qwen/Qwen-tiny": place / "tiny"}) as hub:
        use_hub(monkeypatch, hub, tmp_path / "cache")
        assert run([*QUANTIZE, "Qwen-tiny", "--json"]) == 0
        shown = capsys.readouterr()
    assert "Qwen-tiny is Qwen/Qwen-tiny.\n" in shown.err
    verifier = tmp_path / "home" / "verifiers" / "Qwen--Qwen-tiny-gptq-4bit-g32"
    assert json.loads(shown.out)["checkpoint"] == str(verifier)
    assert run(["generate", "--prompt", "abc", "-n", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "Qwen/Qwen-tiny"
    assert run(["models", "remove", verifier.name, "--yes"]) == 0
    assert not verifier.exists()


def _sentence(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of what a failing command says; nothing of it may be on stdout."""
    assert run(arguments) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["quantize", "tiny", "--group-size", "32"], 2, "tiny-gptq-4bit-g32 exists; pass --force"),
        (["quantize", "tiny-gptq-4bit-g32"], 2, "is quantized already"),
        (["generate", "--prompt", "x", "--model", "other"], 2, "other has no verifier yet"),
        (["generate", "--prompt", "x", "--verifier", "nowhere"], 1, "nowhere does not exist"),
        (["generate", "--prompt", "x", "--verifier", "other"], 1, "is not a quantized checkpoint"),
        (["generate", "--prompt", "x" * 200, "--raw"], 2, "has 200 tokens, and the model's context holds 128."),
        (
            ["generate", "--prompt", "x" * 200, "--raw", "--max-context", "64"],
            2,
            "has 200 tokens, and the context that --max-context allows holds 64.",
        ),
        (
            ["generate", "--prompt", "x" * 200, "--raw", "--max-context", "4096"],
            2,
            "has 200 tokens, and the model's context holds 128.",
        ),
        (["generate", "--prompt", "x", "--no-target"], 2, "--no-target goes with --verify quantized"),
        (["generate", "--prompt", "x", "--kernel", "magic"], 2, "--kernel must be one of auto,"),
        (["generate", "--prompt", "x", "--device", "abacus"], 2, "--device"),
        (["generate", "--prompt", "x", "--dtype", "int1"], 2, "--dtype"),
    ],
)
def test_what_is_refused(
    place: Path, arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in _sentence(arguments, code, capsys)


def test_a_verifier_of_another_target_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--prompt", "x", "--model", "other", "--verifier", "tiny-gptq-4bit-g32"]
    assert "was not made from other" in _sentence(command, 1, capsys)


def test_cuda_where_there_is_none_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert "--device cuda" in _sentence(["generate", "--prompt", "x", "--device", "cuda"], 2, capsys)


def test_a_folder_without_weights_is_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(place / "tiny", tmp_path / "hollow")
    (tmp_path / "hollow" / "model.safetensors").rename(tmp_path / "hollow" / "pytorch_model.bin")
    for command in (["quantize"], ["generate", "--prompt", "x", "--model"]):
        sentence = _sentence([*command, str(tmp_path / "hollow")], 1, capsys)
        assert "holds only pickled weights, which are never loaded" in sentence


def test_without_a_pair_generate_says_how_to_make_one(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QUASAR_HOME", str(tmp_path))
    for command in (["generate", "--prompt", "x"], ["chat"]):
        assert "make one with `quasar quantize MODEL`" in _sentence(command, 2, capsys)
