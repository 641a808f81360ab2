"""What a block's passes skip: the same codes as when every pass runs from the start, and attention computed once."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.streaming_models import EXPERTS, SIZES, SLIDING
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from quasar_core.config import QuantizeConfig
from quasar_core.models.hf.experts import separate_experts
from quasar_core.quantize.blocks import activations, layerwise
from quasar_core.quantize.blocks.activations import Activations, ModuleCache, OutputLayer, capture_first_inputs
from quasar_core.quantize.blocks.collect import find_output_layers, trace_block
from quasar_core.quantize.estimate import shape_of
from quasar_core.quantize.plan import Shape, activation_bytes, last_layers
from quasar_core.quantize.solve.gptq import SolverConfig

SAMPLES = torch.randint(97, (7, 24), generator=torch.Generator().manual_seed(3))
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "narrow": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 4, "intermediate_size": 24}),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {"head_dim": 16, **SLIDING}),
    "qwen3-moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {"head_dim": 16, **EXPERTS}),
}
BOTH = {"self_attn.o_proj", "mlp.down_proj"}


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "BATCH_TOKENS", 48)  # three batches of two rows, and one of one


def make_model(name: str) -> PreTrainedModel:
    """A random model with biases that are not zero."""
    config, model, options = MODELS[name]
    torch.manual_seed(0)
    made: PreTrainedModel = model(config(**{**SIZES, **options})).eval()
    for parameter_name, parameter in made.named_parameters():
        if parameter_name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    separate_experts(made)
    return made


def quantize(
    model: PreTrainedModel, commits: Path, reference: bool = True, spill: Path | None = None
) -> tuple[dict[str, torch.Tensor], Activations]:
    """Codes by layer, and what left the last block."""
    commits.mkdir()
    states = capture_first_inputs(model, SAMPLES, spill=spill)
    if reference:
        states.keep_reference(None if spill is None else spill.with_name("reference"))
    blocks = layerwise.quantize_blocks(model, states, SolverConfig(group_size=32), commits)
    return {name: weight.codes for block in blocks for name, weight in block.weights.items()}, states


def assert_same(
    one: tuple[dict[str, torch.Tensor], Activations], other: tuple[dict[str, torch.Tensor], Activations]
) -> None:
    """What left the last block of the reference; the codes, and what left the last block quantized, but for ties.

    A product of other rows at once may be rounded otherwise in its last bit, and so may a code that lies between two.
    """
    (codes, states), (others, other_states) = one, other
    assert codes.keys() == others.keys()
    if states.reference is not None and other_states.reference is not None:
        torch.testing.assert_close(states.reference.hidden, other_states.reference.hidden, rtol=1e-4, atol=1e-4)
    alike = torch.cat([(codes[name] == others[name]).flatten() for name in codes])
    assert alike.double().mean() > 0.99
    assert (states.hidden - other_states.hidden).norm() <= 0.02 * states.hidden.norm()


@pytest.mark.parametrize("reference", [True, False], ids=["with a reference", "alone"])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_codes_as_when_every_pass_runs_from_the_start(
    name: str, reference: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = make_model(name)
    kept = quantize(model, tmp_path / "kept", reference)
    monkeypatch.setattr(layerwise, "find_output_layers", lambda *_: {})
    assert_same(kept, quantize(model, tmp_path / "whole", reference))


@pytest.mark.parametrize("name", MODELS)
def test_where_modules_end(name: str) -> None:
    model = make_model(name)
    block = model.model.layers[1]
    states = capture_first_inputs(model, SAMPLES)
    with torch.inference_mode():
        trace = trace_block(block, states)
        found = find_output_layers(trace)
    assert found.keys() == (BOTH if name != "qwen3-moe" else {"self_attn.o_proj"})
    norm = "input_layernorm"
    assert found["self_attn.o_proj"] == OutputLayer("self_attn", "self_attn.o_proj", 2, (norm,))
    elsewhere = replace(trace, row=replace(trace.row, hidden=trace.row.hidden.to("meta")))
    assert find_output_layers(elsewhere) == {}, "only on the CPU"


class Parallel(nn.Module):
    """Attention's place and the MLP's read one norm; the second gives more than its layer, or calls it twice."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norm, self.kind = nn.LayerNorm(8), kind
        self.first = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.second = Second(kind)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self.norm(hidden)
        second = self.second(normed)
        parts = second if self.kind == "more" else second.split(8, dim=-1)
        return hidden + self.first(normed) + parts[0] + (parts[1] if self.kind in ("more", "wide") else 0)


class Second(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(8, 8), kind

    def forward(self, hidden: torch.Tensor) -> Any:
        if self.kind == "more":
            return self.layer(hidden), hidden
        if self.kind == "wide":
            return torch.cat([self.layer(hidden), hidden], dim=-1)
        return self.layer(self.layer(hidden)) if self.kind == "twice" else self.layer(hidden) * 2


@pytest.mark.parametrize("kind", ["more", "wide", "twice", "scaled"])
def test_modules_that_give_something_else_run_every_time(kind: str) -> None:
    """And a norm that two modules read is no feeder of one of them."""
    torch.manual_seed(0)
    block = Parallel(kind)
    states = Activations(torch.randn(2, 3, 8), {2: [{}], 1: [{}]}, torch.device("cpu"))
    with torch.inference_mode():
        trace = trace_block(block, states)
        found = find_output_layers(trace)
    assert found == {"first.1": OutputLayer("first", "first.1")}


def test_attention_runs_once_for_each_model_and_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows: list[int] = []
    forward = LlamaAttention.forward

    def counted(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(hidden_states))
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", counted)
    quantize(make_model("llama"), tmp_path / "commits")
    # Once for q, k and v, where the pass ends in front of the scores, and once to the end; the rest are trials.
    assert rows.count(2) == 2 * 2 * 2 * 3
    ended: list[int] = []
    monkeypatch.setattr(
        "transformers.models.llama.modeling_llama.apply_rotary_pos_emb",
        lambda q, k, *_: (ended.append(len(q)), (q, k))[1],
    )
    quantize(make_model("llama"), tmp_path / "again")
    assert ended.count(2) == 2 * 2 * 3, "two blocks, two models, three batches of two rows"


class Watched(ModuleCache):
    """Notes the most bytes that were held in its own rooms."""

    most: dict[int, int]

    def store(self, *args: Any) -> None:
        super().store(*args)
        self.most[id(self)] = max(
            self.most.get(id(self), 0), sum(room.untyped_storage().nbytes() for room in self._values.values())
        )


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, int]]:
    """Bytes that were held at the most, by where."""
    Watched.most = {}
    monkeypatch.setattr(activations, "ModuleCache", Watched)
    return Watched.most  # type: ignore[return-value]


@pytest.mark.parametrize("name", MODELS)
def test_the_plans_formula_counts_what_is_allocated(name: str, held: dict[int, int], tmp_path: Path) -> None:
    model = make_model(name)
    codes, states = quantize(model, tmp_path / "commits")
    assert len(held) == 2
    assert states.reference is not None
    config = QuantizeConfig(samples=7, seq_len=24, group_size=32)
    shape = Shape({key: model.get_submodule(key).weight.shape for key in codes}, 0, 0, 32, 97, 4, 4)
    everything = sum(held.values()) + states.hidden.nbytes + states.reference.hidden.nbytes
    assert activation_bytes(shape, config) == everything
    assert activation_bytes(shape, config, on_device=True) == 2 * states.hidden.nbytes


def test_the_last_layers_of_modules() -> None:
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj", "transformer.h.1.attn.dense"]
    beside = ["model.layers.0.mlp.experts.1.down_proj", "model.layers.2.up", "lm_head"]
    shape = Shape({name: (index, 0) for index, name in enumerate([*names, *beside])}, 0, 0, 1, 1)
    assert last_layers(shape) == {("model.layers.0", "self_attn"): (1, 0), ("transformer.h.1", "attn"): (2, 0)}


def test_the_same_codes_from_files_which_are_gone_afterwards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = make_model("qwen3")
    inside = quantize(model, tmp_path / "inside")
    files: set[str] = set()
    write_commit = layerwise.write_commit

    def look(*arguments: Any) -> None:
        files.update(file.name for file in (tmp_path / "files").iterdir())
        write_commit(*arguments)

    monkeypatch.setattr(layerwise, "write_commit", look)
    (tmp_path / "files").mkdir()
    outside = quantize(model, tmp_path / "outside", spill=tmp_path / "files" / "states")
    assert_same(inside, outside)
    modules = ("mlp", "self_attn")
    assert files == {"states", "reference", *(f"{text}-{m}" for text in ("states", "reference") for m in modules)}
    assert {file.name for file in (tmp_path / "files").iterdir()} == {"states", "reference"}


def test_rooms_that_the_next_block_does_not_use_are_freed(tmp_path: Path) -> None:
    kept = ModuleCache(2, 1, tmp_path / "text")
    layer, rows = nn.Linear(3, 4), torch.randn(2, 5, 3)
    for module in ("a", "b"):
        kept.store(OutputLayer(module, f"{module}.x"), slice(0, 2), rows, 4)
    with torch.inference_mode():
        kept.finish(OutputLayer("a", "a.x", 3, ("n",)), layer)
        outputs = kept.outputs(slice(1, 2), torch.device("cpu"))
    assert outputs.keys() == {"n", "a"}
    assert bool(outputs["n"].isnan().all())
    torch.testing.assert_close(outputs["a"][0], layer(rows[1:]))
    assert outputs["a"][1:] == (None, None)
    kept.begin_block()
    assert kept.outputs(slice(0, 2), torch.device("cpu")) == {}
    assert [file.name for file in tmp_path.iterdir()] == ["text-a"]
    kept.store(OutputLayer("a", "a.x"), slice(0, 2), rows.bfloat16(), 9)
    assert (tmp_path / "text-a").stat().st_size == 2 * 5 * 9 * 2
    kept.clear()
    assert not list(tmp_path.iterdir())


def test_a_shape_read_from_a_model_counts_the_same() -> None:
    """As `--dry-run` does it."""
    model = make_model("qwen3")
    config = QuantizeConfig(samples=7, seq_len=24, group_size=32)
    attention, mlp = (64 + 32), (64 + 32)  # the verifier's o_proj inputs are wider than its outputs; so are down_proj's
    assert activation_bytes(shape_of(model, config, 4, 4), config) == 7 * 24 * 4 * (2 * 32 + attention + mlp)
