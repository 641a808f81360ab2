"""Text that the verifier reads beside the target: against attention query by query, and against decoding as `exact`."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.decoder_cases import CASES, save_model
from helpers.tiny_models import random_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

from quasar_core.models.hf.experts import separate_experts
from quasar_core.quantize.blocks import activations as activations_of_text
from quasar_core.quantize.blocks import layerwise
from quasar_core.quantize.blocks.activations import CONTEXT_EVERY, Activations, capture_first_inputs, run_block
from quasar_core.quantize.blocks.collect import attends_uncached, find_output_layers, reach, trace_block
from quasar_core.quantize.blocks.layerwise import BlocksInMemory, quantize_blocks
from quasar_core.quantize.blocks.streaming import find_blocks
from quasar_core.quantize.blocks.target_context import WINDOW, TargetContext
from quasar_core.quantize.measure_fidelity import RowsRead, read_beside
from quasar_core.quantize.solve.gptq import SolverConfig

LENGTH = 2 * WINDOW + 5
SAMPLES = torch.randint(97, (5, LENGTH), generator=torch.Generator().manual_seed(3))
CPU = torch.device("cpu")


def random_heads(seed: int, heads: int, rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, heads, LENGTH, 8, generator=torch.Generator().manual_seed(seed))


def sliding(length: int) -> torch.Tensor:
    """Each position sees itself and the ten before it."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return (distance >= 0) & (distance < 11)


MASKS = {
    "causal": None,
    "sliding": sliding(LENGTH),
    "added to scores": torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(~sliding(LENGTH), -torch.inf),
    "of each row": sliding(LENGTH).expand(3, 1, LENGTH, LENGTH).clone(),
}


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("shared", [False, True], ids=["a key for each head", "keys that heads share"])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_in_windows_query_by_query(mask: str, shared: bool, scale: float | None) -> None:
    """Each query over the target's keys and values before its window, and the verifier's own in it."""
    queries, heads = random_heads(0, 4), 2 if shared else 4
    own, known = [random_heads(seed, heads) for seed in (1, 2)], [random_heads(seed, heads) for seed in (3, 4)]
    options = {"attn_mask": MASKS[mask], "is_causal": mask == "causal", "enable_gqa": shared, "scale": scale}
    context = TargetContext()
    with context.note():
        scaled_dot_product_attention(random_heads(5, 4), *known, **options)
    with context.read_in_windows():
        found = scaled_dot_product_attention(queries, *own, **options)
    assert not torch.allclose(found, scaled_dot_product_attention(queries, *own, **options))
    seen = sliding(LENGTH) if mask != "causal" else torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    for place in range(LENGTH):
        begin, query = place - place % WINDOW, queries[:, :, place : place + 1]
        keys, values = (
            torch.cat([theirs[:, :, :begin], mine[:, :, begin:]], dim=2)
            for theirs, mine in zip(known, own, strict=True)
        )
        expected = scaled_dot_product_attention(
            query, keys, values, attn_mask=seen[place : place + 1], enable_gqa=shared, scale=scale
        )
        torch.testing.assert_close(found[:, :, place : place + 1], expected)


@pytest.mark.parametrize("mask", MASKS)
def test_some_rows_read_all_keys_and_values_of_the_target(mask: str) -> None:
    queries, own, known = random_heads(0, 4), [random_heads(1, 4)] * 2, [random_heads(2, 4)] * 2
    options = {"attn_mask": MASKS[mask], "is_causal": mask == "causal"}
    context = TargetContext()
    with context.note():
        theirs = scaled_dot_product_attention(queries, *known, **options)
    with context.read(first=1, step=2):
        found = scaled_dot_product_attention(queries, *own, **options)
    alone = scaled_dot_product_attention(queries, *own, **options)
    torch.testing.assert_close(found, torch.stack([alone[0], theirs[1], alone[2]]))


def test_a_pass_without_attention_leaves_what_was_read_as_it_is() -> None:
    queries, keys, values = (random_heads(seed, 2) for seed in (0, 1, 2))
    context = TargetContext()
    with context.note():
        torch.nn.functional.linear(queries, torch.eye(8))
    assert not context.noted
    with context.read(0, 1):
        found = scaled_dot_product_attention(queries, keys, values, is_causal=True)
    assert torch.equal(found, scaled_dot_product_attention(queries, keys, values, is_causal=True))


@pytest.mark.parametrize("keys", [LENGTH, LENGTH + 3])
def test_attention_to_other_tokens_is_left_as_it_is(keys: int) -> None:
    """Or attention whose mask is given by place."""
    others = torch.randn(3, 2, keys, 8, generator=torch.Generator().manual_seed(4))
    masks = [sliding(LENGTH)] if keys == LENGTH else []
    context = TargetContext()
    with context.note():
        scaled_dot_product_attention(random_heads(0, 2), others, others, *masks)
        scaled_dot_product_attention(random_heads(0, 2), random_heads(1, 2), random_heads(2, 2), is_causal=True)
    assert len(context.noted) == 1
    for reading in (context.read(0, 1), context.read_in_windows()):
        with reading:
            found = scaled_dot_product_attention(random_heads(5, 2), others, others, *masks)
            last = scaled_dot_product_attention(*[random_heads(6, 2)] * 3, is_causal=True)
        assert torch.equal(found, scaled_dot_product_attention(random_heads(5, 2), others, others, *masks))
        assert not torch.allclose(last, scaled_dot_product_attention(*[random_heads(6, 2)] * 3, is_causal=True))


def test_only_the_last_pass_is_noted() -> None:
    context, heads = TargetContext(), [random_heads(seed, 2) for seed in range(4)]
    for keys, values in (heads[:2], heads[2:]):
        with context.note():
            scaled_dot_product_attention(keys, keys, values, is_causal=True)
    assert [one is other for one, other in zip(context.noted[0], heads[2:], strict=True)] == [True, True]
    assert len(context.noted) == 1


def mixed_model() -> PreTrainedModel:
    """With a sliding block behind a full one."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        layer_types=["full_attention", "sliding_attention"],
        sliding_window=11,
        initializer_range=0.3,
    )
    return Gemma3ForCausalLM(config).eval()


MODELS = {"llama": lambda: random_model("llama").model, "sliding": mixed_model}


def disturbed(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose layers in the blocks have weights of their own, as a verifier's; the rest is shared."""
    copied, generator = copy.deepcopy(model), torch.Generator().manual_seed(7)
    for layer in find_blocks(copied)[1].modules():
        if isinstance(layer, torch.nn.Linear):
            noise = torch.randn(layer.weight.shape, generator=generator) * layer.weight.std()
            layer.weight = torch.nn.Parameter(layer.weight + 0.3 * noise, requires_grad=False)
    return copied


class Parts(BlocksInMemory):
    """A model as fidelity reads it."""

    device = CPU

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._model = model

    def ends(self, device: torch.device | None = None) -> PreTrainedModel:
        return self._model


@torch.inference_mode()
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_decoding_in_windows_over_the_targets_cache(name: str) -> None:
    """The target fills the cache up to a window, as a confirm leaves it; then the verifier reads the window."""
    target = MODELS[name]()
    verifier = disturbed(target)
    theirs, states, found = read_beside(Parts(target), Parts(verifier), SAMPLES, "reading")
    assert found
    read = RowsRead(verifier, [(SAMPLES, states)])
    for row in SAMPLES:
        expected = []
        for begin in range(0, LENGTH, WINDOW):
            cache = DynamicCache(config=target.config)
            if begin:
                target(row[None, :begin], past_key_values=cache)
            window = row[None, begin : begin + WINDOW]
            expected.append(verifier(window, past_key_values=cache, use_cache=True).logits[0])
        found = read.forward(row.tolist(), read.new_cache(LENGTH))
        torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-4)
        alone = verifier(row[None]).logits[0]
        torch.testing.assert_close(found[:WINDOW], alone[:WINDOW], rtol=1e-4, atol=1e-4)
        assert (found[WINDOW:] - alone[WINDOW:]).abs().amax() > 0.01
    own = RowsRead(target, [(SAMPLES, theirs)]).forward(SAMPLES[0].tolist(), read.new_cache(LENGTH))
    torch.testing.assert_close(own, target(SAMPLES[:1]).logits[0], rtol=1e-4, atol=1e-4)


def activations_beside(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, context_every: int = CONTEXT_EVERY
) -> Activations:
    """Five rows in batches of two, with a reference."""
    monkeypatch.setattr(activations_of_text, "BATCH_TOKENS", 2 * LENGTH)
    activations = capture_first_inputs(model, SAMPLES)
    activations.keep_reference(context_every=context_every)
    return activations


@torch.inference_mode()
@pytest.mark.parametrize(
    ("reading", "expected"),
    [
        (0, [True, True, True, True, True]),
        (1, [False, False, False, False, False]),
        (2, [True, False, True, False, True]),
        (3, [True, True, False, True, True]),
    ],
)
def test_one_of_so_many_rows_of_the_calibration_text_is_read_so(
    reading: int, expected: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = random_model("llama").model
    verifier, name = disturbed(target), "self_attn.o_proj"
    activations = activations_beside(target, monkeypatch, reading)
    block, original = (find_blocks(model)[1][0] for model in (verifier, target))
    context, found = TargetContext(), []
    for batch, reference in activations.pairs(context):
        reach(original, name, None, reference)
        found.append(reach(block, name, None, batch)[0])
    alone = torch.cat([reach(block, name, None, batch)[0] for batch in activations.batches()])
    same = [torch.equal(one, other) for one, other in zip(torch.cat(found), alone, strict=True)]
    assert same == expected


@torch.inference_mode()
def test_both_models_leave_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference as though alone; the verifier as it was collected, to the last bit."""
    target = random_model("llama").model
    verifier = disturbed(target)
    activations, alone = activations_beside(target, monkeypatch), activations_beside(target, monkeypatch)
    blocks, originals = find_blocks(verifier)[1], find_blocks(target)[1]
    for block, original in zip(blocks, originals, strict=True):
        expected = []
        for batch, reference in activations.pairs(TargetContext()):
            run_block(original, reference)
            expected.append(run_block(block, batch))
        activations.advance_both(block, original)
        alone.advance(original)
        assert torch.equal(activations.hidden, torch.cat(expected))
    assert activations.reference is not None
    assert torch.equal(activations.reference.hidden, alone.hidden)
    assert activations.block == activations.reference.block == len(blocks)


@torch.inference_mode()
def test_attention_is_cached_with_its_output_layer() -> None:
    model = random_model("llama").model
    activations = capture_first_inputs(model, SAMPLES)
    trace = trace_block(find_blocks(model)[1][0], activations)
    layers = find_output_layers(trace)
    assert not attends_uncached(trace, layers)
    assert attends_uncached(trace, {})
    assert attends_uncached(trace, {"mlp.down_proj": layers["mlp.down_proj"]})


@pytest.mark.parametrize("reading", [1, 2])
def test_a_verifier_that_is_fitted_so_agrees_more_beside_its_target(reading: int, tmp_path: Path) -> None:
    """Its hidden states on the calibration text are closer to the target's there than a verifier's that read alone."""
    target = random_model("llama").model
    distances = SimpleNamespace()
    for name, step in (("alone", 0), ("beside", reading)):
        folder = tmp_path / name
        folder.mkdir()
        activations = capture_first_inputs(target, SAMPLES)
        activations.keep_reference(context_every=step)
        verifier = copy.deepcopy(target)
        for done in quantize_blocks(target, activations, SolverConfig(bits=2, group_size=32), folder):
            for layer, weight in done.weights.items():
                verifier.get_submodule(layer).weight.data = weight.dequantize()
        theirs, states, _ = read_beside(Parts(target), Parts(verifier), SAMPLES, "reading")
        setattr(distances, name, (theirs - states).norm().item())
    assert distances.beside < distances.alone


def test_where_attention_is_computed_otherwise_nothing_is_read_beside_the_target() -> None:
    target = mixed_model()
    target.set_attn_implementation("eager")
    verifier = disturbed(target)
    theirs, states, found = read_beside(Parts(target), Parts(verifier), SAMPLES, "reading")
    assert not found
    alone = capture_first_inputs(verifier, SAMPLES)
    with torch.inference_mode():
        for block in find_blocks(verifier)[1]:
            alone.advance(block)
    torch.testing.assert_close(states, alone.hidden)
    assert not torch.allclose(states, theirs)


@pytest.mark.parametrize("cached", [set(), {"mlp.down_proj"}], ids=["nothing cached", "an MLP"])
def test_experts_behind_attention_that_is_not_cached(
    cached: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Their inputs are those of rows that read as all others of the block do, whatever of it is cached."""
    model = save_model(tmp_path, *CASES["gemma 4, experts"])  # whose experts stand beside an MLP
    separate_experts(model)
    codes = []
    for number, layers in enumerate((cached, {"self_attn.o_proj", *cached})):
        monkeypatch.setattr(
            layerwise,
            "find_output_layers",
            lambda trace, layers=layers: {n: one for n, one in find_output_layers(trace).items() if n in layers},
        )
        (tmp_path / str(number)).mkdir()
        activations = capture_first_inputs(model, SAMPLES % model.config.vocab_size)
        activations.keep_reference()
        blocks = quantize_blocks(model, activations, SolverConfig(group_size=32), tmp_path / str(number))
        codes.append({name: weight.codes for done in blocks for name, weight in done.weights.items()})
    alike = torch.cat([(codes[0][name] == codes[1][name]).flatten() for name in codes[0]])
    assert alike.double().mean() > 0.99  # a product of other rows at once may be rounded otherwise
