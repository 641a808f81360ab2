"""The lean decoder computes what transformers computes, for every architecture of its table."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_cases import (
    CASES,
    CPU,
    DYNAMIC,
    FLOAT,
    LENGTH,
    assert_close,
    classes_of,
    exact_logits,
    fresh_logits,
    in_passes,
    random_tokens,
    relative_error,
    save_model,
)
from safetensors.torch import load_file, save_file

from quasar_core.errors import QuasarError
from quasar_core.models.architectures import ARCHITECTURES
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.hf import causal_lm
from quasar_core.models.weights.lean_weights import load_target


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None takes one out."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LeanDecoder, torch.Tensor]:
    """A lean decoder, and transformers' logits of `random_tokens()`."""
    folder = tmp_path_factory.mktemp("case")
    model = save_model(folder, *CASES[request.param])
    return load_target(folder, CPU, FLOAT), fresh_logits(model, random_tokens())


@pytest.fixture
def family(request: pytest.FixtureRequest) -> str:
    """The transformers class of the case."""
    return CASES[request.node.callspec.params["case"]][0]


@pytest.mark.parametrize("sizes", [[LENGTH], [1, 1, 1, 30, 1], [12, 1, 4, 8], [3, 33]], ids=str)
def test_logits_equal_those_of_transformers_however_the_text_is_passed(
    case: tuple[LeanDecoder, torch.Tensor], sizes: list[int], request: pytest.FixtureRequest
) -> None:
    decoder, expected = case
    assert_close(in_passes(decoder, random_tokens(), sizes), expected, request.node.callspec.params["case"])


def test_logits_after_rollbacks_equal_those_of_a_fresh_text(
    case: tuple[LeanDecoder, torch.Tensor], family: str
) -> None:
    decoder, expected = case
    tokens, cache = random_tokens(), decoder.new_cache(LENGTH)
    decoder.forward([*tokens[:20], 5, 6, 7], cache)
    cache.rollback(20)
    decoder.forward([9], cache)
    cache.rollback(3)
    decoder.forward(tokens[3:30], cache)
    cache.rollback(30)
    assert_close(decoder.forward(tokens[30:], cache), expected[30:], family=family)


def test_last_only_gives_the_last_row(case: tuple[LeanDecoder, torch.Tensor], family: str) -> None:
    decoder, expected = case
    logits = decoder.forward(random_tokens(), decoder.new_cache(64), last_only=True)
    assert_close(logits, expected[-1:], family=family)


def test_openpangu_is_llama_with_biases_in_its_attention(tmp_path: Path) -> None:
    model = save_model(tmp_path, "Llama", {"attention_bias": True, "rope_parameters": {"rope_theta": 16e6}})
    edit_json(
        tmp_path / "config.json",
        architectures=["PanguEmbeddedForCausalLM"],
        model_type="PanguEmbedded",
        bias=True,
        rope_theta=16e6,
        attention_bias=None,
        rope_parameters=None,
        head_dim=None,
    )
    expected = fresh_logits(model, random_tokens())
    decoder = load_target(tmp_path, CPU, FLOAT)
    assert_close(in_passes(decoder, random_tokens(), [20, 1, 4]), expected)


def test_every_architecture_of_the_table_is_compared() -> None:
    compared = {classes_of(name)[1].__name__ for name, _ in CASES.values()} | {"PanguEmbeddedForCausalLM"}
    assert compared == set(ARCHITECTURES)


@pytest.mark.parametrize("sizes", [[LENGTH], [1], [12, 1, 9]], ids=str)
def test_dynamic_scaling_follows_the_end_of_each_pass(tmp_path: Path, sizes: list[int]) -> None:
    save_model(tmp_path, "Llama", {"max_position_embeddings": 20, "rope_parameters": DYNAMIC})
    reference = causal_lm.load_target(tmp_path, CPU, FLOAT)
    decoder = load_target(tmp_path, CPU, FLOAT)
    tokens = random_tokens()
    assert_close(in_passes(decoder, tokens, sizes), in_passes(reference, tokens, sizes))


def test_dynamic_scaling_forgets_what_was_rolled_back(tmp_path: Path) -> None:
    save_model(tmp_path, "Llama", {"max_position_embeddings": 20, "rope_parameters": DYNAMIC})
    decoder, tokens = load_target(tmp_path, CPU, FLOAT), random_tokens()
    expected = in_passes(decoder, tokens[:30], [25, 5])
    cache = decoder.new_cache(64)
    decoder.forward(tokens, cache)
    cache.rollback(0)
    actual = torch.cat([decoder.forward(tokens[:25], cache), decoder.forward(tokens[25:30], cache)])
    assert_close(actual, expected)


def test_positions_beyond_the_first_table_are_rotated_too(tmp_path: Path) -> None:
    model = save_model(tmp_path, "Llama", {"max_position_embeddings": 2048, "num_hidden_layers": 1})
    tokens = random_tokens(1100)
    decoder = load_target(tmp_path, CPU, FLOAT)
    logits = in_passes(decoder, tokens, [1020, 8])
    torch.testing.assert_close(logits[1000:], fresh_logits(model, tokens)[1000:], atol=5e-5, rtol=1e-4)


def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    model = save_model(tmp_path, "Qwen3", {"head_dim": 32})
    decoder = load_target(tmp_path, CPU, torch.bfloat16)
    logits = in_passes(decoder, random_tokens(), [20, 1, 8])
    assert relative_error(logits, exact_logits(model, random_tokens(), torch.bfloat16)) < 8 * 2**-8


def test_weights_are_allocated_once(tmp_path: Path) -> None:
    save_model(tmp_path, "Qwen2", {"tie_word_embeddings": True})
    stored = sum(tensor.numel() for tensor in load_file(tmp_path / "model.safetensors").values())
    decoder = load_target(tmp_path, CPU, FLOAT)
    assert decoder.head.weight is decoder.embedding  # type: ignore[attr-defined]
    held = {}
    for layer in decoder.layers:
        tensors = [*layer.norms, *(product.weight for product in layer.linears)]  # type: ignore[attr-defined]
        tensors += [product.bias for product in layer.linears if product.bias is not None]  # type: ignore[attr-defined]
        held.update({tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors})
    held |= {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in (decoder.embedding, decoder.norm)}
    assert sum(held.values()) == 4 * stored


def test_a_pass_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, "Llama", {})
    decoder = load_target(tmp_path, CPU, FLOAT)
    cache = decoder.new_cache(4)
    decoder.forward([3, 4, 5], cache)
    with pytest.raises(QuasarError, match="holds 4 tokens, and 5 are needed"):
        decoder.forward([6, 7], cache)
    assert cache.length == 3
    with pytest.raises(ValueError, match="cannot move"):
        cache.rollback(4)


def change_tensor(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "tensor", "sentence"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, "holds no tensor model.layers.1.mlp.up_proj.weight"),
        ("model.norm.weight", torch.ones(1), r"model.norm.weight in .* is \(1,\), and by its config \(64,\)"),
        ("model.layers.0.mlp.up_proj.bias", torch.ones(96), "holds model.layers.0.mlp.up_proj.bias, which Llama"),
    ],
)
def test_files_that_are_not_the_model_of_their_config_are_refused(
    tmp_path: Path, name: str, tensor: torch.Tensor | None, sentence: str
) -> None:
    save_model(tmp_path, "Llama", {})
    change_tensor(tmp_path, name, tensor)
    with pytest.raises(QuasarError, match=sentence):
        load_target(tmp_path, CPU, FLOAT)
