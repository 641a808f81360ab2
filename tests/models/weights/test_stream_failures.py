"""Streams whose reads fail, are slow or interrupted, and files that change: an error, and the next pass is right."""

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.decoder_cases import CASES, CPU, FLOAT, random_tokens, save_model
from helpers.streamed import assert_same, passes, source_of, streamed, wait_for
from safetensors.torch import save_file

from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.errors import QuasarError
from quasar_core.models.memory.offload import movable_products
from quasar_core.models.weights import weight_reads
from quasar_core.models.weights.direct_reads import DirectFile
from quasar_core.models.weights.lean_weights import load_target
from quasar_core.models.weights.streaming import StreamedWeights

FORKED = """
import os, pathlib, signal, sys, torch
from helpers.decoder_cases import CPU, FLOAT, random_tokens
from quasar_core.models.memory.offload import movable_products
from quasar_core.models.weights.lean_weights import load_target
torch.set_num_threads(1)  # the threads of PyTorch's OpenMP are not there in a fork
folder = pathlib.Path(sys.argv[1])
movable, _ = movable_products(folder, None)
load = lambda: load_target(folder, CPU, FLOAT, streamed=movable)
logits = lambda decoder: decoder.forward(random_tokens(), decoder.new_cache(128))
expected, child = logits(decoder := load()), os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(7 if all(torch.equal(logits(one), expected) for one in (decoder, load())) else 1)
assert torch.equal(logits(decoder), expected)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(params=["directly", "through the page cache"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "through the page cache":
        monkeypatch.setattr(DirectFile, "open", lambda path: None)


class Disk:
    """Stands before `os.preadv`: slow, short, failing or interrupting, as a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.before: Callable[[], None] = lambda: None
        self.most: int | None = None
        self._read = os.preadv
        monkeypatch.setattr(weight_reads.os, "preadv", self)

    def __call__(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        self.before()
        return self._read(descriptor, [buffers[0][: self.most]], offset)


def fail() -> None:
    raise OSError(5, "Input/output error")


@pytest.mark.usefixtures("either_way")
def test_short_reads_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path, *CASES["llama"])
    expected = passes(load_target(tmp_path, CPU, FLOAT), random_tokens())
    decoder = streamed(tmp_path, range(4))
    Disk(monkeypatch).most = 5001
    assert_same(passes(decoder, random_tokens()), expected)


@pytest.mark.usefixtures("either_way")
def test_a_read_that_fails_ends_the_answer_and_the_next_one_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path, *CASES["llama"])
    expected = passes(load_target(tmp_path, CPU, FLOAT), random_tokens())
    decoder, disk = streamed(tmp_path, range(4)), Disk(monkeypatch)
    decoder.forward([5], decoder.new_cache(20))
    disk.before = fail
    with pytest.raises(QuasarError, match=r"model.safetensors cannot be read: Input/output error\.$"):
        passes(decoder, random_tokens())
    disk.before = lambda: None
    assert_same(passes(decoder, random_tokens()), expected)


@pytest.mark.usefixtures("either_way")
def test_a_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, *CASES["llama"])
    decoder = streamed(tmp_path, range(4))
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(50_000)
    with pytest.raises(
        QuasarError, match=r"model.safetensors is cut short: it has no byte \d+, where weights should be\.$"
    ):
        passes(decoder, random_tokens())


@pytest.mark.usefixtures("either_way")
def test_a_file_that_changes_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, *CASES["llama"])
    decoder = streamed(tmp_path, range(4))
    passes(decoder, random_tokens())
    wait_for(source_of(decoder))
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(60_000)
        file.write(bytes(100))
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    with pytest.raises(QuasarError, match="was changed while its weights were in use: start again with whole files"):
        passes(decoder, random_tokens())


@pytest.mark.usefixtures("either_way")
def test_a_file_that_is_replaced_is_not_read(tmp_path: Path) -> None:
    """Another file under the same name: the one that was opened is whole."""
    save_model(tmp_path, *CASES["llama"])
    expected = passes(load_target(tmp_path, CPU, FLOAT), random_tokens())
    decoder = streamed(tmp_path, range(4))
    replace_file(tmp_path / "model.safetensors", bytes(1000))
    assert_same(passes(decoder, random_tokens()), expected)


def replace_file(path: Path, content: bytes) -> None:
    """As downloads and editors do it."""
    path.with_name("other").write_bytes(content)
    path.with_name("other").replace(path)


def test_a_file_that_is_replaced_between_its_header_and_its_weights_is_refused(tmp_path: Path) -> None:
    """What the header says of the one file would be read from the other."""
    save_model(tmp_path, *CASES["llama"])
    movable, _ = movable_products(tmp_path, None)
    files = TensorFiles(tmp_path)
    save_file(
        {name: files.load(name).bfloat16() for name in files.names()},
        tmp_path / "other",
        metadata={"much": "longer " * 100},
    )
    (tmp_path / "other").replace(tmp_path / "model.safetensors")
    with pytest.raises(QuasarError, match=r"model.safetensors was replaced while its weights were loaded: start again"):
        StreamedWeights(files, movable, FLOAT, {}, None)


def test_a_file_that_is_replaced_while_it_is_loaded_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, *CASES["llama"])
    movable, _ = movable_products(tmp_path, None)
    path = tmp_path / "model.safetensors"
    content, done = path.read_bytes(), list[int]()

    def replace_it(stage: str, *counts: int) -> None:
        if not done:
            replace_file(path, content)
        done.append(1)

    with pytest.raises(QuasarError, match=r"model.safetensors was replaced while its weights were loaded: start again"):
        load_target(tmp_path, CPU, FLOAT, replace_it, movable)
    assert done


def test_a_dtype_that_is_not_read_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, *CASES["llama"]).double().save_pretrained(tmp_path)
    with pytest.raises(QuasarError, match=r"q_proj.weight in .* is F64, which cannot be streamed\."):
        streamed(tmp_path, range(4))


@pytest.mark.usefixtures("either_way")
def test_a_slow_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path, *CASES["llama"])
    expected = passes(load_target(tmp_path, CPU, FLOAT), random_tokens())
    decoder, disk = streamed(tmp_path, range(4)), Disk(monkeypatch)
    disk.before = lambda: time.sleep(0.002)
    assert_same(passes(decoder, random_tokens()), expected)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("reads", range(0, 40, 3))
def test_an_interrupt_in_a_sweep_leaves_the_next_one_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: int
) -> None:
    """Ctrl-C while a pass waits for a block: what is still being read then must not reach a later block's place."""
    save_model(tmp_path, *CASES["llama"])
    expected = passes(load_target(tmp_path, CPU, FLOAT), random_tokens())
    decoder = streamed(tmp_path, range(4))
    source, waited = source_of(decoder), [0]
    wait = source._await

    def interrupted(number: int) -> None:
        waited[0] += 1
        if waited[0] == reads:
            raise KeyboardInterrupt
        wait(number)

    monkeypatch.setattr(source, "_await", interrupted)
    slow = Disk(monkeypatch)
    slow.before = lambda: time.sleep(0.0005)
    cache = decoder.new_cache(60)
    try:
        decoder.pass_prompt(random_tokens(), cache, 8)
        for token in random_tokens(10):
            decoder.forward([token], cache)
    except KeyboardInterrupt:
        assert waited[0] == reads
    else:
        assert reads == 0, "no pass was interrupted"
    assert_same(passes(decoder, random_tokens()), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no forks")
def test_a_fork_streams_too(tmp_path: Path) -> None:
    """The model that it was given, whose first blocks were being read, and one that it loads."""
    save_model(tmp_path, *CASES["qwen3, listed windows, biases"])
    program, places = [sys.executable, "-c", FORKED, tmp_path], {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(program, timeout=120, check=False, env=os.environ | places).returncode == 7


def test_no_thread_outlives_its_model(tmp_path: Path) -> None:
    save_model(tmp_path, *CASES["llama"])
    decoder = streamed(tmp_path, range(4))
    source_of(decoder).start()
    assert any(thread.name.startswith("quasar weights") for thread in threading.enumerate())
    del decoder
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("quasar weights"):
            thread.join(5)
            assert not thread.is_alive()
