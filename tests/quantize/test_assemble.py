"""The section of `config.json` that tells loaders which layers have codes, and of which width."""

from quasar_core.checkpoint.fused_names import name_in_vllm
from quasar_core.checkpoint.loaders import Config
from quasar_core.config import QuantizeConfig
from quasar_core.quantize.assemble import quantization_section
from quasar_core.quantize.commits import Width

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


def test_layers_that_all_find_by_their_names_are_not_listed() -> None:
    widths = dict.fromkeys([f"{ATTENTION}.q_proj", f"{MLP}.gate_proj", f"{MLP}.up_proj"], Width(4, 32))
    section = quantization_section(QuantizeConfig(), widths)
    assert not {"dynamic", "modules_in_block_to_quantize"} & section.keys()


def test_gate_and_up_in_one_are_listed_under_the_names_of_the_two_as_well() -> None:
    """A list in a list, as optimum wants it; nothing that has no codes is in it."""
    widths = dict.fromkeys([f"{ATTENTION}.q_proj", f"{MLP}.gate_up_proj"], Width(4, 32))
    section = quantization_section(QuantizeConfig(), widths)
    names = [*widths, f"{MLP}.gate_proj", f"{MLP}.up_proj"]
    assert section["modules_in_block_to_quantize"] == [names]
    assert Config.of(section).named == set(names)


def test_mamba_has_its_rule_under_both_names() -> None:
    name = "model.layers.0.mamba.in_proj"
    widths = {f"{ATTENTION}.q_proj": Width(4, 32), f"{ATTENTION}.k_proj": Width(4, 32), name: Width(8, 64)}
    config = Config.of(quantization_section(QuantizeConfig(), widths))
    assert [config.width(asked) for asked in (name, name_in_vllm(name), f"{ATTENTION}.q_proj")] == [
        (8, 64),
        (8, 64),
        (4, 32),
    ]
