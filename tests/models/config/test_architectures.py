"""What the table of architectures reads from config.json, and what it says of models that it does not know."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.decoder_cases import CPU, FLOAT, SIZES, classes_of

from quasar_core.errors import QuasarError
from quasar_core.models.architectures import ARCHITECTURES
from quasar_core.models.config.decoder import DecoderConfig, why_not_lean
from quasar_core.models.config.options import REQUIRED
from quasar_core.models.weights.lean_weights import load_target
from tools import architectures_table

LLAMA = {"architectures": ["LlamaForCausalLM"], **SIZES}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"architectures": ["FalconForCausalLM"]}, "FalconForCausalLM is not in its table of architectures"),
        ({"architectures": None}, "no architecture is not in its table of architectures"),
        ({"hidden_size": None}, "config.json has no hidden_size"),
        ({"hidden_act": "gelu"}, "it has no activation gelu"),
        ({"partial_rotary_factor": 0.5}, "it rotates whole heads, and config.json has a partial_rotary_factor"),
        ({"rope_scaling": {"type": "longrope"}}, "it has no rope scaling of the type longrope"),
        ({"rope_scaling": {"type": "linear"}}, "its linear rope scaling has no factor"),
        ({"layer_types": ["chunked_attention"] * 4}, "it has no layers of the type chunked_attention"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "its rotary embedding is the same in all layers, and config.json has one per layer type",
        ),
    ],
)
def test_what_the_decoder_does_not_do_is_said(changes: dict[str, Any], reason: str | None) -> None:
    assert why_not_lean({**LLAMA, **changes}) == reason


def parse_without_rope_options(content: dict[str, Any]) -> DecoderConfig:
    config = DecoderConfig.parse(content)
    return replace(config, ropes=tuple(replace(rope, options={}) for rope in config.ropes))


# Of which transformers gives no values.
NEEDED = {"Dots1ForCausalLM": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1}}


@pytest.mark.parametrize("given", [{}, {"use_sliding_window": True, "sliding_window": 16}], ids=["sizes", "windows"])
@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"PanguEmbeddedForCausalLM"}))
def test_options_that_are_left_out_have_the_values_that_transformers_gives_them(
    name: str, given: dict[str, Any]
) -> None:
    sizes = {key: value for key, value in SIZES.items() if key in REQUIRED} | {"num_attention_heads": 64}
    if given and ARCHITECTURES[name].windows.kind == "none":
        pytest.skip("has no windows")
    sizes |= {"hidden_size": 1024, "num_hidden_layers": 32, **given, **NEEDED.get(name, {})}
    if "num_local_experts" in ARCHITECTURES[name].only:  # the decoder runs the form without experts
        sizes |= {"num_local_experts": 0, "mamba_d_head": 16}
    complete = json.loads(classes_of(name.removesuffix("ForCausalLM"))[0](**sizes).to_json_string(use_diff=False))
    architecture = {"architectures": [name]}
    assert parse_without_rope_options(sizes | architecture) == parse_without_rope_options(complete | architecture)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"per_layer_config": {"03": {"head_dim": 48}}}, None),
        ({"per_layer_config": {"3": {"intermediate_size": 32}}}, "its per_layer_config has intermediate_size"),
        ({"per_layer_config": {"x": {}}}, "its per_layer_config is not one of layers by their numbers"),
        (
            {"per_layer_config": {"1": {"head_dim": 48}}, "layer_types": ["sliding_attention", "full_attention"] * 2},
            "layers that rotate alike have heads of several sizes",
        ),
        ({"num_kv_shared_layers": 4}, "4 of its layers share keys and values, and not all of them with an earlier one"),
        ({"hidden_size_per_layer_input": 8}, "some of its tokens have no inputs for each layer"),
        ({"enable_moe_block": True}, "config.json has no top_k_experts"),
        (
            {"enable_moe_block": True, "top_k_experts": 2, "moe_intermediate_size": 16},
            "2 of 0 experts cannot be chosen",
        ),
    ],
)
def test_blocks_that_differ_otherwise_are_said(changes: dict[str, Any], reason: str | None) -> None:
    own = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 8}
    assert why_not_lean({"architectures": ["Gemma4ForCausalLM"], **SIZES, **own, **changes}) == reason


def test_a_model_that_is_not_in_the_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["OtherForCausalLM"]}))
    with pytest.raises(QuasarError, match="does not run this model: OtherForCausalLM is not in its table"):
        load_target(tmp_path, CPU, FLOAT)


def test_the_page_has_the_table_of_the_code() -> None:
    page = architectures_table.PAGE.read_text(encoding="utf-8")
    assert page == architectures_table.renewed(page), "run python -m tools.architectures_table"
    assert page.count("ForCausalLM` (") == len(ARCHITECTURES)
