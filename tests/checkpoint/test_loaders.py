"""Which loaders take a checkpoint: their rules on hand-written layers, and on what `quantize` writes."""

import re
from typing import Any

import pytest

from quasar_core.checkpoint.fused_names import dynamic_rules, fused_name, listed_layers
from quasar_core.checkpoint.headers import StoredLayer
from quasar_core.checkpoint.loaders import LOADERS, VLLM_CPU_FAILS, Config, describe_loaders
from quasar_core.errors import QuasarError

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
ALL = tuple(LOADERS)
VLLM = {"vLLM", "vLLM on a CPU"}


def block(bits: int = 4, group: int = 128, inputs: int = 1024, **others: tuple[int, int]) -> list[StoredLayer]:
    """The layers of a block; `others` have a width of their own."""
    sizes = {"q_proj": 1024, "k_proj": 512, "v_proj": 512, "o_proj": 1024, "gate_proj": 2048, "up_proj": 2048}
    return [
        StoredLayer(
            f"{MLP if part[0] in 'gu' else ATTENTION}.{part}", inputs, outputs, *others.get(part, (bits, group))
        )
        for part, outputs in sizes.items()
    ]


def section(bits: int = 4, group: int = 128, **options: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": True, "desc_act": False, **options}


def refusing(layers: list[StoredLayer], config: dict[str, Any]) -> set[str]:
    return {name for name, verdict in describe_loaders(layers, config).items() if verdict.startswith("no: ")}


def test_the_usual_checkpoint_loads_everywhere() -> None:
    assert describe_loaders(block(), section()) == dict.fromkeys(ALL, "yes")


@pytest.mark.parametrize(
    ("layers", "config", "loaders", "reason"),
    [
        (
            block(inputs=576),
            section(),
            VLLM | {"SGLang"},
            "576 inputs are not a multiple of the group",
        ),
        (block(inputs=576, group=64), section(group=64), set(), ""),
        (block(inputs=64), section(), VLLM | {"SGLang"}, "64 inputs are not a multiple of the group"),
        (block(8), section(8), {"vLLM on a CPU"}, "it takes 4 bits, not 8"),
        (block(3), section(3), VLLM | {"SGLang"}, "it takes 4 and 8 bits, not 3"),
        (block(), section(sym=False), VLLM | {"SGLang"}, "it takes no asymmetric codes"),
        (
            block(group=256),
            section(group=256),
            VLLM | {"SGLang"},
            "groups of 32, 64, 128 or a whole row, not 256",
        ),
        (block(), section(desc_act=True), VLLM, "in the order of activations"),
        (block(group=-1), section(group=-1), set(), ""),
    ],
)
def test_one_width_for_all(layers: list[StoredLayer], config: dict[str, Any], loaders: set[str], reason: str) -> None:
    assert refusing(layers, config) == loaders
    for name in loaders:
        assert reason in describe_loaders(layers, config)[name]


def test_groups_that_few_know() -> None:
    layers, config = block(group=96, inputs=960), section(group=96)
    assert refusing(layers, config) == set(ALL)
    told = "no: it takes groups of 16, 32, 64, 128, 256, 512, 1024 or a whole row, not 96"
    assert describe_loaders(layers, config)["GPTQModel"] == f"{told} ({ATTENTION}.q_proj and 5 more)"


@pytest.mark.parametrize(
    ("name", "loaders", "reason"),
    [
        (f"{MLP}.gate_up_proj", {"GPTQModel"}, "gate and up as two layers"),
        (f"{MLP}.experts.3.up_proj", {"transformers", "vLLM on a CPU"}, "experts"),
        ("model.layers.0.block_sparse_moe.experts.3.w1", {"GPTQModel", "transformers", "vLLM on a CPU"}, "experts"),
        ("model.layers.0.experts.3.up_proj", {"GPTQModel", "transformers", "vLLM on a CPU"}, "experts"),
        ("model.layers.2.feed_forward.experts.3.w1", {"GPTQModel", "transformers", "vLLM on a CPU"}, "experts"),
        ("model.layers.0.mamba.in_proj", {"GPTQModel"}, "Mamba"),
        (f"{MLP}.shared_expert.up_proj", set(), ""),
    ],
)
def test_names_that_some_do_not_look_for(name: str, loaders: set[str], reason: str) -> None:
    layers = [StoredLayer(name, 1024, 1024, 4, 128)]
    config = section(modules_in_block_to_quantize=listed_layers([name]))
    assert refusing(layers, config) == loaders
    for loader in loaders:
        assert reason in describe_loaders(layers, config)[loader]


def test_layers_without_codes_that_optimum_takes_for_some_with() -> None:
    """A delta rule's, unless the config lists those that have codes, or they have some too."""
    layers = [StoredLayer(f"model.layers.0.linear_attn.{name}", 1024, 1024, 4, 128) for name in ("in_proj_qkv", "out")]
    told = describe_loaders(layers, section())["transformers"]
    assert told.startswith("no: its config does not list the layers with codes")
    listed = [[layer.name for layer in layers]]
    assert describe_loaders(layers, section(modules_in_block_to_quantize=listed))["transformers"] == "yes"
    layers.append(StoredLayer("model.layers.0.linear_attn.in_proj_a", 1024, 32, 4, 128))
    assert describe_loaders(layers, section())["transformers"] == "yes"


@pytest.mark.parametrize(
    ("architecture", "layer", "loader", "reason"),
    [
        ("Phi3ForCausalLM", f"{MLP}.gate_proj", "transformers", "its model has gate_up_proj in one layer"),
        ("Glm4MoeForCausalLM", f"{MLP}.gate_proj", "GPTQModel", "its pass of this architecture fails"),
        ("GraniteMoeHybridForCausalLM", f"{ATTENTION}.q_proj", "GPTQModel", "its class for this architecture fails"),
    ],
)
def test_architectures_that_one_does_not_run(architecture: str, layer: str, loader: str, reason: str) -> None:
    found = describe_loaders([StoredLayer(layer, 1024, 1024, 4, 128)], section(), architecture)
    assert found.pop(loader) == f"no: {reason} ({layer})"
    assert set(found.values()) == {"yes"}


def test_what_an_export_would_mend() -> None:
    """Other names, and nothing else: a group size that GPTQModel has no kernel for stays a reason."""
    layer = StoredLayer(f"{MLP}.gate_up_proj", 960, 2048, 4, 64)
    told = describe_loaders([layer], section(group=64), "Phi3ForCausalLM")["GPTQModel"]
    assert told == f"no: it reads gate and up as two layers ({layer.name}); `quasar models export` writes what it loads"
    assert "export" not in describe_loaders([layer], section(group=64), "LlamaForCausalLM")["GPTQModel"]
    odd = StoredLayer(layer.name, 960, 2048, 4, 96)
    assert "export" not in describe_loaders([odd], section(group=96), "Phi3ForCausalLM")["GPTQModel"]


def test_experts_in_16_bits_of_an_export_are_gptqmodels_alone() -> None:
    layers = [StoredLayer(f"{ATTENTION}.q_proj", 1024, 1024, 4, 128)]
    found = describe_loaders(layers, section(meta={"exported_for": "gptqmodel"}), "GraniteMoeForCausalLM")
    assert found.pop("GPTQModel") == "yes"
    assert set(found.values()) == {"no: its experts have no codes, and the names that GPTQModel looks for"}
    assert set(describe_loaders(layers, section(meta="theirs"), "GraniteMoeForCausalLM").values()) == {"yes"}


def test_mixtrals_experts_under_transformers_names() -> None:
    layers = [StoredLayer(f"{MLP}.experts.0.{part}_proj", 1024, 1024, 4, 128) for part in ("gate", "up", "down")]
    found = describe_loaders(layers, section(), "MixtralForCausalLM")
    assert found["GPTQModel"] == "yes"
    for loader in ("vLLM", "vLLM on a CPU", "SGLang"):
        assert found[loader].startswith("no: it looks for experts in block_sparse_moe")
    assert describe_loaders(layers, section(), "Qwen3MoeForCausalLM")["vLLM"] == "yes"


@pytest.mark.parametrize("listed", [True, False])
def test_gate_and_up_of_phi_stored_as_two(listed: bool) -> None:
    """vLLM asks for the one layer that its class has."""
    names = [f"{MLP}.gate_proj", f"{MLP}.up_proj", f"{ATTENTION}.qkv_proj"]
    layers = [StoredLayer(name, 1024, 1024, 4, 128) for name in names]
    told = listed_layers(names)
    assert told == [*names, f"{MLP}.gate_up_proj"]
    config = section(modules_in_block_to_quantize=[told]) if listed else section()
    assert bool(refusing(layers, config) & VLLM) == (not listed)


def test_names_that_vllm_asks_for() -> None:
    """It reads codes of what is stored as one where the config lists the parts; Phi's it finds by itself."""
    gate_up, mamba = f"{MLP}.gate_up_proj", "model.layers.1.mamba.in_proj"
    listed = listed_layers([gate_up, mamba])
    assert listed == [gate_up, mamba, f"{MLP}.gate_proj", f"{MLP}.up_proj", "model.layers.1.mixer.in_proj"]
    assert listed_layers([layer.name for layer in block()]) is None
    layers = [StoredLayer(name, 1024, 1024, 4, 128) for name in (gate_up, mamba)]
    told = f"no: its config does not list it under the name that vLLM asks for ({gate_up} and 1 more)"
    assert describe_loaders(layers, section())["vLLM"] == told
    assert refusing(layers, section(modules_in_block_to_quantize=[[gate_up, mamba]])) >= VLLM
    for whole in ([listed], listed):
        assert not refusing(layers, section(modules_in_block_to_quantize=whole)) & VLLM
    phi = [StoredLayer(name, 1024, 1024, 4, 128) for name in (gate_up, f"{ATTENTION}.qkv_proj")]
    assert not refusing(phi, section()) & VLLM


def test_rules_for_mamba_under_the_name_that_vllm_has() -> None:
    name = "model.layers.1.mamba.in_proj"
    rules = dynamic_rules({name: {"bits": 8}})
    assert rules == {f"{re.escape(x)}$": {"bits": 8} for x in (name, "model.layers.1.mixer.in_proj")}
    layers, listed = [StoredLayer(name, 1024, 1024, 8, 128)], [listed_layers([name])]
    assert describe_loaders(layers, section(dynamic=rules, modules_in_block_to_quantize=listed))["vLLM"] == "yes"
    rules.popitem()
    told = describe_loaders(layers, section(dynamic=rules, modules_in_block_to_quantize=listed))["vLLM"]
    assert told.startswith("no: its config tells 4 bits in groups of 128, and stored are 8 bits")


def test_architectures_that_vllms_cpu_build_does_not_run() -> None:
    for architecture, reason in VLLM_CPU_FAILS.items():
        found = describe_loaders(block(), section(), architecture)
        assert found.pop("vLLM on a CPU").startswith(f"no: {reason}")
        assert set(found.values()) == {"yes"}


def test_sizes_that_fit_no_tile() -> None:
    """vLLM pads them on a GPU; SGLang does not, and vLLM's CPU kernel takes multiples of 32."""
    odd = [StoredLayer("up", 1024, 1000, 4, 128)]
    found = describe_loaders(odd, section())
    assert found["vLLM"] == found["GPTQModel"] == "yes"
    assert found["vLLM on a CPU"] == "no: 1000 outputs are not a multiple of 32 (up)"
    assert found["SGLang"] == "no: 1000 outputs are not a multiple of 64 (up)"
    assert describe_loaders([StoredLayer("up", 576, 256, 4, 64)], section(group=64))["SGLang"] == "yes"
    assert describe_loaders([StoredLayer("up", 576, 192, 4, 64)], section(group=64))["SGLang"].startswith(
        "no: 576 inputs"
    )


def test_sglang_asks_about_the_usual_width_first() -> None:
    """Where Marlin does not take that, it knows no method for the checkpoint, whatever its layers have."""
    names = [layer.name for layer in block()]
    rules = dynamic_rules({name: {"bits": 4, "group_size": 128} for name in names})
    found = describe_loaders(block(), section(3, dynamic=rules))
    assert found["vLLM"] == "yes"
    assert found["SGLang"].startswith("no: it takes 4 and 8 bits, not 3")


def test_fused_parts_are_judged_together() -> None:
    """192 outputs of k and of v fit no tile of 128, and with the 640 of q they make 1024."""
    parts = [
        StoredLayer(f"a.{name}", 576, outputs, 4, 64)
        for name, outputs in (("q_proj", 640), ("k_proj", 192), ("v_proj", 192))
    ]
    assert describe_loaders(parts, section(group=64))["SGLang"] == "yes"
    assert (
        describe_loaders(parts[:2], section(group=64))["SGLang"]
        == "no: 576 inputs are not a multiple of 128 (a.qkv_proj)"
    )


def test_parts_of_two_widths_are_refused_by_those_who_fuse() -> None:
    layers = block(v_proj=(8, 128))
    config = section(dynamic=dynamic_rules({f"{ATTENTION}.v_proj": {"bits": 8, "group_size": 128}}))
    found = describe_loaders(layers, config)
    told = "q_proj has 4 bits in groups of 128, k_proj has 4 bits in groups of 128, v_proj has 8 bits in groups of 128"
    assert found["vLLM"] == f"no: it reads them as one product, and {told} ({ATTENTION}.qkv_proj)"
    assert found["SGLang"].startswith("no: it reads them as one product")
    assert found["GPTQModel"] == "yes"
    assert found["transformers"].startswith(
        "no: optimum reads all layers at 4 bits in groups of 128, and this one has 8 b"
    )


def wide_attention(rules: dict[str, Any]) -> dict[str, str]:
    """q, k and v at 8 bits beside 4, told by these rules."""
    layers = block(q_proj=(8, 128), k_proj=(8, 128), v_proj=(8, 128))
    return describe_loaders(layers, section(dynamic=rules))


def test_rules_under_the_parts_names_alone_are_read_wrongly_by_those_who_fuse() -> None:
    """As checkpoints before this were written; the fused names mend it."""
    others = {f"{ATTENTION}.{part}_proj": {"bits": 8, "group_size": 128} for part in "qkv"}
    before = wide_attention({f"{re.escape(name)}$": width for name, width in others.items()})
    stored = "its config tells 4 bits in groups of 128, and stored are 8 bits in groups of 128"
    assert before["vLLM"] == f"no: {stored} ({ATTENTION}.qkv_proj)"
    assert before["SGLang"] == before["vLLM"]
    assert before["GPTQModel"] == "yes"
    after = wide_attention(dynamic_rules(others))
    assert (after["vLLM"], after["SGLang"], after["GPTQModel"]) == ("yes", "yes", "yes")
    fused_alone = wide_attention({r".*\.qkv_proj": {"bits": 8}})
    assert fused_alone["vLLM"] == "yes"
    assert fused_alone["GPTQModel"].startswith(f"no: {stored} ({ATTENTION}.q_proj and 2 more")


def test_rules_that_leave_a_layer_as_it_was() -> None:
    rules = {r"-:.*o_proj": {}, "+:.*": {"bits": 4}}
    assert describe_loaders(block(), section(dynamic=rules))["vLLM"] == (
        f"no: its config tells no codes, and stored are 4 bits in groups of 128 ({ATTENTION}.o_proj)"
    )
    without = [layer for layer in block() if not layer.name.endswith("o_proj")]
    assert describe_loaders(without, section(dynamic=rules))["vLLM"] == "yes"


def test_the_first_rule_that_matches_from_the_beginning_counts() -> None:
    config = Config.of(section(dynamic={"b": {"bits": 2}, "+:a": {"bits": 3}, "ab": {"bits": 8}}))
    assert [config.width(name) for name in ("ab", "b", "c")] == [(3, 128), (2, 128), (4, 128)]


@pytest.mark.parametrize("rules", [{"(": {"bits": 4}}, {"a": 4}, {"a": None}, ["a"], "a"])
def test_rules_that_are_none(rules: Any) -> None:
    with pytest.raises(QuasarError, match="The rules of `dynamic` in quantization_config cannot be read"):
        describe_loaders(block(), section(dynamic=rules))


def test_a_quantized_head() -> None:
    found = describe_loaders([*block(), StoredLayer("lm_head", 1024, 2048, 4, 128)], section())
    assert found.pop("transformers") == "no: optimum knows no quantized head (lm_head)"
    assert set(found.values()) == {"yes"}


def test_other_methods() -> None:
    found = describe_loaders([], {"quant_method": "compressed-tensors"})
    assert found.pop("GPTQModel") == "no: it does not read compressed-tensors"
    assert set(found.values()) == {"yes"}
    assert set(describe_loaders([], {"quant_method": "auto-round"}).values()) == {"not known: the method is auto-round"}


def test_fused_names() -> None:
    assert fused_name("model.layers.3.self_attn.k_proj") == "model.layers.3.self_attn.qkv_proj"
    assert fused_name("mlp.up_proj") == "mlp.gate_up_proj"
    assert fused_name("up_proj") == "gate_up_proj"
    assert fused_name("linear_attn.in_proj_z") == "linear_attn.in_proj_qkvz"
    assert fused_name("feed_forward.w3") == "feed_forward.w13"
    assert fused_name("mlp.down_proj") is None
    assert fused_name("a.self_attn.gate_proj") is None
    rules = dynamic_rules({"a.self_attn.gate_proj": {"bits": 8}})
    assert rules == {r"a\.self_attn\.gate_proj$": {"bits": 8}, r"a\.self_attn\.output_gate_proj$": {"bits": 8}}
    rules = dynamic_rules({"a.up_proj": {"bits": 3}, "a.down_proj": {"bits": 8}})
    assert rules == {r"a\.up_proj$": {"bits": 3}, r"a\.down_proj$": {"bits": 8}, r"a\.gate_up_proj$": {"bits": 3}}
