"""Passes over weights that come block by block: one sweep for the longest window, by the steps of recorded passes."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_cases import CASES, CPU, FLOAT, assert_close, random_tokens, save_model
from helpers.default_share import some
from helpers.interpret import triton_steps
from helpers.late_device import AT_RANDOM, CHARACTERS, LateDevice
from helpers.quantized_decoder import quantize_layers
from helpers.tiny_models import make_pair

from quasar_core.config import GenerationConfig
from quasar_core.decode.costs.cost_records import STREAMED_SIZES, cost_record
from quasar_core.decode.generator import Generator
from quasar_core.models.cuda import choose as choosing
from quasar_core.models.cuda.graph_pass import CudaPass
from quasar_core.models.cuda.products import WIDEST
from quasar_core.models.cuda.torch_steps import Steps, TorchSteps
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.memory.estimate import LONGEST_SWEEP
from quasar_core.models.memory.offload import movable_products
from quasar_core.models.weights.device_queues import Link, open_link
from quasar_core.models.weights.device_stream import DeviceStream
from quasar_core.models.weights.lean_weights import attach_verifier, load_target

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
LONG = {"max_position_embeddings": 400}


def streamed(
    folder: Path, link: Link, blocks: Iterable[int] = range(4), dtype: torch.dtype = FLOAT, steps: Steps | None = None
) -> LeanDecoder:
    """A model whose products in these blocks come over a link, with the pass that it has on CUDA."""
    movable, _ = movable_products(folder, None)
    decoder = load_target(folder, CPU, dtype, streamed={block: movable[block] for block in blocks}, link=link)
    decoder.fast = CudaPass(decoder, steps or TorchSteps())
    return decoder


def source_of(decoder: LeanDecoder) -> DeviceStream:
    assert isinstance(decoder.source, DeviceStream)
    return decoder.source


@pytest.mark.parametrize(
    "case", ["qwen3, listed windows, biases", "gemma 2", "gemma 4, shared states and own inputs", "muse glimmer"]
)
@pytest.mark.parametrize("character", CHARACTERS)
def test_passes_of_any_length_are_one_sweep_and_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, character: str
) -> None:
    kind, options = CASES[case]
    save_model(tmp_path, kind, {**options, **LONG})
    plain, device = load_target(tmp_path, CPU, FLOAT), LateDevice(character).watch(monkeypatch)
    decoder = streamed(tmp_path, device.link(frozenset([0, 1, 3])))
    tokens, caches = random_tokens(300), [plain.new_cache(400), decoder.new_cache(400)]
    for begin, end in ((0, 1), (1, 66), (66, 67), (67, 100), (100, 300)):
        copied = source_of(decoder).bytes_read
        logits = [
            model.forward(tokens[begin:end], cache) for model, cache in zip((plain, decoder), caches, strict=True)
        ]
        assert_close(logits[1], logits[0])
        swept = source_of(decoder).bytes_read - copied
        assert swept <= source_of(decoder).pass_bytes * 3 // 2  # and the first pass also fetches its first blocks
    assert device.wrong == []


def sum_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted products are NumPy's, whose last bits depend on where a row stands; so rounded once they do not."""
    from triton.runtime import interpreter

    def dot(builder: Any, a: Any, b: Any, added: Any, *options: Any) -> Any:
        found = a.data.astype("float64") @ b.data.astype("float64") + added.data
        return interpreter.TensorHandle(found.astype(added.data.dtype), added.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


@needs_triton
def test_in_triton_a_sweep_gives_the_bits_of_passes_with_all_weights_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever passes together: the text of `exact` is then that of plain decoding, as it is without streaming."""
    steps = triton_steps()
    sum_in_float64(monkeypatch)
    from quasar_core.kernels.triton.products import LONGEST_DENSE

    assert WIDEST == LONGEST_DENSE
    few = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 3}
    save_model(tmp_path, "Llama", few)
    tokens, dtype = random_tokens(71), torch.float16
    whole = load_target(tmp_path, CPU, dtype)
    whole.fast = CudaPass(whole, steps)
    decoder = streamed(tmp_path, open_link(CPU, frozenset([1])), range(3), dtype, steps)
    logits = {}
    for name, model, ends in (("whole", whole, (3, 4, 44, 71)), ("streamed", decoder, (3, 71))):
        cache, begins = model.new_cache(72), (0, *ends[:-1])
        logits[name] = torch.cat([model.forward(tokens[a:b], cache) for a, b in zip(begins, ends, strict=True)])
    assert torch.equal(logits["streamed"], logits["whole"])


@pytest.mark.parametrize("held", some([[0, 1, 2, 3], [1]], [[1]]), ids=str)
def test_answers_are_those_of_the_model_with_all_weights_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: list[int]
) -> None:
    save_model(tmp_path, "Qwen3", {"head_dim": 32, **LONG})
    checkpoint = quantize_layers(tmp_path, tmp_path / "verifier", lambda name: 8 if "_proj" in name else 16)
    whole = load_target(tmp_path, CPU, FLOAT)
    prompt, count = random_tokens(30), 150
    plain = GenerationConfig(count, "full", "none")
    expected = Generator(make_pair(whole, max_context=400), plain).generate(prompt).token_ids
    device = LateDevice(AT_RANDOM, seed=5).watch(monkeypatch)
    movable, _ = movable_products(tmp_path, checkpoint)
    target = load_target(tmp_path, CPU, FLOAT, streamed=movable, link=device.link(frozenset(held)))
    verifier = attach_verifier(target, checkpoint, "dense")
    for model in (target, verifier):
        model.fast = CudaPass(model, TorchSteps())
    pair, longest = make_pair(target, verifier, max_context=400), 0
    for window, draft in ((1, "none"), (33, "ngram"), (256, "none")):
        answer = Generator(pair, GenerationConfig(count, window=window, draft=draft)).generate(prompt)
        assert answer.token_ids == expected
        longest = max(longest, *(confirm.window for confirm in answer.stats.confirm_log))
    assert longest > 64
    assert Generator(pair, plain).generate(prompt).token_ids == expected
    assert device.wrong == []


def test_the_pass_is_chosen_tried_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--fast` asks for nothing there; where Triton fails, PyTorch's operations take its place."""
    save_model(tmp_path, "Llama", {"max_position_embeddings": 1024})
    decoder = streamed(tmp_path, open_link(CPU, frozenset(range(4))))
    found, note = choosing.choose(decoder, fast=True)
    assert found is not None
    assert (found.longest, found.name, found.dense._measures) == (LONGEST_SWEEP, "CUDA, block by block", False)
    assert note.startswith("passes: up to 320 tokens at a time, each block when its weights are there, by PyTorch's")
    whole = load_target(tmp_path, CPU, FLOAT)
    assert choosing.choose(whole)[1].startswith("passes: 40 tokens at a time as CUDA graphs of")

    steps = TorchSteps()
    steps.name = "Triton"
    monkeypatch.setattr(choosing, "choose_steps", lambda device, dtype: (steps, "Triton's kernels"))
    decoder.fast = None
    tried, note = choosing.choose(decoder)
    assert tried is not None
    assert "each block when its weights are there, by Triton's kernels; a token's logits do not depend on" in note
    monkeypatch.setattr(choosing, "try_out", fail)
    assert "by PyTorch's operations, not Triton's: no such kernel; a token's logits may" in choosing.choose(decoder)[1]


def fail(*given: object) -> None:
    raise ValueError("no such kernel")


def test_a_confirms_time_is_measured_as_it_is_while_streaming(tmp_path: Path) -> None:
    """At the sizes of long windows, and remembered beside what was streamed."""
    save_model(tmp_path, "Qwen3", {"head_dim": 32, **LONG})
    checkpoint = quantize_layers(tmp_path, tmp_path / "verifier", lambda name: 8 if "_proj" in name else 16)
    target = streamed(tmp_path, open_link(CPU, frozenset([0, 1])))
    verifier = attach_verifier(target, checkpoint, "dense")
    pair = make_pair(target, verifier, max_context=400)
    record = cost_record(pair, "target")
    assert set(record.cost.sizes) <= set(STREAMED_SIZES)
    assert record.conditions["streamed"] == "4 of 4 blocks, 2 from the disk"
    assert record.conditions["passes"] == "LeanDecoder, CUDA, block by block"
    assert "streamed" not in cost_record(pair, "verifier").conditions
    Generator(pair, GenerationConfig(8)).generate(random_tokens(20))
    said = [note for note in pair.notes if note.startswith("offload: a confirm takes")]
    assert len(said) == 1
    assert "tokens a second are expected, in windows of up to" in said[0]
