"""Weights that are fetched for every pass give what weights in memory give, to the last bit; what fails is said."""

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from helpers.decoder_cases import CASES, CPU, FLOAT, random_tokens, save_model
from helpers.float8_models import to_blocks
from helpers.quantized_decoder import mixed_bits, quantize_layers
from helpers.tiny_models import make_pair
from safetensors.torch import save_file

from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.config import GenerationConfig, SamplingConfig
from quasar_core.decode import engine
from quasar_core.decode.generator import Generator
from quasar_core.errors import QuasarError
from quasar_core.models import loading
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.memory.offload import movable_products
from quasar_core.models.weights import weight_reads
from quasar_core.models.weights.direct_reads import DirectFile
from quasar_core.models.weights.lean_weights import attach_verifier, load_target
from quasar_core.models.weights.streaming import LayerStream, StreamedWeights

BF16 = torch.bfloat16
SHARES = ([0, 1, 2, 3], [1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 3], [2])
STREAMED_CASES = (
    "qwen3, listed windows, biases",
    "gemma 2",
    "gemma 4, keys are values",
    "gemma 4, shared states and own inputs",
    "muse glimmer",
    "phi 3, a part rotates, window",
    "apertus",
)


def streamed(folder: Path, blocks: Iterable[int], dtype: torch.dtype = FLOAT) -> LeanDecoder:
    """The model of a folder, whose products in these blocks are fetched for every pass."""
    movable, _ = movable_products(folder, None)
    return load_target(folder, CPU, dtype, streamed={block: movable[block] for block in blocks})


def source_of(decoder: LeanDecoder) -> LayerStream:
    assert isinstance(decoder.source, LayerStream)
    return decoder.source


def passes(decoder: LeanDecoder, tokens: list[int]) -> list[torch.Tensor]:
    """A prompt in three chunks, passes of several tokens and of one, and a pass over a tree."""
    cache = decoder.new_cache(len(tokens) + 8)
    found = [decoder.pass_prompt(tokens[:20], cache, 8)]
    for begin, end in ((20, 27), (27, 28), (28, len(tokens))):
        found.append(decoder.forward(tokens[begin:end], cache))
    found.append(decoder.forward_tree(tokens[:3], [-1, 0, 0], cache))
    return [*found, *(states[:, :, : cache.length].clone() for states in cache.layers)]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def always_ready(decoder: LeanDecoder) -> LeanDecoder:
    loading.attach(decoder)
    return decoder


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "cpp"])
@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
@pytest.mark.parametrize("case", STREAMED_CASES)
def test_every_share_gives_the_same_bits(
    tmp_path: Path, case: str, dtype: torch.dtype, fast: bool, request: pytest.FixtureRequest
) -> None:
    if fast:
        request.getfixturevalue("cpp_pass")
    save_model(tmp_path, *CASES[case])
    tokens, ready = random_tokens(40), always_ready if fast else lambda decoder: decoder
    expected = passes(ready(load_target(tmp_path, CPU, dtype)), tokens)
    for blocks in SHARES[dtype == BF16 :: 2]:  # each dtype takes every second one
        decoder = ready(streamed(tmp_path, blocks, dtype))
        assert_same(passes(decoder, tokens), expected)
        assert_same(passes(decoder, tokens), expected)  # and when the buffers hold the first blocks already


def test_weights_stored_in_16_bits_are_read_straight_into_their_places(tmp_path: Path) -> None:
    save_model(tmp_path, *CASES["llama"]).to(BF16).save_pretrained(tmp_path)
    expected = passes(load_target(tmp_path, CPU, BF16), random_tokens())
    decoder = streamed(tmp_path, range(4), BF16)
    assert_same(passes(decoder, random_tokens()), expected)
    assert source_of(decoder).pass_bytes == 4 * 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)


def test_weights_in_8_bit_blocks_are_dequantized_on_the_way(tmp_path: Path) -> None:
    save_model(tmp_path / "plain", "Llama", {"intermediate_size": 80})
    to_blocks(tmp_path / "plain", tmp_path / "blocks", whole=False)
    expected = passes(load_target(tmp_path / "blocks", CPU, BF16), random_tokens())
    assert_same(passes(streamed(tmp_path / "blocks", range(4), BF16), random_tokens()), expected)


def test_what_the_verifier_takes_over_stays(tmp_path: Path) -> None:
    """Block 2 is not quantized, nor a part of two products of block 1: their weights serve both models."""
    save_model(tmp_path, *CASES["qwen3"])
    checkpoint = quantize_layers(tmp_path, tmp_path / "verifier", mixed_bits)
    movable, count = movable_products(tmp_path, checkpoint)
    assert count == 4
    names = {block: [product.names[0].rpartition(".")[2] for product in some] for block, some in movable.items()}
    every = ["q_proj", "o_proj", "gate_proj", "down_proj"]
    assert names == {0: every, 1: ["o_proj", "down_proj"], 3: every}
    whole = load_target(tmp_path, CPU, FLOAT)
    target = load_target(tmp_path, CPU, FLOAT, streamed=movable)
    tokens = random_tokens()
    expected = passes(attach_verifier(whole, checkpoint, "dense"), tokens)
    verifier = attach_verifier(target, checkpoint, "dense")
    passes(target, tokens)
    assert_same(passes(verifier, tokens), expected)


@pytest.mark.usefixtures("cpp_pass")
@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
def test_answers_are_those_of_plain_decoding_in_windows_of_any_length(tmp_path: Path, dtype: torch.dtype) -> None:
    save_model(tmp_path, "Qwen3", {"head_dim": 32, "max_position_embeddings": 400})
    checkpoint = quantize_layers(tmp_path, tmp_path / "verifier", lambda name: 8 if "_proj" in name else 16)
    whole = always_ready(load_target(tmp_path, CPU, dtype))
    prompt, count = random_tokens(30), 200
    options = {"max_context": 400, "dtype": dtype}
    plain = GenerationConfig(count, "full", "none")
    expected = Generator(make_pair(whole, **options), plain).generate(prompt).token_ids
    longest = 0
    for blocks in ([0, 1, 2, 3], [1, 3, 2]):
        movable, _ = movable_products(tmp_path, checkpoint)
        target = always_ready(load_target(tmp_path, CPU, dtype, streamed={block: movable[block] for block in blocks}))
        verifier = always_ready(attach_verifier(target, checkpoint, "vnni"))
        pair = make_pair(target, verifier, **options)
        for window, draft in ((1, "none"), (33, "ngram"), (256, "ngram"), (256, "none")):
            answer = Generator(pair, GenerationConfig(count, window=window, draft=draft)).generate(prompt)
            assert answer.token_ids == expected
            longest = max(longest, *(confirm.window for confirm in answer.stats.confirm_log))
        assert Generator(pair, plain).generate(prompt).token_ids == expected
    assert longest > 64


@pytest.mark.usefixtures("cpp_pass")
def test_drawn_answers_are_those_with_all_weights_in_memory(tmp_path: Path) -> None:
    save_model(tmp_path, *CASES["llama"])
    checkpoint = quantize_layers(tmp_path, tmp_path / "verifier", lambda name: 8)
    sampling = SamplingConfig(temperature=1.0, seed=7)
    texts = []
    for blocks in ([], [0, 1, 2, 3]):
        movable, _ = movable_products(tmp_path, checkpoint)
        target = always_ready(load_target(tmp_path, CPU, FLOAT, streamed={block: movable[block] for block in blocks}))
        pair = make_pair(target, always_ready(attach_verifier(target, checkpoint, "vnni")))
        config = GenerationConfig(60, window=20, draft="ngram", num_draft_tokens=3, sampling=sampling)
        texts.append(Generator(pair, config).generate(random_tokens(20)).token_ids)
    assert texts[0] == texts[1]


def test_a_prompt_takes_one_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engine.PREFILL_CHUNK, "cpu", 7)
    save_model(tmp_path, *CASES["llama"])
    decoder = streamed(tmp_path, range(4))
    source = source_of(decoder)
    source.start()
    Generator(make_pair(decoder), GenerationConfig(1, "full", "none")).generate(random_tokens(30))
    wait_for(source)
    assert source.bytes_read == source.pass_bytes + source.pass_bytes // 2  # and half of the next one's blocks


def wait_for(source: LayerStream) -> None:
    """Let what is being read come to its end."""
    for buffer in source._buffers:
        assert buffer.reading is not None
        buffer.reading.result()


@pytest.mark.parametrize("blocks", [[1], [0, 3]])
def test_as_few_blocks_as_there_are_buffers_are_read_once(tmp_path: Path, blocks: list[int]) -> None:
    save_model(tmp_path, *CASES["llama"])
    decoder = streamed(tmp_path, blocks)
    passes(decoder, random_tokens())
    assert source_of(decoder).pass_bytes == 0
    assert decoder.streamed is None
    assert source_of(decoder).bytes_read == len(blocks) * 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)


# What fails


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
