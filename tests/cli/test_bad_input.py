"""Input that cannot be right, a kind a test: each ends in one sentence and the exit code 1 or 2, and nothing hangs."""

import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import transformers
from helpers.tiny_model import save_tiny_model

from quasar_cli.main import run

pytest_plugins = ["helpers.cli_fixtures"]
pytestmark = pytest.mark.usefixtures("own_home")

GENERATE = ["generate", "--prompt", "abc", "-n", "2", "--verify", "full", "--draft", "none", "--model", "tiny"]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A model in the working folder."""
    return save_tiny_model(tmp_path / "tiny")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The sentence that a command ends in."""
    code = run(arguments)
    shown = capsys.readouterr().err
    said = [line for line in shown.splitlines() if line.startswith("Error: ") or "Invalid value for" in line]
    assert code in (1, 2)
    assert len(said) == 1
    assert "Internal error" not in said[0]
    assert len(said[0]) > 10
    return said[0]


def change_config(folder: Path, **options: Any) -> None:
    """Set options of config.json; a value of None takes one away."""
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **options}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


# What stands in a config


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model_type": "nobody-has-it"}, "does not know the model type nobody-has-it"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}, "it runs only with --trust-remote-code."),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, not 0"),
        ({"vocab_size": -5}, "vocab_size must be at least 1, not -5"),
        ({"hidden_size": "64"}, "hidden_size must be a whole number or a list or null, not a text"),
        ({"hidden_size": 10**30}, "hidden_size is a number of more than 64 bits"),
        ({"architectures": "Qwen3ForCausalLM"}, "architectures must be a list or null, not a text"),
        ({"text_config": 3}, "text_config must be an object or null, not a whole number"),
        ({"attention_dropout": "much"}, "config.json is not a model's config: attention_dropout must be a "),
        ({"layer_types": ["full_attention"]}, "config.json is not a model's config: "),
        ({"attention_bias": ""}, 'config.json is not a model\'s config: attention_bias must be true or false, not "".'),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}},
            "rope_parameters.rope_theta must be a number",
        ),
        ({"use_cache": ["x"] * 50}, 'use_cache must be true or false, not ["x"'),
        ({"eos_token_id": {"x": 1}}, "eos_token_id"),
        ({"eos_token_id": "<eos>"}, "eos_token_id"),
        ({"rope_parameters": {"rope_type": "nobody-has-it"}}, "config"),
    ],
)
def test_a_config_that_cannot_be(
    tiny: Path, options: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny / "generation_config.json").unlink()
    change_config(tiny, **options)
    said = refused(capsys, *GENERATE)
    assert words in said
    assert not re.search("<class|alidation error|TypeError", said)
    assert len(said.replace(str(tiny), "")) < 200


@pytest.mark.parametrize("eos", [{"x": 1}, "<eos>", True, [0, None], 2**70])
def test_a_token_that_ends_texts_and_is_none(tiny: Path, eos: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (tiny / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert "generation_config.json" in refused(capsys, *GENERATE)


def test_code_of_a_models_own_runs_where_it_was_asked_for(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_config(tiny, model_type="own", auto_map={"AutoConfig": "own.Config"})
    (tiny / "own.py").write_text(
        "from transformers import PretrainedConfig\n"
        "open('it-ran', 'w').close()\n"
        "class Config(PretrainedConfig):\n    model_type = 'own'\n"
    )
    assert "it runs only with --trust-remote-code." in refused(capsys, *GENERATE)
    assert not Path("it-ran").exists()
    run([*GENERATE, "--trust-remote-code"])
    assert Path("it-ran").exists()


def test_no_code_is_run_without_asking_for_a_tokenizer(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads((tiny / "tokenizer_config.json").read_text())
    content |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tiny / "tokenizer_config.json").write_text(json.dumps(content))
    (tiny / "own.py").write_text("open('it-ran', 'w').close()\nclass Own: pass\n")
    run(GENERATE)
    assert not Path("it-ran").exists()
    assert "Internal" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("minimax", "it takes a cache of its own class"),
        ("rwkv", "it keeps a state that it takes in a way of its own"),
        ("cpmant", "it passes over a prompt with tokens of its own in front, by a cache of its own"),
        ("openai-gpt", "it takes no cache"),
        ("t5", "transformers has no causal language model of this kind"),
        ("nobody-has-it", f"transformers {transformers.__version__} does not know the model type nobody-has-it"),
    ],
)
@pytest.mark.parametrize("arguments", [GENERATE, ["quantize", "tiny"]], ids=["generate", "quantize"])
def test_an_architecture_that_is_not_supported_is_named(
    tiny: Path, kind: str, why: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    change_config(tiny, model_type=kind, architectures=["ItsOwnForCausalLM"])
    lists = "docs/architectures.md lists what is."
    assert refused(capsys, *arguments) == f"Error: The architecture ItsOwnForCausalLM is not supported: {why}; {lists}"


# Folders, and files of the system


def test_a_verifier_in_the_place_of_a_model_is_refused_in_every_mode(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny / "quasar.json").write_text('{"format_version": 1, "target": {}}')
    assert "tiny is a verifier, not a model: give it with --verifier" in refused(capsys, *GENERATE)


def test_a_command_that_is_proposed_can_be_typed_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model(tmp_path / "my tïny")
    said = refused(capsys, "generate", "abc", "--model", "my tïny")
    assert "`quasar quantize 'my tïny'`" in said


@pytest.mark.skipif(not Path("/proc/sys/kernel/random").is_dir(), reason="Linux has these files")
@pytest.mark.usefixtures("tiny")
def test_files_of_the_system_are_no_texts_to_draft_from(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, *GENERATE[:7], "--model", "tiny", "--draft-from", "/proc/sys/kernel/random")
    assert "no text was found there" in said


# Files of other kinds


def pipe(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def listening(path: Path) -> None:
    os.chdir(path.parent)  # the name of a socket is short
    socket.socket(socket.AF_UNIX).bind(path.name)


@pytest.mark.parametrize("kind", [pipe, zeros, listening, folder])
@pytest.mark.parametrize(
    "name",
    [
        "tiny/config.json",
        "tiny/generation_config.json",
        "tiny/tokenizer.json",
        "tiny/tokenizer_config.json",
        "tiny/chat_template.jinja",
        "tiny/model.safetensors",
        "tiny/model.safetensors.index.json",
    ],
)
def test_no_file_of_a_model(
    tiny: Path, name: str, kind: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    place = tiny.parent / name
    place.unlink(missing_ok=True)
    kind(place)
    os.chdir(tiny.parent)
    with unblocked(place):
        code = run(GENERATE)
    said = capsys.readouterr().err
    assert "Internal error" not in said
    assert code in (1, 2) or (kind is folder and code == 0)  # where the file may be missing, too
    if kind is not folder:
        assert f"{name} is a " in said


@contextmanager
def unblocked(place: Path) -> Iterator[None]:
    """Let whoever waits for a pipe's other end go on after a minute: a failure then, and no hang."""

    def open_other_end() -> None:
        os.close(os.open(place, os.O_RDWR | os.O_NONBLOCK))

    timer = threading.Timer(60, open_other_end)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@pytest.mark.parametrize("kind", [pipe, zeros, listening, folder])
@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--prompt-file", "it"],
        ["bench", "show", "it"],
        ["bench", "compare", "it", "it"],
        ["bench", "--dataset", "it", "--model", "demo"],
        ["quantize", "demo", "--dry-run", "--calibration", "it"],
        ["models"],
    ],
)
def test_no_file_of_a_users(
    arguments: list[str], kind: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "home" / "pairs.json" if arguments == ["models"] else tmp_path / "it"
    place.parent.mkdir(exist_ok=True)
    kind(place)
    os.chdir(tmp_path)
    if kind is folder and "--calibration" in arguments:
        assert "must be a file" in refused(capsys, *arguments)
    elif kind is folder and "--dataset" in arguments:
        assert "the path of a JSONL file" in refused(capsys, *arguments)
    elif kind is not folder or arguments != ["models"]:
        assert "not a file" in refused(capsys, *arguments)


def test_a_prompt_from_the_shells_own_pipe(
    stand_in_pair: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--prompt-file <(command)` names a pipe that this process holds open."""
    reading, writing = os.pipe()
    os.write(writing, b"a prompt")
    os.close(writing)
    assert run(["generate", "--prompt-file", f"/dev/fd/{reading}", "-n", "2"]) == 0
    os.close(reading)


# Names


LONG = "x" * 5000


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--prompt", "x", "--model", "{}"],
        ["generate", "--prompt", "x", "--model", "demo", "--verifier", "{}"],
        ["generate", "--prompt-file", "{}"],
        ["quantize", "{}"],
        ["quantize", "demo", "--output", "{}", "--dry-run"],
        ["quantize", "demo", "--calibration", "{}", "--dry-run"],
        ["inspect", "{}"],
        ["models", "use", "{}"],
        ["models", "remove", "{}"],
        ["bench", "show", "{}"],
        ["bench", "compare", "{}", "{}"],
        ["bench", "--dataset", "{}", "--model", "demo"],
        ["bench", "plot", "{}"],
    ],
)
@pytest.mark.parametrize("name", [LONG, f"{'y' * 300}/x", "a\0b", "~nobody-has-this-name/x", "\udcff", "", "loop"])
def test_names_that_cannot_be(arguments: list[str], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("loop").symlink_to("loop")
    if "--output" in arguments and name == "\udcff":
        pytest.skip("such a folder can be made")
    command = [argument.format(name) for argument in arguments]
    if arguments[:2] != ["quantize", "demo"] or "--output" not in arguments:
        refused(capsys, *command)
    else:
        assert run(command) in (0, 1, 2)
        assert "Internal error" not in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["QUASAR_HOME", "QUASAR_DATA"])
@pytest.mark.parametrize("value", ["it", "it/below", LONG, "~nobody-has-this-name", "loop", "/dev/null"])
def test_variables_that_cannot_be(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("it").write_text("")
    Path("loop").symlink_to("loop")
    monkeypatch.setenv(variable, value)
    if variable == "QUASAR_HOME":
        for arguments in (["models"], ["inspect"], ["models", "use", "x"], ["generate", "--prompt", "x"]):
            refused(capsys, *arguments)
    else:
        refused(capsys, "bench", "--dataset", "mt-bench", "--model", "demo")


# Numbers


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--prompt", "x", "--seed", str(2**64)],
        ["generate", "--prompt", "x", "--seed", str(-(2**70))],
        ["quantize", "demo", "--dry-run", "--seed", str(2**64)],
        ["bench", "--dataset", "demo", "--seed", str(2**64)],
        ["generate", "--prompt", "x", "--ngram-max", "1000000000"],
        ["generate", "--prompt", "x", "--temperature", "inf"],
        ["generate", "--prompt", "x", "--temperature", "nan"],
        ["generate", "--prompt", "x", "--repetition-penalty", "inf"],
        ["generate", "--prompt", "x", "--repetition-penalty", "nan"],
        ["generate", "--prompt", "x", "--top-p", "nan"],
        ["generate", "--prompt", "x", "--min-p", "nan"],
        ["generate", "--prompt", "x", "--max-new-tokens", "0"],
        ["generate", "--prompt", "x", "--max-context", "0", "--model", "demo"],
        ["generate", "--prompt", "x", "--max-context", "-5", "--model", "demo"],
        ["bench", "--dataset", "demo", "--repeats", "1000000000"],
        ["bench", "--dataset", "demo", "--limit", "0"],
        ["quantize", "demo", "--dry-run", "--samples", "0"],
        ["quantize", "demo", "--dry-run", "--samples", str(10**400)],
        ["quantize", "demo", "--dry-run", "--seq-len", str(10**30)],
        ["quantize", "demo", "--dry-run", "--bits", "nan"],
        ["quantize", "demo", "--dry-run", "--bits", "inf"],
        ["quantize", "demo", "--dry-run", "--bits", "1e300"],
        ["quantize", "demo", "--dry-run", "--damp", "nan"],
        ["quantize", "demo", "--dry-run", "--target-agreement", "nan"],
        ["quantize", "demo", "--dry-run", "--max-memory", "1e999GB"],
        ["quantize", "demo", "--dry-run", "--max-memory", "-1GB"],
        ["quantize", "demo", "--dry-run", "--max-memory", "nan"],
        ["generate", "--prompt", "x", "--model", "demo", "--device", "cuda:99999999999999999999"],
        ["generate", "--prompt", "x", "--model", "demo", "--device", "meta"],
        ["generate", "--prompt", "x", "--model", "demo", "--device", "cpu:7"],
        ["generate", "--prompt", "x", "--model", "demo", "--dtype", "int8"],
        ["generate", "--prompt", "x", "--model", "demo", "--verify", "full", "--kernel", "magic", "--verifier", "x"],
    ],
)
def test_numbers_that_cannot_be(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if "magic" not in arguments:
        refused(capsys, *arguments)


# Texts


@pytest.mark.parametrize(
    ("text", "told"),
    [("a\ud800b", r"\ud800, half of a character"), ("a\udcffb", r"not UTF-8 text: it holds the byte \xff")],
)
@pytest.mark.parametrize("option", ["--prompt", "--system", "--stop"])
def test_what_is_no_character(
    option: str, text: str, told: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in refused(capsys, *GENERATE, *([] if option == "--prompt" else ["--draft", "none"]), option, text)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        "{% macro again(x) %}{{ again(x) }}{{ again(x) }}{% endmacro %}{{ again(1) }}",
        "{% for",
        "{{ messages[0].nothing.at.all }}",
        "{{ 1 / 0 }}",
        "{{ range(10 ** 30) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception('no') }}",
        "{% include 'other' %}",
    ],
)
def test_templates_that_cannot_be(template: str, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tiny / "chat_template.jinja").write_text(template)
    assert "chat template" in refused(capsys, *GENERATE)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": ["x"]}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": []}},
        {"rms_norm_eps": "x"},
        {"sliding_window": "x", "use_sliding_window": True},
        {"tie_word_embeddings": "x"},
        {"layer_types": [1, 2]},
    ],
)
def test_options_of_another_type(changes: dict[str, Any], tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_config(tiny, **changes)
    refused(capsys, *GENERATE)
