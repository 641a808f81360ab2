"""The group size: chosen by the inputs of the layers, said, and asked for against the advice of loaders."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.quantize_cases import CONFIG, quantize
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from quasar_cli.main import run as run_command
from quasar_core.checkpoint.headers import stored_layers
from quasar_core.checkpoint.loaders import describe_loaders
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.config import QuantizeConfig
from quasar_core.quantize.group_size import largest_dividing, settle_group_size

pytest_plugins = ["helpers.quantize_fixtures"]

SMOLLM = {"model.layers.0.self_attn.q_proj": (576, 576), "model.layers.0.mlp.down_proj": (576, 1536)}
ROUND = {"model.layers.0.self_attn.q_proj": (1024, 1024)}
CHOSEN = "Groups of {} inputs share a scale: the largest of 128, 64 and 32 that divides the inputs of every layer."


@pytest.mark.parametrize(
    ("inputs", "size"),
    [((1024, 3072), 128), ((576, 1536), 64), ((128, 96), 32), ((64,), 64), ((32, 128), 32), ((1000, 1024), None)],
)
def test_the_largest_that_divides_the_inputs_of_every_layer(inputs: tuple[int, ...], size: int | None) -> None:
    assert largest_dividing({str(number): (64, count) for number, count in enumerate(inputs)}) == size


@given(st.lists(st.integers(1, 64).map(lambda n: 16 * n), min_size=1, max_size=5))
def test_what_is_chosen_divides_and_nothing_larger_does(inputs: list[int]) -> None:
    size = largest_dividing({str(number): (64, count) for number, count in enumerate(inputs)})
    dividing = [choice for choice in (32, 64, 128) if not any(count % choice for count in inputs)]
    assert size == (dividing[-1] if dividing else None)


def test_the_choice_is_said() -> None:
    assert settle_group_size(QuantizeConfig(), SMOLLM) == (QuantizeConfig(group_size=64), CHOSEN.format(64))
    assert settle_group_size(QuantizeConfig(), ROUND) == (QuantizeConfig(group_size=128), CHOSEN.format(128))


def test_one_that_is_asked_for_says_who_refuses_it() -> None:
    config, note = settle_group_size(QuantizeConfig(group_size=128), SMOLLM)
    assert config.group_size == 128
    assert note == (
        "Groups of 128 are refused by vLLM and vLLM on a CPU: 576 inputs are not a multiple of the group of 128 "
        "(model.layers.0.self_attn.qkv_proj). With --group-size 64 they load the checkpoint."
    )
    for fine in (64, 32, -1):
        assert settle_group_size(QuantizeConfig(group_size=fine), SMOLLM) == (QuantizeConfig(group_size=fine), None)
    assert settle_group_size(QuantizeConfig(group_size=128), ROUND)[1] is None


def test_who_refuses_any_size_is_not_named() -> None:
    """vLLM's CPU build has no 8 bits, vLLM and SGLang have no 3."""
    note = settle_group_size(QuantizeConfig(bits=8, group_size=128), SMOLLM)[1]
    assert note is not None
    assert note.startswith("Groups of 128 are refused by vLLM: 576 inputs")
    assert settle_group_size(QuantizeConfig(bits=3, group_size=128), SMOLLM)[1] is None


def test_inputs_that_no_size_divides() -> None:
    config, note = settle_group_size(QuantizeConfig(), {"a.up_proj": (1024, 1000)})
    assert config.group_size == 128
    assert note is not None
    assert note.startswith(
        "Groups of 128 inputs share a scale: none of 128, 64 and 32 divides the inputs of every layer."
    )
    assert "refused by vLLM: 1000 inputs are not a multiple of the group of 128 (a.gate_up_proj)" in note


def test_a_quantized_head_of_another_width_counts() -> None:
    sizes = {**ROUND, "lm_head": (264, 96)}
    assert settle_group_size(QuantizeConfig(lm_head_bits=8), sizes)[0].group_size == 32
    note = settle_group_size(QuantizeConfig(lm_head_bits=8, group_size=128), sizes)[1]
    assert note is not None
    assert "(lm_head)" in note


def test_eight_bits_have_one_scale_per_output() -> None:
    for config in (QuantizeConfig(method="w8a8", bits=8), QuantizeConfig(method="fp8", bits=8, group_size=-1)):
        assert config.groups_of == -1
        assert settle_group_size(config, SMOLLM) == (replace(config, group_size=-1), None)


@pytest.fixture
def narrow(source: Path) -> Path:
    """A Llama of 96 inputs, beside the tokenizer of the tiny model."""
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        eos_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(source)
    return source


def test_a_checkpoint_of_the_default_loads_in_vllm(narrow: Path) -> None:
    told: list[str] = []
    report = quantize(narrow, replace(CONFIG, group_size=None), tell=told.append)
    assert told[0] == CHOSEN.format(32)
    assert Path(report.checkpoint).name == "tiny-gptq-4bit-g32"
    assert report.config["group_size"] == 32
    section = json.loads((Path(report.checkpoint) / "config.json").read_text())["quantization_config"]
    layers = stored_layers(VerifierCheckpoint(Path(report.checkpoint)))
    verdicts = describe_loaders(layers, section)
    assert (verdicts["vLLM"], verdicts["vLLM on a CPU"], verdicts["GPTQModel"]) == ("yes", "yes", "yes")


def test_the_command_says_it_before_any_work(narrow: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["quantize", str(narrow), "--dry-run"]) == 0
    assert CHOSEN.format(32) in capsys.readouterr().err
    assert run_command(["quantize", str(narrow), "--dry-run", "--group-size", "64", "--json"]) == 0
    captured = capsys.readouterr()
    assert "Groups of 64 are refused by vLLM and vLLM on a CPU: 96 inputs are not a multiple" in captured.err
    json.loads(captured.out)
    assert [path.name for path in narrow.parent.iterdir() if "gptq" in path.name] == []


def test_inspect_names_the_layer_that_a_loader_refuses(narrow: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = quantize(narrow, replace(CONFIG, group_size=64))
    assert run_command(["inspect", report.checkpoint, "--json"]) == 0
    loaders = json.loads(capsys.readouterr().out)["loaders"]
    reason = "no: 96 inputs are not a multiple of the group of 64 (model.layers.0.mlp.gate_up_proj and 5 more)"
    assert loaders["vLLM"] == reason
    assert loaders["GPTQModel"] == loaders["transformers"] == "yes"
    assert run_command(["inspect", report.checkpoint]) == 0
    assert "loads in vLLM on a CPU" in capsys.readouterr().out
