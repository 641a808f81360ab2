"""Other programs as arms of a bench: the same text, honest counts, and a reason where one fails."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.bench_pair import make_pair as make_counting_pair
from helpers.decoder_cases import CASES, CPU, FLOAT, random_prompts, random_tokens, save_model
from helpers.near_ties import clear_prompt
from helpers.tiny_models import make_pair

from quasar_core.bench.arms import ARMS, BenchConfig, PeerOptions
from quasar_core.bench.datasets import Dataset, Question
from quasar_core.bench.peers import llama_cpp, start
from quasar_core.bench.peers.process import Peer, PeerFailure, TalkingPeer, stats_of
from quasar_core.bench.peers.talk import Ask, Told
from quasar_core.bench.peers.transformers_process import TransformersPeer
from quasar_core.bench.peers.vllm_process import speculative
from quasar_core.bench.run import run_bench
from quasar_core.config import GenerationConfig, Request
from quasar_core.decode.generator import Generator
from quasar_core.decode.logits.processors import read_processors
from quasar_core.errors import UsageError
from quasar_core.models.pair import Pair
from quasar_core.models.weights.lean_weights import load_target


@pytest.fixture
def prompt(tmp_path: Path) -> list[int]:
    """One after which the best token always leads clearly."""
    model = save_model(tmp_path, *CASES["qwen3"])
    return clear_prompt(model, random_prompts(8, repeats=3), 40)


@pytest.fixture
def pair(tmp_path: Path, prompt: list[int]) -> Pair:
    return make_pair(load_target(tmp_path, CPU, FLOAT), target_folder=tmp_path)


class InThisProcess(Peer):
    """transformers without a process of its own."""

    def __init__(self, name: str, pair: Pair, config: BenchConfig) -> None:
        super().__init__(name, pair, config.ignore_eos)
        self.peer = TransformersPeer(start.settings(ARMS[name], pair, config))

    def ask(self, ask: Ask) -> Told:
        return self.peer.answer(ask)


def config(arm: str, **changes: Any) -> BenchConfig:
    return BenchConfig((arm,), **{"max_new_tokens": 40, **changes})


@pytest.mark.parametrize("draft", ["none", "ngram", "assistant"])
def test_greedy_text_is_ours(pair: Pair, prompt: list[int], tmp_path: Path, draft: str) -> None:
    arm = {"none": "transformers", "ngram": "transformers-pld", "assistant": "transformers-assisted"}[draft]
    assistant = PeerOptions(assistant=str(tmp_path))  # the model itself, which always agrees
    pieces: list[str] = []
    ours = Generator(pair, GenerationConfig(40, "full", "none", ignore_eos=True)).generate(prompt)
    peer = InThisProcess(arm, pair, config(arm, ignore_eos=True, peers=assistant))
    theirs = peer.generate(prompt, pieces.append, Request(40, 0))
    assert theirs.token_ids == ours.token_ids
    assert theirs.finish_reason == "length"
    assert pieces == [theirs.text]
    stats = theirs.stats
    assert (stats.new_tokens, stats.prompt_tokens) == (40, 24)
    assert stats.decode_s > 0
    assert stats.ttft_s == stats.prefill_s > 0
    if draft == "none":
        assert (stats.steps, stats.prefill_tokens, stats.acceptance_length) == (39, 1, 1.0)
    else:
        assert stats.steps < 39


def test_the_seed_decides_sampled_text(pair: Pair) -> None:
    peer = InThisProcess("transformers", pair, config("transformers"))
    peer.temperature = 1.0
    first, again = (peer.generate(random_tokens(8), request=Request(20, 3)).token_ids for _ in range(2))
    assert first == again != peer.generate(random_tokens(8), request=Request(20, seed=4)).token_ids


def test_draws_are_from_all_of_the_distribution_whatever_the_models_files_say(pair: Pair, tmp_path: Path) -> None:
    drawn = []
    for narrow in (
        {},
        {"do_sample": True, "top_k": 1, "top_p": 0.1, "min_p": 0.99, "typical_p": 0.1, "epsilon_cutoff": 0.5},
    ):
        (tmp_path / "generation_config.json").write_text(json.dumps({"pad_token_id": 0, **narrow}))
        peer = InThisProcess("transformers", pair, config("transformers"))
        peer.temperature = 1.0
        drawn.append(peer.generate(random_tokens(8), request=Request(20, 3)).token_ids)
    assert drawn[0] == drawn[1]


def test_the_end_of_text_ends_an_answer(pair: Pair, prompt: list[int]) -> None:
    plain = GenerationConfig(40, "full", "none")
    token = Generator(pair, plain).generate(prompt).token_ids[5]
    pair.eos_ids = frozenset({token})
    ours = Generator(pair, plain).generate(prompt)
    theirs = InThisProcess("transformers", pair, config("transformers")).generate(prompt, request=Request(40, 0))
    assert (theirs.token_ids, theirs.finish_reason) == (ours.token_ids, "eos")


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_processors_are_applied_or_left_out_in_every_arm(pair: Pair, tmp_path: Path, ignore_eos: bool) -> None:
    options = {"repetition_penalty": 1.5, "min_new_tokens": 5, "exponential_decay_length_penalty": [1, 1.2]}
    (tmp_path / "generation_config.json").write_text(json.dumps({**options, "eos_token_id": 2, "pad_token_id": 0}))
    pair.processors, pair.eos_ids = read_processors(tmp_path), frozenset([2])
    texts = []
    for processors in (True, False):
        asked = config("transformers-pld", max_new_tokens=16, ignore_eos=ignore_eos, processors=processors)
        ours = GenerationConfig(16, "full", "ngram", num_draft_tokens=4, ignore_eos=ignore_eos, processors=processors)
        expected = Generator(pair, ours).generate(random_tokens(8)).token_ids
        peer = InThisProcess("transformers-pld", pair, asked)
        assert peer.generate(random_tokens(8), request=Request(16, 0)).token_ids == expected
        texts.append(expected)
    assert texts[0] != texts[1]


def test_a_peer_runs_in_a_process_of_its_own(pair: Pair, prompt: list[int], tmp_path: Path) -> None:
    """Every answer of a bench; the process has ended with it."""
    question = Question(1, "c", ("w5 w6",))
    run = BenchConfig(("vanilla", "transformers"), max_new_tokens=8)
    results = run_bench(pair, [Dataset("d", (question,))], run, tmp_path / "r.json")
    own, theirs = results.rows
    assert theirs.error is None
    assert theirs.token_ids == own.token_ids
    assert theirs.others is None
    assert "transformers" in results.run.peers["transformers"]


# A program that fails

TALKS = """
import sys
sys.path[:0] = [{folder!r}]
from talk import Told, serve

def begin(settings):
    {begin}
    def answer(ask):
        {answer}
    return "toy 1", answer

serve(begin)
"""


def talking(tmp_path: Path, begin: str = "pass", answer: str = "return Told([7, 8], 0.5, 0.25, 1)") -> TalkingPeer:
    folder = str(Path(start.__file__).parent)
    script = tmp_path / "peer.py"
    script.write_text(TALKS.format(folder=folder, begin=begin, answer=answer))
    return TalkingPeer("toy", make_counting_pair(), True, [sys.executable, str(script)], {})


def test_what_a_peer_prints_disturbs_nothing(tmp_path: Path) -> None:
    peer = talking(tmp_path, begin="print('loading')")
    result = peer.generate([3], request=Request(4, 0))
    assert (peer.version, result.token_ids, result.text) == ("toy 1", [7, 8], "w7 w8")
    assert (result.stats.prefill_s, result.stats.decode_s, result.stats.steps) == (0.5, 0.25, 1)
    peer.close()


@pytest.mark.parametrize(
    ("begin", "answer", "reason"),
    [
        ("raise ValueError('no such model')", "pass", "ValueError: no such model"),
        ("import os; print('segment', file=sys.stderr); sys.stderr.flush(); os._exit(3)", "pass", "has ended: segment"),
        ("pass", "raise RuntimeError('out of memory')", "RuntimeError: out of memory"),
        ("pass", "import os; os._exit(1)", "it has ended: it printed nothing"),
        (
            "for line in ('0.01 I begins', '0.02 E bad magic', '0.03 E no model', '0.04 I ends'): print(line)\n"
            "    import os; sys.stdout.flush(); os._exit(1)",
            "pass",
            "has ended: bad magic; no model$",
        ),
    ],
)
def test_why_a_peer_fails(tmp_path: Path, begin: str, answer: str, reason: str) -> None:
    def ask() -> None:
        peer = talking(tmp_path, begin, answer)
        try:
            peer.generate([3], request=Request(4, 0))
        finally:
            peer.close()

    with pytest.raises(PeerFailure, match=reason):
        ask()


def test_a_peer_takes_the_processes_that_it_began_with_it(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    spawn = "import subprocess; p = subprocess.Popen(['sleep', '1000']); open(settings['file'], 'w').write(str(p.pid))"
    script = tmp_path / "peer.py"
    folder = str(Path(start.__file__).parent)
    script.write_text(TALKS.format(folder=folder, begin=spawn, answer="pass"))
    peer = TalkingPeer("toy", make_counting_pair(), True, [sys.executable, str(script)], {"file": str(begun)})
    child = int(begun.read_text())
    os.kill(child, 0)
    peer.close()
    end = time.monotonic() + 60
    while not has_ended(child) and time.monotonic() < end:  # it was told to, and gets no say; the system takes a moment
        time.sleep(0.01)
    assert has_ended(child)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends a process with the one that began it")
def test_a_peer_ends_with_a_bench_that_is_killed() -> None:
    bench = (
        "import os, signal; from quasar_core.bench.peers.process import Child; "
        "print(Child(['sleep', '1000'], with_pipes=False).process.pid, flush=True); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", bench], capture_output=True, text=True)
    child, end = int(done.stdout), time.monotonic() + 60
    while not has_ended(child) and time.monotonic() < end:
        time.sleep(0.01)
    assert has_ended(child)


def has_ended(process: int) -> bool:
    """Whether a process is gone, or waits to be collected."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True)
    return not done.stdout.strip() or done.stdout.startswith("Z")


def test_a_peer_that_fails_is_rows_with_its_reason(tmp_path: Path) -> None:
    pair = make_counting_pair()  # which has no files
    run = BenchConfig(("vanilla", "transformers"), max_new_tokens=4)
    results = run_bench(pair, [Dataset("d", (Question(1, "c", ("w3", "w4")),))], run, tmp_path / "r.json")
    assert [(row.arm, row.error) for row in results.rows] == [
        ("vanilla", None),
        ("vanilla", None),
        ("transformers", "the arm transformers needs the target's files"),
        ("transformers", "an earlier turn failed"),
    ]


@pytest.mark.parametrize(
    ("arm", "peers", "sentence"),
    [
        ("transformers-assisted", {}, "needs a small model of the same vocabulary: --assistant FOLDER"),
        ("vllm-draft", {"assistant": "/nowhere"}, "--assistant FOLDER"),
        ("llama.cpp", {"llama_server": "/nowhere"}, "--llama-server must name a program, and /nowhere is none"),
        ("llama.cpp", {}, "needs llama-server: put it on PATH"),
        ("vllm", {"vllm_python": "/nowhere"}, "--vllm-python must name a Python interpreter"),
        ("vllm", {}, "needs vLLM: install it here, or name the Python"),
    ],
)
def test_what_a_peer_lacks_is_said_before_the_run(
    arm: str, peers: dict[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(llama_cpp, "PACKAGE", "no-such-package")
    monkeypatch.setattr(start, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=sentence):
        start.check_peers([ARMS[arm]], config(arm, peers=PeerOptions(**peers)))


def test_llama_cpp_needs_a_model_or_its_converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = tmp_path / "llama-server"
    server.write_text("#!/bin/sh\n")
    server.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(llama_cpp.CONVERTER_FOLDER, raising=False)
    with pytest.raises(UsageError, match="--gguf"):
        llama_cpp.check(PeerOptions())
    with pytest.raises(UsageError, match="--gguf must name a file"):
        llama_cpp.check(PeerOptions(gguf=str(tmp_path / "none.gguf")))
    (tmp_path / llama_cpp.CONVERTER).write_text("")
    monkeypatch.setenv(llama_cpp.CONVERTER_FOLDER, str(tmp_path))
    llama_cpp.check(PeerOptions())
    assert llama_cpp.server_program(PeerOptions()) == str(server)


def test_the_server_of_a_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "own_server"
    (package / "bin").mkdir(parents=True)
    (package / "__init__.py").write_text("from pathlib import Path\nPath(__file__).with_name('made').touch()\n")
    server = package / "bin" / "llama-server"
    server.write_text("")
    server.chmod(0o755)
    info = tmp_path / "own_server-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-server\nVersion: 1\n")
    (info / "RECORD").write_text("own_server/__init__.py,,\nown_server/bin/llama-server,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(llama_cpp, "PACKAGE", "own-server")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert llama_cpp.server_program(PeerOptions()) == str(server)
    assert (package / "made").exists()  # what a package does when it is imported is done


# What they count


def test_llama_cpps_answer_by_hand() -> None:
    timings = {"prompt_ms": 250, "predicted_ms": 500, "draft_n": 6, "draft_n_accepted": 3}
    told = llama_cpp.told_by({"tokens": [4, 5, 6, 7, 8], "timings": timings}, 99)
    stats = stats_of(told, 7)
    assert (stats.ttft_s, stats.decode_s, stats.peak_memory_bytes) == (0.25, 0.5, 99)
    # 5 tokens: one of the prompt's pass, three drafted, and one pass.
    assert (stats.steps, stats.drafted, stats.accepted, stats.acceptance_length) == (1, 6, 3, 4.0)
    with pytest.raises(PeerFailure, match="lacks what is counted"):
        llama_cpp.told_by({"tokens": [1]})


def test_llama_cpp_is_asked_for_the_same_tokens_and_the_same_draw() -> None:
    asked = llama_cpp.request_of(Ask([1, 2], 30, 0.5, 9), make_counting_pair())
    assert (asked["prompt"], asked["n_predict"], asked["temperature"], asked["seed"]) == ([1, 2], 30, 0.5, 9)
    assert asked["samplers"] == ["temperature"]
    assert "ignore_eos" not in asked
    command = llama_cpp.server_command("s", Path("m.gguf"), "80", 100_000, 2)
    assert command[:3] == ["s", "--model", "m.gguf"]
    assert command[command.index("--ctx-size") + 1] == "8192"


def test_llama_cpp_goes_on_behind_an_end_that_is_none_for_the_others() -> None:
    told = llama_cpp.told_by({"tokens": [4, 9], "timings": {"prompt_ms": 0, "predicted_ms": 0}})
    ask, stopped = Ask([1], 5, 1.0, 7), {"stop_type": "eos"}
    rest = llama_cpp.rest_of(ask, told, stopped, {2})
    assert rest == Ask([1, 4, 9], 3, 1.0, 9)
    assert llama_cpp.rest_of(ask, told, stopped, {9}) is None  # the others end there too
    assert llama_cpp.rest_of(ask, told, {"stop_type": "limit"}, {2}) is None
    assert llama_cpp.rest_of(Ask([1], 2, 1.0, 7), told, stopped, {2}) is None
    assert llama_cpp.rest_of(ask, Told([], 0.0, 0.0, 0), stopped, {2}) is None


def test_an_answer_of_several_replies_by_hand() -> None:
    parts = [Told([4, 9], 1.0, 0.25, 1, peak_memory_bytes=5), Told([6, 7, 8], 0.5, 0.125, 0, 1, 3, 2, 9)]
    # The second reply's prompt pass gave 6: it is one of the passes, and its time is that of decoding.
    assert llama_cpp.joined(parts) == Told([4, 9, 6, 7, 8], 1.0, 0.875, 2, 1, 3, 2, 9)
    assert llama_cpp.joined(parts[:1]) == parts[0]


def test_the_server_is_asked_until_the_answer_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    timings = {"prompt_ms": 1000, "predicted_ms": 500}
    replies = iter(
        [
            {"tokens": [4, 9], "stop_type": "eos", "timings": timings},
            {"tokens": [6, 2], "stop_type": "eos", "timings": timings},
        ]
    )
    asked: list[list[int]] = []

    def post(path: str, content: dict[str, Any]) -> dict[str, Any]:
        asked.append(content["prompt"])
        return next(replies)

    server = object.__new__(llama_cpp.LlamaServer)
    server.pair, server.eos_ids = make_counting_pair(), frozenset([2])
    monkeypatch.setattr(server, "_post", post)
    monkeypatch.setattr(server, "_memory", lambda: 0)
    told = server.ask(Ask([1], 9, 0.0, 0))
    assert (asked, told.token_ids, told.prefill_s, told.decode_s) == ([[1], [1, 4, 9]], [4, 9, 6, 2], 1.0, 2.0)


def test_a_file_of_another_vocabulary_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    server = object.__new__(llama_cpp.LlamaServer)
    server.pair = make_counting_pair()
    monkeypatch.setattr(llama_cpp, "SENTENCE", "w3 w5")
    for content in (" w3 w5", "a b"):
        monkeypatch.setattr(server, "_post", lambda path, asked, read=content: {"content": read})
        if content == "a b":
            with pytest.raises(PeerFailure, match=r"m\.gguf has another vocabulary than counting"):
                server._check_vocabulary(Path("m.gguf"))
        else:
            server._check_vocabulary(Path("m.gguf"))


def test_vllms_ways_of_drafting() -> None:
    assert speculative({"assistant": None, "draft": "none"}) is None
    assert speculative({"assistant": None, "draft": "ngram"})["method"] == "ngram"  # type: ignore[index]
    assert speculative({"assistant": "small", "draft": "none"})["model"] == "small"  # type: ignore[index]
