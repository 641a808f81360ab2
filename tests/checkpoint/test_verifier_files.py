"""A verifier's files as they may be found: in shards, with keys missing, cut short, overwritten, of other types.

What can be read is read to the same logits; anything else is one sentence, and never another exception.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_cases import CPU, FLOAT, save_model
from helpers.packed_weights import make_weight
from helpers.quantized_decoder import quantize_layers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quasar_core.checkpoint.compressed_tensors import CompressedTensorsFormat, quantization_section, stored_tensors
from quasar_core.checkpoint.formats import GptqFormat
from quasar_core.checkpoint.gptq_format import pack_columns, unpack_weight
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.checkpoint.writer import ShardWriter
from quasar_core.errors import QuasarError
from quasar_core.models.describe import describe
from quasar_core.models.hf import causal_lm
from quasar_core.models.weights import lean_weights
from quasar_core.quantize.solve.eight_bit import E4M3Format, Int8Format

TOKENS = list(range(3, 20))
OPTIONS = {"head_dim": 32, "intermediate_size": 128}
NUMBERS = {"w8a8": (Int8Format(), "int"), "fp8": (E4M3Format(), "float")}
KINDS = ("gptq", *NUMBERS)
LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, and verifiers of it by their kind."""
    folder = tmp_path_factory.mktemp("made")
    save_model(folder / "target", "Qwen3", OPTIONS)
    quantize_layers(folder / "target", folder / "gptq", lambda name: 16 if "lm_head" in name else 4)
    for kind, (number, name) in NUMBERS.items():
        round_layers(folder / "target", folder / kind, number, name)
    return folder


def round_layers(source: Path, output: Path, number: Any, name: Any) -> None:
    """Every layer but the head in 8 bits, in the compressed-tensors format."""
    tensors = load_file(source / "model.safetensors")
    for full in [full for full in tensors if full.endswith("_proj.weight")]:
        parts = stored_tensors(number.round_weight(tensors.pop(full)))
        tensors |= {f"{full.removesuffix('.weight')}.{suffix}": tensor for suffix, tensor in parts.items()}
    output.mkdir()
    save_file(tensors, output / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = quantization_section(name)
    (output / "config.json").write_text(json.dumps(config))


def copy(made: Path, kind: str, to: Path, change: Callable[[dict[str, torch.Tensor]], Any] | None = None) -> Path:
    """A verifier of its own to spoil, in one file."""
    to.mkdir(parents=True, exist_ok=True)
    (to / "config.json").write_bytes((made / kind / "config.json").read_bytes())
    tensors = load_file(made / kind / "model.safetensors")
    if change is not None:
        change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, to / "model.safetensors")
    return to


def reshard(folder: Path, size: int) -> list[Path]:
    """The same tensors in shards of at most so many bytes, with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    writer = ShardWriter(folder, size)
    for name, tensor in sorted(tensors.items()):
        writer.add(name, tensor)
    writer.close()
    return sorted(folder.glob("*.safetensors"))


@cache
def target_of(library: Any, made: Path) -> Any:
    return library.load_target(made / "target", CPU, FLOAT)


def logits(made: Path, folder: Path) -> list[torch.Tensor]:
    """Of the verifier alone and beside its target, by both decoders."""
    found = []
    for library in (lean_weights, causal_lm):
        checkpoint = VerifierCheckpoint(folder)
        target = target_of(library, made)
        for model in (
            library.load_verifier_alone(checkpoint, CPU, FLOAT, "dense"),
            library.attach_verifier(target, checkpoint, "dense"),
        ):
            found.append(model.forward(TOKENS, model.new_cache(32)))
    return found


def all_equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_shards_with_an_index(kind: str, made: Path, tmp_path: Path) -> None:
    folder = copy(made, kind, tmp_path / "sharded")
    size = (folder / "model.safetensors").stat().st_size
    shards = reshard(folder, size // 4)
    assert len(shards) >= 4
    assert all_equal(logits(made, folder), logits(made, made / kind))
    whole, sharded = (describe(VerifierCheckpoint(place)) for place in (made / kind, folder))
    assert {**sharded, "checkpoint": None} == {**whole, "checkpoint": None}
    shards[1].write_bytes(shards[1].read_bytes()[:-8])
    with pytest.raises(QuasarError, match=rf"{shards[1].name} is not a (whole|readable) safetensors file"):
        VerifierCheckpoint(folder)
    shards[1].unlink()
    with pytest.raises(QuasarError, match=rf"its index names {shards[1].name}, which is not there"):
        VerifierCheckpoint(folder)


def test_a_tensor_that_the_index_names_and_no_shard_holds(made: Path, tmp_path: Path) -> None:
    folder = copy(made, "gptq", tmp_path / "lost")
    shards = reshard(folder, 20_000)
    tensors = load_file(shards[2])
    lost = sorted(tensors)[0]
    del tensors[lost]
    save_file(tensors, shards[2])
    with pytest.raises(QuasarError, match=rf"names the tensor {lost}, and {shards[2].name} does not hold it"):
        TensorFiles(folder)


# What a verifier cannot do without, and what is said where it is missing; everything else has a default.
NEEDED = {
    "model_type": "is not one that transformers understands",
    "quantization_config": "its config has no quantization_config",
}
SIZES = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"


@pytest.mark.parametrize("kind", KINDS)
def test_keys_that_are_missing_from_the_config(kind: str, made: Path, tmp_path: Path) -> None:
    """Each in turn: the same logits, or one sentence."""
    content = json.loads((made / kind / "config.json").read_text())
    expected, folder, refused = logits(made, made / kind), copy(made, kind, tmp_path / "keys"), set()
    told = {*NEEDED, *SIZES.split(), "architectures"}  # of which formats may tell what is missing; else it is the same
    for key in content if kind == KINDS[0] else content.keys() & told:
        (folder / "config.json").write_text(json.dumps({name: content[name] for name in content if name != key}))
        found: list[torch.Tensor] = []
        if refusal(lambda found=found: found.extend(logits(made, folder))) is None:
            assert all_equal(found, expected), key
        else:
            refused.add(key)
    print(kind, sorted(refused))
    assert refused >= {*NEEDED, "intermediate_size"}
    assert refused <= {*NEEDED, *SIZES.split(), "architectures", "max_position_embeddings", "rope_parameters"}


def test_keys_that_are_missing_from_gptqs_section(made: Path, tmp_path: Path) -> None:
    """4 bits, version 1, and groups as the shapes tell: what AutoGPTQ and GPTQModel take, or what must be."""
    section = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq", "pack_dtype": "int32"}
    expected, folder = logits(made, made / "gptq"), copy(made, "gptq", tmp_path / "keys")
    config = json.loads((folder / "config.json").read_text())
    for key in section:
        for missing in ({}, {key: None}) if key != "bits" else ({},):
            left = {name: value for name, value in section.items() if name != key} | missing
            (folder / "config.json").write_text(json.dumps({**config, "quantization_config": left}))
            assert all_equal(logits(made, folder), expected), key
            assert {layer["group_size"] for layer in describe(VerifierCheckpoint(folder))["layers"]} == {32}
    assert all_equal(logits(made, copy(made, "gptq", tmp_path / "no g_idx", drop_g_idx)), expected)


def refusal(call: Callable[[], Any]) -> str | None:
    """The one sentence that a call ends in, if it does; any other exception is a defect."""
    try:
        call()
    except QuasarError as error:
        sentence = str(error)
    else:
        return None
    assert "\n" not in sentence
    return sentence


def drop_g_idx(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith(".g_idx")]:
        del tensors[name]


def test_keys_that_are_missing_from_compressed_tensors_section(made: Path, tmp_path: Path) -> None:
    content = json.loads((made / "w8a8" / "config.json").read_text())
    section = content["quantization_config"]
    expected, folder = logits(made, made / "w8a8"), copy(made, "w8a8", tmp_path / "keys")

    def write(changed: Any) -> Path:
        (folder / "config.json").write_text(json.dumps({**content, "quantization_config": changed}))
        return folder

    needed = {
        "quant_method": "has None-bit|of shape|qweight|weight_scale|no layer",
        "format": "format None",
        "config_groups": "no config_groups",
    }
    for key in section:
        changed = {name: value for name, value in section.items() if name != key}
        if key in needed:
            with pytest.raises(QuasarError):
                logits(made, write(changed))
        else:
            assert all_equal(logits(made, write(changed)), expected), key
    weights = section["config_groups"]["group_0"]["weights"]
    for key in weights:
        left = {name: value for name, value in weights.items() if name != key}
        changed = {**section, "config_groups": {"group_0": {"weights": left}}}
        if key in ("num_bits", "strategy"):
            with pytest.raises(QuasarError, match="None"):
                logits(made, write(changed))
        else:
            assert all_equal(logits(made, write(changed)), expected), key


@pytest.mark.parametrize("odd", [None, 3, "gptq", [], {"config_groups": [1]}, {"config_groups": {"a": 1}}], ids=str)
@pytest.mark.parametrize("method", ["gptq", "compressed-tensors"])
def test_sections_that_are_none(odd: Any, method: str, made: Path, tmp_path: Path) -> None:
    folder = copy(made, "w8a8", tmp_path / "odd")
    section = {"quant_method": method, "format": "int-quantized", **odd, "bits": "4"} if isinstance(odd, dict) else odd
    (folder / "config.json").write_text(json.dumps({"quantization_config": section}))
    with pytest.raises(QuasarError) as caught:
        VerifierCheckpoint(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "suffix", "marker"),
    [("gptq", "qweight", "qweight"), ("w8a8", "weight_scale", "weight_scale"), ("fp8", "weight_scale", "weight_scale")],
)
def test_a_layer_without_its_marker_is_not_taken_for_a_whole_one(
    kind: str, suffix: str, marker: str, made: Path, tmp_path: Path
) -> None:
    folder = copy(made, kind, tmp_path / "part", lambda tensors: tensors.pop(f"{LAYER}.{suffix}"))
    with pytest.raises(QuasarError, match=rf"The checkpoint's layer {LAYER} has no {marker}"):
        VerifierCheckpoint(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_of_another_size(kind: str, made: Path, tmp_path: Path) -> None:
    name = "model.layers.0.input_layernorm.weight"
    folder = copy(made, kind, tmp_path / "norm", lambda tensors: tensors.update({name: torch.ones(3)}))
    with pytest.raises(QuasarError, match=rf"{name} in .* is \(3,\), and by its config \(64,\)"):
        lean_weights.load_verifier_alone(VerifierCheckpoint(folder), CPU, FLOAT, "dense")


def read_everything(folder: Path) -> None:
    """What loading and `inspect` read."""
    checkpoint = VerifierCheckpoint(folder)
    describe(checkpoint)
    for name in checkpoint.layer_names:
        checkpoint.layer(name)
    for name in checkpoint.plain_names:
        checkpoint.tensors.load(name)


@pytest.fixture(scope="module")
def scratch(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, bytes]]:
    """Folders to spoil again and again, and what their weights' file held."""
    found = {}
    for kind in ("gptq", "w8a8"):
        folder = copy(made, kind, tmp_path_factory.mktemp("spoilt") / kind)
        found[kind] = folder, (folder / "model.safetensors").read_bytes()
    return found


@settings(max_examples=60, deadline=None, derandomize=True)
@given(kind=st.sampled_from(["gptq", "w8a8"]), data=st.data())
def test_files_cut_short_or_overwritten(kind: str, data: Any, scratch: dict[str, tuple[Path, bytes]]) -> None:
    """Most of what matters lies in the header, so most of the damage is done there."""
    folder, content = scratch[kind]
    header = 8 + int.from_bytes(content[:8], "little")
    end = data.draw(st.sampled_from([header, len(content)]))
    begin = data.draw(st.integers(0, end - 1))
    if data.draw(st.booleans()):
        spoilt = content[:begin]
    else:
        other = data.draw(st.binary(min_size=1, max_size=4))
        spoilt = content[:begin] + other + content[begin + len(other) :]
    (folder / "model.safetensors").write_bytes(spoilt)
    sentence = refusal(lambda: read_everything(folder))
    assert sentence is not None or len(spoilt) >= len(content)


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8]
EIGHT = [torch.float8_e4m3fn, torch.float64, torch.bool]


@st.composite
def odd_tensors(draw: Any) -> torch.Tensor:
    """Any type, no to three sides, few values."""
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 8, 16, 32, 64]), min_size=0, max_size=3))
    dtype = draw(st.sampled_from(DTYPES + EIGHT))
    value = draw(st.sampled_from([0.0, 1.0, 70.0, float("nan"), float("inf"), -1.0]))
    whole = value if value == value and abs(value) < 100 else 0.0
    return torch.full(shape, value if dtype.is_floating_point else whole).to(dtype)


def check_unpacked(unpack: Callable[[], Any]) -> None:
    """A weight of that size that is finite, or one sentence."""
    found: list[Any] = []
    if refusal(lambda: found.append(unpack())) is None:
        dense = found[0].dequantize()
        assert dense.shape == (found[0].out_features, found[0].in_features)
        assert torch.isfinite(dense).all()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    usual=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([-1, 32, 48]),
    odd=st.dictionaries(
        st.sampled_from(["qweight", "qzeros", "scales", "g_idx"]), st.none() | odd_tensors(), max_size=2
    ),
)
def test_any_tensors_in_place_of_gptqs(bits: int, usual: int, group: int, odd: dict[str, Any]) -> None:
    tensors = {**make_weight(bits, 64, 32, 32).pack(), **odd}
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    check_unpacked(lambda: unpack_weight("a.b", present, usual, group, 1))
    if not odd and group != 48:
        read = GptqFormat(usual, group, 1).unpack("a.b", present)
        assert torch.equal(read.dequantize(), make_weight(bits, 64, 32, 32).dequantize())


COMPRESSED = ["weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    packed=st.booleans(),
    bits=st.sampled_from([2, 4, 8]),
    group=st.sampled_from([-1, 32]),
    odd=st.dictionaries(st.sampled_from(COMPRESSED), st.none() | odd_tensors(), max_size=2),
)
def test_any_tensors_in_place_of_compressed_ones(packed: bool, bits: int, group: int, odd: dict[str, Any]) -> None:
    weight = make_weight(bits, 64, 32, group)
    values = weight.codes.t().contiguous()
    tensors: dict[str, Any] = {"weight_scale": weight.scales.t().contiguous()}
    if packed:
        tensors |= {"weight_packed": pack_columns(values, bits), "weight_shape": torch.tensor([32, 64])}
    else:
        tensors["weight"] = (values.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    present = {name: tensor for name, tensor in {**tensors, **odd}.items() if tensor is not None}
    present.setdefault("weight_scale", tensors["weight_scale"])  # without it a layer is not taken for a packed one
    check_unpacked(lambda: CompressedTensorsFormat(bits, group).unpack("a.b", present))


@pytest.mark.parametrize(
    ("name", "tensor", "sentence"),
    [
        ("qweight", torch.zeros(8, 16), r"has qweight in float32, which"),
        ("qweight", torch.zeros(8, 16, dtype=torch.int64), r"has qweight in int64, which"),
        ("qzeros", torch.zeros(2, 2, dtype=torch.int16), r"has qzeros in int16, which"),
        ("scales", torch.ones(2, 16, dtype=torch.int32), r"has scales in int32, which"),
        ("scales", torch.full((2, 16), 1e6), r"has scales that are not finite"),
        ("g_idx", torch.zeros(64), r"has g_idx in float32, which"),
    ],
)
def test_types_of_gptqs_tensors(name: str, tensor: torch.Tensor, sentence: str) -> None:
    with pytest.raises(QuasarError, match=sentence):
        unpack_weight("a.b", {**make_weight(4, 64, 16, 32).pack(), name: tensor}, 4, 32, 1)


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"weight_scale": torch.ones(16, 1, dtype=torch.int32)}, r"has weight_scale in int32"),
        (
            {"weight_zero_point": torch.zeros(16, 1)},
            r"has weight_zero_point of shape \(16, 1\) in float32, not \(16, 1\)",
        ),
        ({"weight_zero_point": torch.zeros(8, 1, dtype=torch.int8)}, r"weight_zero_point of shape \(8, 1\) in int8"),
        ({"weight_g_idx": torch.ones(64, dtype=torch.int32)}, r"weight_g_idx that does not name one of 1 groups"),
        ({"weight": torch.ones(16, dtype=torch.int8)}, r"has a weight of shape \(16,\)"),
    ],
)
def test_types_of_compressed_tensors(tensors: dict[str, torch.Tensor], sentence: str) -> None:
    right = stored_tensors(Int8Format().round_weight(torch.randn(16, 64, generator=torch.Generator().manual_seed(0))))
    with pytest.raises(QuasarError, match=sentence):
        CompressedTensorsFormat(8, -1).unpack("a.b", {**right, **tensors})
