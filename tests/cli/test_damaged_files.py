"""Whatever a file holds, a command answers or refuses in one sentence: no traceback, no internal error, no hang.

The default run tries a few dozen damaged files; `-m slow` tries 2,000, or as many as QUASAR_DAMAGED says.
"""

import os
import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from helpers.bench_records import make_results
from helpers.mutations import damage
from helpers.tiny_model import save_tiny_model

from quasar_cli.main import run
from quasar_core.bench.results import write_results
from quasar_core.timing import Timing

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
QUESTION = '{"question_id": 1, "category": "c", "turns": ["abc", "de"]}\n'
DOCUMENTS = (
    '{"text": "abcdefgh abcdefgh"}',
    '{"messages": [{"role": "user", "content": "abc"}]}',
    '{"conversations": [{"from": "human", "value": "abc"}]}',
    '{"turns": ["abc"]}',
)
FEW, MANY = 60, int(os.environ.get("QUASAR_DAMAGED", "2000"))
HANG_S = 120  # of one command, which takes about a second


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `tiny`, its verifier, the home that knows the pair and its measured costs, and texts."""
    place = tmp_path_factory.mktemp("sound")
    save_tiny_model(place / "tiny")
    (place / "tiny" / "chat_template.jinja").write_text(TEMPLATE)
    with in_place(place), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Timing, "trouble", None)  # as on a machine where nothing else runs
        assert run(["quantize", "tiny", "--group-size", "32", "--samples", "4", "--seq-len", "32"]) == 0
        assert run(["generate", "--prompt", "abc", "-n", "4"]) == 0  # keeps the costs of passes
    shard_with_an_index(place / "tiny")
    write_results(make_results(), place / "results.json")
    (place / "prompt.txt").write_text("abc")
    (place / "questions.jsonl").write_text(QUESTION)
    (place / "calibration.jsonl").write_text("\n".join(document for document in DOCUMENTS for _ in range(9)))
    return place


def shard_with_an_index(folder: Path) -> None:
    """Give a model of one file an index of it."""
    from quasar_core.files import write_json
    from quasar_core.store.safetensors_header import INDEX_NAME, read_headers

    names = {entry.name: "model.safetensors" for entry in read_headers(folder)}
    write_json(folder / INDEX_NAME, {"metadata": {}, "weight_map": names})


@contextmanager
def in_place(place: Path) -> Iterator[None]:
    """Work in a folder, with a home of its own there; nothing is measured anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUASAR_HOME", str(place / "home"))
        patch.setenv("NO_COLOR", "1")
        patch.chdir(place)
        patch.setattr("quasar_core.bench.machine.read_bandwidth", lambda device: 1e10)
        patch.setattr("quasar_core.kernels.select.describe_kernels", lambda *arguments: [])
        yield


GENERATE = ["generate", "--prompt", "abc", "-n", "4"]
PLAN = ["quantize", "tiny", "--group-size", "32", "--dry-run"]
MODEL_COMMANDS = (
    [*GENERATE, "--model", "tiny", "--verify", "full"],
    [*GENERATE, "--model", "tiny", "--verify", "full", "--temperature", "1", "--draft", "none"],
    PLAN,
    [*PLAN, "--method", "w8a8"],
)
VERIFIER_COMMANDS = (
    ["inspect"],
    ["inspect", "-v"],
    ["inspect", "--json"],
    [*GENERATE, "--verify", "exact"],
    [*GENERATE, "--verify", "quantized", "--no-target"],
)
RESULT_COMMANDS = (
    ["bench", "show", "results.json"],
    ["bench", "show", "results.json", "--json"],
    ["bench", "show", "results.json", "--csv"],
    ["bench", "compare", "results.json", "sound.json"],
    ["bench", "compare", "sound.json", "results.json", "--json"],
)
HOME_COMMANDS = (
    ["models"],
    ["models", "--json"],
    ["models", "use", "tiny-gptq-4bit-g32"],
    ["inspect"],
    ["doctor"],
    GENERATE,
)

# Which commands read a file; each damaged file is shown to one of them.
READERS: dict[str, tuple[list[str], ...]] = {
    "tiny/config.json": (*MODEL_COMMANDS, *MODEL_COMMANDS, ["inspect", "--against", "tiny", "--text", "prompt.txt"]),
    "tiny/generation_config.json": MODEL_COMMANDS[:2],
    "tiny/tokenizer.json": MODEL_COMMANDS,
    "tiny/tokenizer_config.json": MODEL_COMMANDS,
    "tiny/chat_template.jinja": MODEL_COMMANDS[:2],
    "tiny/model.safetensors": MODEL_COMMANDS,
    "tiny/model.safetensors.index.json": MODEL_COMMANDS,
    "tiny-gptq-4bit-g32/config.json": VERIFIER_COMMANDS,
    "tiny-gptq-4bit-g32/quantize_config.json": VERIFIER_COMMANDS,
    "tiny-gptq-4bit-g32/quasar.json": VERIFIER_COMMANDS,
    "tiny-gptq-4bit-g32/model.safetensors": VERIFIER_COMMANDS,
    "home/pairs.json": HOME_COMMANDS,
    "home/measured/passes-*.json": (["doctor"], ["inspect"], GENERATE),
    "results.json": RESULT_COMMANDS,
    "prompt.txt": (["generate", "--prompt-file", "prompt.txt", "-n", "4", "--verify", "full"],),
    "questions.jsonl": (
        ["bench", "--dataset", "questions.jsonl", "--arms", "vanilla", "-n", "2", "--output", "out.json"],
    ),
    "calibration.jsonl": (
        [*PLAN, "--calibration", "calibration.jsonl", "--seq-len", "16"],
        ["inspect", "--against", "tiny", "--text", "calibration.jsonl"],
    ),
}


def try_damaged(sound: Path, place: Path, number: int) -> tuple[str, str, int]:
    """Damage one file of a copy of `sound`, run one command that reads it: the command, the damage, the exit code."""
    chance = random.Random(f"case {number}")
    shutil.copytree(sound, place)
    shutil.copy(place / "results.json", place / "sound.json")
    name = sorted(READERS)[number % len(READERS)]
    path = chance.choice(sorted(place.glob(name)))
    command = chance.choice(READERS[name])
    move_pair(place, sound)
    done = damage(path, number)
    if name.endswith("quantize_config.json"):
        forget_section(path.with_name("config.json"))
    with in_place(place), no_hang():
        code = run(command)
    shutil.rmtree(place)
    return " ".join(command), f"{name}: {done}", code


def move_pair(place: Path, sound: Path) -> None:
    """Let the copied home name the copied folders."""
    pairs = place / "home" / "pairs.json"
    pairs.write_text(pairs.read_text().replace(str(sound), str(place)))


def forget_section(config: Path) -> None:
    """A config without the quantization section, so that quantize_config.json is read."""
    import json

    content = json.loads(config.read_text())
    content.pop("quantization_config")
    config.write_text(json.dumps(content))


@contextmanager
def no_hang(seconds: int = HANG_S) -> Iterator[None]:
    """AssertionError where a command does not come to an end."""

    def hang(number: int, frame: FrameType | None) -> Any:
        raise KeyboardInterrupt  # which no command takes for a failure of its own

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check(case: tuple[str, str, int], shown: Any) -> str | None:
    """What is wrong with how a command ended, or None."""
    command, done, code = case
    said = shown.err.strip().splitlines()
    bad = ("Internal error", "panicked", *(() if "-v" in command.split() else ("Traceback",)))
    wrong = [line for line in said if any(word in line for word in bad)]
    if code not in (0, 1, 2):
        wrong.append(f"exit code {code}")
    if code and sum(line.startswith("Error: ") for line in said) != 1:
        wrong.append(f"not one sentence: {said[-3:]}")
    return f"{command} | {done} | {wrong}" if wrong else None


def try_all(sound: Path, tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The numbered cases' failures."""
    failures = []
    for number in range(count):
        case = try_damaged(sound, tmp_path / "place", number)
        if wrong := check(case, capsys.readouterr()):
            failures.append(f"case {number}: {wrong}")
            with capsys.disabled():
                print(failures[-1], flush=True)
    return failures


def test_damaged_files_are_refused_in_one_sentence(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert try_all(sound, tmp_path, FEW, capsys) == []


@pytest.mark.slow
def test_many_damaged_files_are_refused_in_one_sentence(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert try_all(sound, tmp_path, MANY, capsys) == []
