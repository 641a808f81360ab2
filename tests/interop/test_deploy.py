"""`quasar deploy --run` with a real vLLM, its CPU build, on the demo model: `make scale` makes its environment.

Every server is started by the command itself; in float32, so that two tokens are hardly ever a rounding apart, but for
those that load GPTQ's codes into vLLM, which takes them in 16 bits alone. With
QUASAR_REAL_MODELS the folder of real models may be named whose smollm2 is served too. What vLLM's counters say is
printed, and how fast it was, prompts included: `-s` shows it. Speeds mean something on a quiet machine alone.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from interop.interop_cases import DEMO, missing, quantize

pytestmark = [
    pytest.mark.interop,
    missing("vllm"),
    pytest.mark.skipif(not (DEMO / "model.safetensors").exists(), reason="the demo model is not in this checkout"),
]
STARTING, ENDING = 600, 60  # seconds, on busy cores
NEW_TOKENS = 64
PROMPTS = [
    "def count_lines(path):\n    with open(path) as file:\n        return",
    "Write a function `read_lines` that reads a file and returns its lines.\n",
    "1 2 3 4 5 6 7 8 9 10 11 12",
]
REAL = os.environ.get("QUASAR_REAL_MODELS")


COUNTERS = {
    "drafted": "spec_decode_num_draft_tokens_total",
    "accepted": "spec_decode_num_accepted_tokens_total",
    "generated": "generation_tokens_total",
    "steps": "iteration_tokens_total_count",
}


@dataclass(frozen=True)
class Served:
    """What a server wrote, and its counters: drafted and accepted tokens, all generated ones, passes that gave some."""

    texts: list[str]
    drafted: int
    accepted: int
    generated: int
    steps: int

    @property
    def per_step(self) -> float:
        """Accepted tokens of a step that stand in a text: it yields them and one more.

        vLLM's counter of accepted tokens is no measure of it: it counts those behind the end of an answer too.
        """
        return (self.generated - self.steps) / self.steps


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@contextmanager
def deployed(model: Path, verifier: Path, log: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server that answers, as `quasar deploy --run` starts it; its address and the process of the command."""
    port = free_port()
    words = ["deploy", "--model", str(model), "--verifier", str(verifier), "--port", str(port), *options, "--run"]
    words += ["--no-check", "--max-context", "512"]
    engine = ["--enforce-eager", "--max-num-seqs", "4"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "quasar_cli", *words, "--", *engine],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            wait_for(f"http://127.0.0.1:{port}", process, log)
            yield f"http://127.0.0.1:{port}", process
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(ENDING)


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until it answers."""
    end = time.monotonic() + STARTING
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-3000:]
        if answers(address):
            return
        time.sleep(0.5)
    raise AssertionError(f"no answer within {STARTING} seconds:\n{log.read_text()[-3000:]}")


def answers(address: str) -> bool:
    try:
        return bool(urllib.request.urlopen(f"{address}/health", timeout=5).status == 200)
    except OSError:
        return False


def ask(address: str, temperature: float = 0) -> list[str]:
    """The answers to all prompts, one after another."""
    model = json.load(urllib.request.urlopen(f"{address}/v1/models"))["data"][0]["id"]
    texts = []
    fields = {"model": model, "max_tokens": NEW_TOKENS, "temperature": temperature, "seed": 1, "ignore_eos": True}
    for prompt in PROMPTS:
        body = {"prompt": prompt, **fields}
        request = urllib.request.Request(
            f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        texts.append(json.load(urllib.request.urlopen(request, timeout=300))["choices"][0]["text"])
    return texts


def counted(address: str) -> dict[str, int]:
    """vLLM's counters, without their labels."""
    text = urllib.request.urlopen(f"{address}/metrics").read().decode()
    rows = [line.rsplit(" ", 1) for line in text.splitlines() if line and line[0] != "#"]
    return {
        name.split("{")[0].removeprefix("vllm:"): int(float(value)) for name, value in rows if "_bucket" not in name
    }


def served(model: Path, verifier: Path, folder: Path, *options: str, dtype: str = "float32") -> Served:
    """Serve, ask, count."""
    with deployed(model, verifier, folder / "log.txt", "--dtype", dtype, *options) as (address, _):
        ask(address)  # the first answers find out what passes cost
        before, start = counted(address), time.perf_counter()
        texts = ask(address)
        seconds, after = time.perf_counter() - start, counted(address)
    found = Served(texts, **{name: after.get(field, 0) - before.get(field, 0) for name, field in COUNTERS.items()})
    print(
        f"{model.name} {' '.join(options)}: {found.accepted} of {found.drafted} drafted tokens accepted, "
        f"{found.per_step:.2f} a step; {found.generated} tokens at {found.generated / seconds:.1f} a second"
    )
    return found


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's, 4 bits."""
    with pytest.MonkeyPatch.context() as patch:
        return quantize(patch, DEMO, tmp_path_factory.mktemp("demo") / "out")


@pytest.fixture(scope="module")
def plain(verifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """vLLM's own greedy text of the target."""
    return served(DEMO, verifier, tmp_path_factory.mktemp("plain"), "--draft", "none")


@pytest.fixture(scope="module")
def plain_quantized(verifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """And of the low-bit copy."""
    folder = tmp_path_factory.mktemp("copy")
    return served(DEMO, verifier, folder, "--mode", "quantized", "--draft", "none", dtype="float16")


@pytest.fixture(scope="module")
def ngram(verifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """vLLM's own n-grams for the target, on two ranks."""
    options = ("--draft", "ngram", "--num-draft-tokens", "16", "--tensor-parallel", "2")
    return served(DEMO, verifier, tmp_path_factory.mktemp("ngram"), *options)


def test_the_low_bit_copy_is_served_alone_by_one_rank_and_by_two(
    plain_quantized: Served, verifier: Path, tmp_path: Path
) -> None:
    options = ("--mode", "quantized", "--draft", "none", "--tensor-parallel", "2")
    two = served(DEMO, verifier, tmp_path, *options, dtype="float16")
    assert two.texts == plain_quantized.texts


def test_n_grams_draft_for_the_low_bit_copy(plain_quantized: Served, verifier: Path, tmp_path: Path) -> None:
    found = served(DEMO, verifier, tmp_path, "--mode", "quantized", "--tensor-parallel", "2", dtype="float16")
    assert found.texts == plain_quantized.texts
    assert found.accepted > 0


def test_the_low_bit_copy_drafts_as_vllms_draft_model(verifier: Path, tmp_path: Path) -> None:
    """Texts are not compared: its codes run in 16 bits alone, where more ranks and more rows round otherwise."""
    found = served(DEMO, verifier, tmp_path, "--tensor-parallel", "2", dtype="bfloat16")
    assert found.accepted > found.drafted / 2


def test_our_proposer_on_two_ranks_accepts_more_than_vllms_n_grams(
    plain: Served, ngram: Served, verifier: Path, tmp_path: Path
) -> None:
    found = served(DEMO, verifier, tmp_path, "--draft", "quasar", "--tensor-parallel", "2")
    assert found.texts == ngram.texts == plain.texts
    assert found.per_step >= ngram.per_step


def test_a_killed_worker_is_no_end(plain: Served, verifier: Path, tmp_path: Path) -> None:
    """The server dies with it, and is started anew with the same answers."""
    log = tmp_path / "log.txt"
    options = ("--draft", "quasar", "--tensor-parallel", "2", "--dtype", "float32")
    with deployed(DEMO, verifier, log, *options) as (address, process):
        assert ask(address)[:1] == plain.texts[:1]
        assert all(ask(address, temperature=0.8))
        os.kill(workers_of(process.pid)[-1], signal.SIGKILL)
        end = time.monotonic() + ENDING
        while answers(address) and time.monotonic() < end:
            time.sleep(0.2)
        assert not answers(address), "it still answers"
        wait_for(address, process, log)
        assert ask(address) == plain.texts
    assert "started anew" in log.read_text()


def workers_of(pid: int) -> list[int]:
    """The processes below one that hold a part of the model."""
    import psutil

    found = [child for child in psutil.Process(pid).children(recursive=True) if is_worker(child)]
    assert len(found) == 2, [child.name() for child in psutil.Process(pid).children(recursive=True)]
    return [child.pid for child in found]


def is_worker(process: Any) -> bool:
    title = " ".join([process.name(), *process.cmdline()])
    return "Worker" in title


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """SmolLM2 and its copy, which QUASAR_REAL_VERIFIER may name."""
    model, kept = Path(str(REAL)) / "smollm2", os.environ.get("QUASAR_REAL_VERIFIER")
    with pytest.MonkeyPatch.context() as patch:
        return model, Path(kept) if kept else quantize(patch, model, tmp_path_factory.mktemp("real") / "out")


@pytest.fixture(scope="module")
def real_plain(real: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Served:
    """vLLM's own greedy text of it, on one rank."""
    return served(*real, tmp_path_factory.mktemp("real-plain"), "--draft", "none")


@pytest.mark.skipif(REAL is None, reason="QUASAR_REAL_MODELS names no folder of real models")
@pytest.mark.parametrize("ranks", ["1", "3"])
def test_a_real_model_is_drafted_for(ranks: str, real: tuple[Path, Path], real_plain: Served, tmp_path: Path) -> None:
    """SmolLM2's nine heads cannot be divided by two."""
    shared = ("--tensor-parallel", ranks)
    theirs = served(*real, tmp_path, "--draft", "ngram", "--num-draft-tokens", "16", *shared)
    ours = served(*real, tmp_path, "--draft", "quasar", *shared)
    assert ours.texts == theirs.texts == real_plain.texts
    assert ours.per_step >= theirs.per_step


@pytest.mark.skipif(REAL is None, reason="QUASAR_REAL_MODELS names no folder of real models")
def test_a_real_models_copy_is_served_alone_and_drafts(real: tuple[Path, Path], tmp_path: Path) -> None:
    """With n-grams the text of vLLM's own plain decoding; as a draft model, in 16 bits, acceptance alone is told."""
    alone = served(*real, tmp_path, "--mode", "quantized", "--draft", "none", dtype="float16")
    with_ngrams = served(*real, tmp_path, "--mode", "quantized", dtype="float16")
    assert with_ngrams.texts == alone.texts
    assert with_ngrams.drafted > 0
    drafting = served(*real, tmp_path, dtype="bfloat16")
    assert drafting.accepted > drafting.drafted / 2
