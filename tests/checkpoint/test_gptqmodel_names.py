"""What GPTQModel calls layers: names there and back, and layers that are several there, cut and joined again."""

import pytest
import torch
from helpers.packed_weights import make_weight, random_codes
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_core.checkpoint.gptq_format import (
    codes_per_period,
    count_groups,
    cut_outputs,
    join_outputs,
    pack_columns,
    pack_rows,
    unpack_weight,
)
from quasar_core.checkpoint.gptqmodel_names import NAMINGS, own_layers

BITS = st.sampled_from((2, 3, 4, 8))
GROUPS = st.sampled_from((16, 32, 64, -1))
MLP, MIXTURE = "model.layers.3.mlp", "model.layers.3.block_sparse_moe"


@settings(max_examples=60, deadline=None)
@given(bits=BITS, group_size=GROUPS, inputs=st.integers(1, 4), outputs=st.integers(1, 3), count=st.integers(1, 3))
def test_parts_stand_for_slices_of_the_whole(bits: int, group_size: int, inputs: int, outputs: int, count: int) -> None:
    size = outputs * codes_per_period(bits)
    whole = make_weight(bits, inputs * 32, size * count, group_size)
    stored = [unpack_weight("part", part, bits, group_size, 1) for part in cut_outputs(whole.pack(), bits, count)]
    dense = whole.dequantize()
    for index, part in enumerate(stored):
        assert torch.equal(part.dequantize(), dense[index * size : (index + 1) * size])
    assert torch.equal(join_outputs(stored).dequantize(), dense)


@settings(max_examples=30, deadline=None)
@given(bits=BITS, offset=st.sampled_from((0, 1)), seed=st.integers(0, 10_000))
def test_what_is_stored_stays_so_in_either_version(bits: int, offset: int, seed: int) -> None:
    """Zeros of 0, or stored as −1 is in version 1; rows in another order; a bias."""
    size = codes_per_period(bits)
    stored = {
        "qweight": pack_rows(random_codes(bits, 64, 2 * size, seed), bits),
        "qzeros": pack_columns(random_codes(bits, 2, 2 * size, seed), bits),
        "scales": torch.rand(2, 2 * size).half(),
        "g_idx": (torch.arange(64) % 2).int(),
        "bias": torch.rand(2 * size),
    }
    parts = cut_outputs(stored, bits, 2)
    codes = {name: tensor for name, tensor in stored.items() if name != "bias"}
    dense = unpack_weight("whole", codes, bits, 32, offset).dequantize()
    for index, part in enumerate(parts):
        rows = slice(index * size, (index + 1) * size)
        assert torch.equal(part.pop("bias"), stored["bias"][rows])
        assert torch.equal(unpack_weight("part", part, bits, 32, offset).dequantize(), dense[rows])
        assert all(tensor.is_contiguous() for tensor in part.values())


@pytest.mark.parametrize(("outputs", "count"), [(24, 2), (32, 3)])
def test_parts_that_fill_no_words_are_refused(outputs: int, count: int) -> None:
    groups = count_groups(32, 32)
    stored = {
        "qweight": torch.zeros(4, outputs, dtype=torch.int32),
        "qzeros": torch.zeros(groups, outputs // 8, dtype=torch.int32),
        "scales": torch.ones(groups, outputs).half(),
    }
    with pytest.raises(ValueError, match=r"do not fill whole words|cannot be cut"):
        cut_outputs(stored, 4, count)


def test_parts_that_differ_are_no_one_layer() -> None:
    one = make_weight(4, 64, 8, 32)
    for other in (make_weight(8, 64, 8, 32), make_weight(4, 64, 8, 64)):
        with pytest.raises(ValueError, match="differ in bits or groups"):
            join_outputs([one, other])


@pytest.mark.parametrize(
    ("family", "layer", "there"),
    [
        ("Phi3", f"{MLP}.gate_up_proj", (f"{MLP}.gate_proj", f"{MLP}.up_proj")),
        ("Phi3", f"{MLP}.down_proj", (f"{MLP}.down_proj",)),
        ("Phi3", "model.layers.3.self_attn.qkv_proj", ("model.layers.3.self_attn.qkv_proj",)),
        ("Glm4", f"{MLP}.gate_up_proj", (f"{MLP}.gate_proj", f"{MLP}.up_proj")),
        ("Mixtral", f"{MIXTURE}.experts.11.w3", (f"{MLP}.experts.11.up_proj",)),
        ("Mixtral", f"{MIXTURE}.experts.0.w2", (f"{MLP}.experts.0.down_proj",)),
        ("Mixtral", "model.layers.3.self_attn.q_proj", ("model.layers.3.self_attn.q_proj",)),
        ("Lfm2Moe", "model.layers.3.feed_forward.w1", ("model.layers.3.feed_forward.w1",)),
        ("Lfm2Moe", "model.layers.3.feed_forward.experts.1.w1", ("model.layers.3.feed_forward.experts.1.gate_proj",)),
    ],
)
def test_names_there_and_back(family: str, layer: str, there: tuple[str, ...]) -> None:
    naming = NAMINGS[f"{family}ForCausalLM"]
    assert naming.parts(layer) == there
    assert [naming.own(name) for name in there] == [(layer, index) for index in range(len(there))]


def test_plain_tensors_have_names_there_too() -> None:
    assert NAMINGS["MixtralForCausalLM"].there(f"{MIXTURE}.gate.weight") == f"{MLP}.gate.weight"
    granite = NAMINGS["GraniteMoeForCausalLM"]
    assert granite.there(f"{MIXTURE}.router.layer.weight") == f"{MIXTURE}.router.weight"
    assert granite.there("model.norm.weight") == "model.norm.weight"


def test_layers_whose_codes_are_not_read() -> None:
    lfm2 = NAMINGS["Lfm2MoeForCausalLM"]
    assert lfm2.keeps("model.layers.3.feed_forward.experts.1.w1")
    assert lfm2.keeps("model.layers.3.self_attn.out_proj")
    assert not lfm2.keeps("model.layers.3.conv.out_proj")
    assert not NAMINGS["MixtralForCausalLM"].keeps(f"{MIXTURE}.experts.0.w1")


def test_layers_by_the_models_own_names() -> None:
    """A layer of which a part is missing keeps its name, for whoever tells that the model has none of that name."""
    stored = [f"{MLP}.up_proj", f"{MLP}.gate_proj", f"{MLP}.down_proj", "model.layers.4.mlp.up_proj"]
    assert own_layers(stored, "Phi3ForCausalLM") == {
        f"{MLP}.down_proj": (f"{MLP}.down_proj",),
        f"{MLP}.gate_up_proj": (f"{MLP}.gate_proj", f"{MLP}.up_proj"),
        "model.layers.4.mlp.up_proj": ("model.layers.4.mlp.up_proj",),
    }
    assert list(own_layers(stored, "LlamaForCausalLM")) == sorted(stored)
    own = [f"{MIXTURE}.experts.0.w1"]
    assert own_layers(own, "MixtralForCausalLM") == {own[0]: tuple(own)}
    assert own_layers([f"{MLP}.experts.0.gate_proj"], "MixtralForCausalLM") == {own[0]: (f"{MLP}.experts.0.gate_proj",)}
