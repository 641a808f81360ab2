"""Every option that transformers' config classes have is used, known to be without effect, or a reason against lean."""

import copy
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.decoder_cases import (
    CPU,
    DELTA,
    FLOAT,
    SIZES,
    YARN,
    assert_close,
    classes_of,
    fresh_logits,
    in_passes,
    random_tokens,
    save_model,
)
from helpers.mixed_cases import MAMBA, NORMS_GROUPS

from quasar_core.errors import QuasarError
from quasar_core.files import read_json
from quasar_core.models.architectures import ARCHITECTURES
from quasar_core.models.config.decoder import why_not_lean
from quasar_core.models.config.options import REQUIRED, WITHOUT_EFFECT
from quasar_core.models.context import context_limit
from quasar_core.models.loading import load_models
from quasar_core.models.weights.lean_weights import load_target

KNOWN = sorted(set(ARCHITECTURES) - {"PanguEmbeddedForCausalLM"})
NAMES = [name.removesuffix("ForCausalLM") for name in KNOWN]
SLIDING = ["full_attention", "sliding_attention"] * 2
# Another value than SIZES have for each option that a row may read; sizes themselves are in the shapes of the weights.
OTHER: dict[str, Any] = {
    "attention_bias": True,
    "block_auto_adjust_ff_dim": False,
    "block_ffn_dim_multiplier": 2.0,
    "block_multiple_of": 32,
    "conv_L_cache": 5,
    "conv_bias": True,
    "full_attn_idxs": [0, 2],
    "norm_eps": 0.1,
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 48,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_value_head_dim": 48,
    "mamba_conv_bias": False,
    "mamba_d_conv": 3,
    "mamba_d_head": 32,
    "mamba_d_state": 24,
    "mamba_expand": 4,
    "mamba_n_groups": 2,
    "mamba_n_heads": 4,
    "mamba_proj_bias": True,
    "num_local_experts": 2,
    "position_embedding_type": "rope",
    "shared_intermediate_size": 48,
    "time_step_limit": [0.5, 1.0],
    "head_dim": 32,
    "hidden_act": "gelu",
    "hidden_activation": "silu",
    "attention_k_eq_v": True,
    "enable_moe_block": True,
    "hidden_size_per_layer_input": 32,
    "num_kv_shared_layers": 1,
    "use_double_wide_mlp": True,
    "vocab_size_per_layer_input": 100,
    "attention_out_bias": True,
    "clip_qkv": 0.5,
    "decoder_sparse_step": 2,
    "first_k_dense_replace": 2,
    "mlp_only_layers": [2],
    "num_dense_layers": 2,
    "use_expert_bias": False,
    "moe_intermediate_size": 48,
    "n_group": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "qkv_bias": False,
    "routed_scaling_factor": 2.5,
    "shared_expert_intermediate_size": 32,
    "topk_group": 2,
    "use_qk_norm": True,
    "attention_multiplier": 0.3,
    "attn_logit_softcapping": 2.0,
    "embedding_multiplier": 2.0,
    "final_logit_softcapping": 2.0,
    "logits_scaling": 3.0,
    "original_max_position_embeddings": 16,
    "query_pre_attn_scalar": 9,
    "residual_multiplier": 0.3,
    "sliding_window_pattern": 2,
    "use_bidirectional_attention": True,
    "layer_types": SLIDING,
    "layer_rope_theta": [0, 500.0, 0, 500.0],
    "output_multiplier": 0.7,
    "post_norm_eps": 0.1,
    "qk_scale_factor": 1.5,
    "max_window_layers": 1,
    "mlp_bias": True,
    "no_rope_layer_interval": 2,
    "no_rope_layers": [1, 0, 0, 1],
    "num_key_value_heads": 4,
    "rms_norm_eps": 0.1,
    "rope_parameters": YARN,
    "sliding_window": 7,
    "tie_word_embeddings": True,
    "use_sliding_window": True,
}
# Of classes whose own values would be gigabytes, or more than the decoder runs.
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
SIGMOIDS = {"n_routed_experts": 4, "n_shared_experts": 1, **EXPERTS}
SMALL: dict[str, dict[str, Any]] = {
    "GraniteMoeHybrid": {**MAMBA, "num_experts_per_tok": 1},
    "Qwen3_5": DELTA,
    "Qwen3_5Moe": {**DELTA, "num_experts": 4, "shared_expert_intermediate_size": 48, **EXPERTS},
    "Lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "Lfm2Moe": {"layer_types": ["conv", "full_attention"] * 2, "num_experts": 4, "num_dense_layers": 1, **EXPERTS},
    "Mixtral": {"num_local_experts": 4},
    "GraniteMoe": {"num_local_experts": 4},
    "GraniteMoeShared": {"num_local_experts": 4, "shared_intermediate_size": 32},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {"num_experts": 4, "shared_expert_intermediate_size": 48, **EXPERTS},
    "Qwen3Moe": {"num_experts": 4, **EXPERTS},
    "Glm4Moe": SIGMOIDS,
    "Dots1": SIGMOIDS,
    "Gemma4": {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 96, "global_head_dim": 32},
}
# Keys that no class names, but that transformers keeps and reads in masks, caches and rotary embeddings.
SHARED: dict[str, Any] = {
    "attention_chunk_size": 8,
    "is_causal": False,
    "layer_types": SLIDING,
    "partial_rotary_factor": 0.5,
    "rope_theta": 100.0,
    "sliding_window": 7,
    "use_sliding_window": True,
}


def reloaded_logits(folder: Path, model: Any) -> torch.Tensor:
    """Of what transformers makes of the files of `model`: a config that is read may differ from the one written."""
    own = {"_name_or_path": str(folder), "dtype": "float32"}  # which reading adds
    if transformers.AutoConfig.from_pretrained(folder).to_dict() != {**model.config.to_dict(), **own}:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=FLOAT)
    return fresh_logits(model, random_tokens())


def save_config(folder: Path, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """What stands in the config.json of a model that has these options."""
    config_class, model_class = classes_of(name)
    config = config_class(**{**SIZES, **copy.deepcopy(options)})  # transformers writes into what it is given
    config.architectures = [model_class.__name__]
    config.save_pretrained(folder)
    return read_json(folder / "config.json")


def fields(name: str) -> set[str]:
    """What the class takes by name: in transformers 5 its parameters are those of all its bases."""
    parameters = inspect.signature(classes_of(name)[0]).parameters
    return {key for key, kind in parameters.items() if kind.kind is not kind.VAR_KEYWORD}


@pytest.mark.parametrize("name", NAMES)
def test_every_field_of_a_config_class_is_accounted_for(name: str) -> None:
    unknown = fields(name) - WITHOUT_EFFECT - OTHER.keys() - set(REQUIRED) - {"architectures", "torch_dtype"}
    assert not unknown, f"{name}Config has {sorted(unknown)}: used, without effect, or a reason not to run lean?"


def option_cases() -> Iterator[Any]:
    """Each option that a class names, and each that none does with every third class; with the others in `slow`."""
    for place, name in enumerate(NAMES):
        named = fields(name) & OTHER.keys()
        for number, option in enumerate(sorted(named | SHARED.keys())):
            is_one_more = option not in named and (place + number) % 3
            yield pytest.param(name, option, marks=[pytest.mark.slow] if is_one_more else [])


@pytest.mark.parametrize(("name", "option"), list(option_cases()))
def test_an_option_is_used_or_a_reason_or_without_effect(name: str, option: str, tmp_path: Path) -> None:
    """Alone, and beside a window: in each case logits equal transformers', or our decoder says why it steps back.

    A window that waits for `use_sliding_window` is one of the classes that have this field; to others it is an option.
    """
    if option == "mamba_n_groups" and not NORMS_GROUPS:
        pytest.skip("this transformers norms all groups as one")
    compared: list[dict[str, Any]] = []
    beside: list[dict[str, Any]] = [{}, {"sliding_window": 5}]
    if "use_sliding_window" in fields(name):
        beside.append({"sliding_window": 5, "use_sliding_window": True})
    for number, others in enumerate(beside):
        value = OTHER.get(option, SHARED.get(option))
        options = {"sliding_window": None, **SMALL.get(name, {}), **others, option: value}
        folder = tmp_path / str(number)
        try:
            content = save_config(folder, name, options)
            if why_not_lean(content) is not None or content in compared:
                continue
            expected = reloaded_logits(folder, save_model(folder, name, options))
        except Exception:  # of many kinds
            continue  # transformers itself does not run it
        compared.append(content)
        if why_not_lean(read_json(folder / "config.json")) is None:
            assert_close(
                in_passes(load_target(folder, CPU, FLOAT), random_tokens(), [20, 1, 4, 20]), expected, family=name
            )


@pytest.mark.parametrize("option", sorted(WITHOUT_EFFECT & {"attention_dropout", "initializer_range", "use_cache"}))
def test_options_without_effect_have_none(option: str, tmp_path: Path) -> None:
    changed = {"attention_dropout": 0.5, "initializer_range": 0.3, "use_cache": False}[option]
    model = save_model(tmp_path, "Llama", {option: changed})
    assert_close(
        in_passes(load_target(tmp_path, CPU, FLOAT), random_tokens(), [45]), fresh_logits(model, random_tokens())
    )


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        (
            "Mistral",
            {"sliding_window": 7, "layer_types": SLIDING},
            "layers of mistral are of one type, and config.json lists others",
        ),
        (
            "Mistral",
            {"sliding_window": None, "layer_types": SLIDING},
            "layers of mistral are of one type, and config.json lists others",
        ),
        ("SmolLM3", {"sliding_window": 7, "layer_types": SLIDING}, "has sliding layers, and no window in use"),
        ("Llama", {"sliding_window": 7}, "llama has no windows, and config.json has a sliding_window"),
        ("Llama", {"is_causal": False}, "it has no is_causal of False"),
        ("Qwen3", {"layer_types": SLIDING[:3]}, "config.json has 4 layers, and 3 layer_types"),
        ("SmolLM3", {"no_rope_layers": [1, 0]}, "config.json has 4 layers, and 2 no_rope_layers"),
        ("Llama", {"model_type": "mistral"}, "LlamaForCausalLM is not of the model_type mistral"),
    ],
)
def test_what_a_row_ignores_is_a_reason(name: str, changes: dict[str, Any], reason: str) -> None:
    content = {"architectures": [f"{name}ForCausalLM"], **SIZES, **changes}
    assert reason in str(why_not_lean(content))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SmolLM3", {"sliding_window": 7, "layer_types": SLIDING}),
        ("Mistral", {"sliding_window": 7, "layer_types": ["full_attention"] * 4}),
    ],
)
def test_transformers_runs_what_our_decoder_steps_back_from(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    expected = reloaded_logits(tmp_path, save_model(tmp_path, name, options))
    models = load_models(tmp_path, None, CPU, torch.float32)
    assert models.notes[0].startswith("decoder: transformers, as ")
    assert_close(in_passes(models.target, random_tokens(), [45]), expected)


@pytest.mark.parametrize("option", ["sliding_window", "attention_chunk_size"])
def test_a_window_that_the_architecture_does_not_have_is_refused(option: str, tmp_path: Path) -> None:
    """transformers' cache would drop keys that the model attends to: the text would depend on the passes."""
    save_model(tmp_path, "Llama", {option: 7})
    with pytest.raises(QuasarError, match=rf"config.json has {option} 7, which llama does not have: take it out"):
        context_limit(tmp_path)
    save_model(tmp_path, "Llama", {"sliding_window": 128})  # as many positions as the model has
    assert context_limit(tmp_path) == 128
    assert load_models(tmp_path, None, CPU, FLOAT).notes[0] == "decoder: our own"
