"""A verifier of the lean decoder equals the one that runs through transformers, and confirms to the same text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_cases import (
    CASES,
    CPU,
    FLOAT,
    LENGTH,
    assert_close,
    assert_close_but_for_steps,
    in_passes,
    random_prompts,
    random_tokens,
    save_model,
)
from helpers.default_share import some
from helpers.near_ties import clear_prompt
from helpers.quantized_decoder import mixed_bits, quantize_layers
from helpers.tiny_models import make_pair

from quasar_core.checkpoint.gptq_format import QuantizedWeight
from quasar_core.config import GenerationConfig
from quasar_core.decode.generator import Generator
from quasar_core.errors import QuasarError
from quasar_core.kernels.linear import PackedLinear
from quasar_core.models.decoder.layer import FusedLinear
from quasar_core.models.decoder.linear import concatenate
from quasar_core.models.hf import causal_lm
from quasar_core.models.weights.lean_weights import attach_verifier, load_target, load_verifier_alone
from quasar_core.quantize.solve.gptq import SolverConfig, solve

ANSWER = 40


VERIFIERS = [
    ("Qwen3", {"head_dim": 32, "attention_bias": True}, lambda name: 4),
    ("Qwen2", {}, mixed_bits),
    ("Llama", {"tie_word_embeddings": True}, lambda name: 4),
    ("Llama", {"attention_bias": True, "mlp_bias": True}, mixed_bits),
]


@pytest.mark.parametrize("index", range(len(VERIFIERS)))
@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_a_verifier_equals_the_one_that_runs_through_transformers(tmp_path: Path, index: int, kernel: str) -> None:
    name, options, bits = VERIFIERS[index]
    save_model(tmp_path / "target", name, options)
    checkpoint = quantize_layers(tmp_path / "target", tmp_path / "verifier", bits)
    reference = causal_lm.attach_verifier(causal_lm.load_target(tmp_path / "target", CPU, FLOAT), checkpoint, kernel)
    expected = in_passes(reference, random_tokens(), [12, 1, 4])
    attached = attach_verifier(load_target(tmp_path / "target", CPU, FLOAT), checkpoint, kernel)
    alone = load_verifier_alone(checkpoint, CPU, FLOAT, kernel)
    same = assert_close if kernel == "reference" else assert_close_but_for_steps
    for verifier in (attached, alone):
        same(in_passes(verifier, random_tokens(), [12, 1, 4]), expected)


def test_codes_of_one_input_are_fused_where_they_agree(tmp_path: Path) -> None:
    save_model(tmp_path / "target", "Qwen2", {})
    checkpoint = quantize_layers(tmp_path / "target", tmp_path / "verifier", mixed_bits)
    target = load_target(tmp_path / "target", CPU, FLOAT)
    verifier = attach_verifier(target, checkpoint, "reference")
    first, second, third, fourth = verifier.layers
    assert isinstance(first.qkv, PackedLinear)
    assert first.qkv.out_features == 64 + 32 + 32
    assert isinstance(second.qkv, FusedLinear)
    assert isinstance(fourth.qkv, FusedLinear)
    assert third.qkv is target.layers[2].qkv
    assert verifier.embedding is target.embedding
    assert len(list(verifier.packed_layers)) == 4 + (2 + 1 + 1 + 1) + (3 + 1 + 1 + 1) + 1
    assert not list(target.packed_layers)


def test_target_and_verifier_share_a_cache(tmp_path: Path) -> None:
    save_model(tmp_path / "target", "Qwen3", {"head_dim": 32})
    checkpoint = quantize_layers(tmp_path / "target", tmp_path / "verifier", lambda name: 4)
    target = load_target(tmp_path / "target", CPU, FLOAT)
    verifier = attach_verifier(target, checkpoint, "reference")
    tokens, cache = random_tokens(), target.new_cache(LENGTH)
    expected = in_passes(target, tokens, [20, 25])
    target.forward(tokens[:20], cache)
    verifier.forward(tokens[20:28], cache)
    cache.rollback(20)
    assert_close(target.forward(tokens[20:], cache), expected[20:])


WRITTEN = ["mistral, window", "qwen3, yarn, tied", "smollm3, windows", "muse glimmer"]


@pytest.fixture(scope="module", params=some(WRITTEN, WRITTEN[1:]))
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A target, its verifier, a prompt, and what transformers writes behind it."""
    folder = tmp_path_factory.mktemp("written")
    model = save_model(folder / "target", *CASES[request.param])
    checkpoint = quantize_layers(folder / "target", folder / "verifier", lambda name: 4)
    prompt = clear_prompt(model, random_prompts(20), ANSWER)
    options = {"do_sample": False, "max_new_tokens": ANSWER, "eos_token_id": None}
    expected = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, 20), **options)[0, 20:].tolist()
    target = load_target(folder / "target", CPU, FLOAT)
    return target, attach_verifier(target, checkpoint, "reference"), prompt, expected


@pytest.mark.parametrize("verify", ["full", "exact"])
def test_greedy_text_is_that_of_transformers(written: Any, verify: Any) -> None:
    target, verifier, prompt, expected = written
    pair = make_pair(target, verifier if verify == "exact" else None)
    for drafts, window in ((1, 1), (4, 3), (8, 12)):
        config = GenerationConfig(ANSWER, verify, num_draft_tokens=drafts, window=window)
        assert Generator(pair, config).generate(prompt).token_ids == expected


def test_codes_of_another_model_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "target", "Llama", {})
    checkpoint = quantize_layers(tmp_path / "target", tmp_path / "verifier", lambda name: 4)
    save_model(tmp_path / "smaller", "Llama", {"num_hidden_layers": 3})
    save_model(tmp_path / "wider", "Llama", {"intermediate_size": 128})
    with pytest.raises(QuasarError, match=r"has no layer model\.layers\.3"):
        attach_verifier(load_target(tmp_path / "smaller", CPU, FLOAT), checkpoint)
    with pytest.raises(QuasarError, match=r"gate_proj of .* is \(96, 64\), and the target's is not"):
        attach_verifier(load_target(tmp_path / "wider", CPU, FLOAT), checkpoint)


def test_concatenating_codes_keeps_every_output() -> None:
    torch.manual_seed(0)
    config = SolverConfig(group_size=32, sym=False)
    parts: list[QuantizedWeight] = [solve(torch.randn(rows, 64), torch.eye(64), config).weight for rows in (16, 8, 24)]
    joined = concatenate(parts)
    assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in parts]))
