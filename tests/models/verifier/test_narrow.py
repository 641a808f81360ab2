"""A verifier that sees less: what its masks hide, the C++ pass against PyTorch, and that no confirmed text changes."""

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_cases import CASES, CPU, random_tokens, save_model
from helpers.quantized_decoder import quantize_layers
from helpers.tiny_models import TableModel, make_pair
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_core.config import GenerationConfig, SamplingConfig
from quasar_core.decode.costs.cost_records import CostRecord
from quasar_core.decode.costs.pass_costs import CONTEXT, PassCost
from quasar_core.decode.generator import Generator
from quasar_core.decode.policy import verifier_attention
from quasar_core.decode.policy.verifier_attention import SHORTEST, VerifierAttention, saved_share
from quasar_core.errors import UsageError
from quasar_core.models import loading
from quasar_core.models.base import depths_of
from quasar_core.models.decoder.attention import make_mask, make_tree_mask
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.verifier.narrow import narrowed, why_not_narrow
from quasar_core.models.weights.lean_weights import attach_verifier, load_target

KINDS = ("qwen3", "qwen3, listed windows, biases")


@given(
    start=st.integers(0, 12),
    count=st.integers(1, 6),
    window=st.one_of(st.none(), st.integers(1, 9)),
    sinks=st.integers(0, 4),
    dice=st.randoms(use_true_random=False),
)
@settings(deadline=None, derandomize=True, max_examples=150)
def test_masks_show_the_last_and_the_first_positions(
    start: int, count: int, window: int | None, sinks: int, dice: random.Random
) -> None:
    """Against the definition, position by position; in a tree along each node's own path."""
    parents = [-1, *(dice.randrange(node) for node in range(1, count))]
    chain = list(range(-1, count - 1))
    for tree in (chain, parents):
        mask = (
            make_mask(start, count, window, 1, CPU, torch.float32, sinks)
            if tree is chain
            else make_tree_mask(start, tree, window, 1, CPU, torch.float32, sinks)
        )
        for node, depth in enumerate(depths_of(tree)):
            path, own = [node], start + depth
            while tree[path[-1]] >= 0:
                path.append(tree[path[-1]])
            positions = {
                **{place: place for place in range(start)},
                **{start + i: start + depths_of(tree)[i] for i in path},
            }
            wanted = {
                place
                for place, position in positions.items()
                if window is None or position > own - window or position < sinks
            }
            if mask.causal or mask.added is None:
                seen = set(range(mask.first, own + 1))
            else:
                seen = {mask.first + i for i, value in enumerate(mask.added[node].tolist()) if value == 0}
            assert seen == wanted


def load(folder: Path, kind: str, dtype: torch.dtype) -> tuple[LeanDecoder, LeanDecoder]:
    save_model(folder, *CASES[kind])
    target = load_target(folder, CPU, dtype)
    verifier = attach_verifier(target, quantize_layers(folder, folder / "verifier", lambda name: 4), "vnni")
    loading.attach(target), loading.attach(verifier)
    return target, verifier


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("cpp_pass")
def test_the_cpp_pass_sees_what_pytorch_sees(tmp_path: Path, kind: str) -> None:
    """However it is cut, to the last bit; and what it does not see makes a difference."""
    decoder, _ = load(tmp_path, kind, torch.float32)
    text = random_tokens(150)
    for sinks, seen in ((3, 20), (1, 40), (16, 17), (0, 20)):
        narrow = narrowed(decoder, sinks, seen)
        assert narrow.fast is not None
        cache, parts = narrow.new_cache(160), []
        for begin, end in ((0, 33), (33, 34), (34, 50), (50, 70), (70, 131), (131, 150)):
            parts.append(narrow.forward(text[begin:end], cache))
        whole = narrow.forward(text, narrow.new_cache(160))
        assert torch.equal(torch.cat(parts), whole)
        torch.testing.assert_close(whole, narrow.plain_logits(text, narrow.new_cache(160)), atol=1e-3, rtol=1e-3)
        full = decoder.forward(text, decoder.new_cache(160))
        assert torch.equal(full[:seen], whole[:seen])
        assert not torch.allclose(full[-1], whole[-1], atol=1e-2)


@pytest.mark.usefixtures("cpp_pass")
def test_a_node_of_a_tree_sees_what_its_path_would(tmp_path: Path) -> None:
    _, verifier = load(tmp_path, "qwen3", torch.bfloat16)
    narrow, text, parents = narrowed(verifier, 2, 18), random_tokens(45), [-1, 0, 1, 0, 3, 1]
    nodes = random_tokens(51)[45:]
    cache = narrow.new_cache(64)
    narrow.forward(text, cache)
    tree = narrow.forward_tree(nodes, parents, cache)
    for node in range(len(nodes)):
        path = [node]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        other = narrow.new_cache(64)
        narrow.forward(text, other)
        assert torch.equal(narrow.forward([nodes[i] for i in path], other)[-1], tree[node])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("cpp_pass")
def test_confirmed_text_is_that_of_plain_decoding(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the verifier sees; what it writes by itself is another text."""
    target, verifier = load(tmp_path, "qwen3", dtype)
    pair, dice, differ = make_pair(target, verifier, dtype=dtype, max_context=256), random.Random(5), 0
    for number in range(6):
        text = random_tokens(dice.randint(4, 60))
        plain = Generator(pair, GenerationConfig(40, "full", "none")).generate(text).token_ids
        monkeypatch.setattr(
            verifier_attention, "narrowed", partial(narrowed, sinks=dice.randint(0, 4), seen=dice.randint(1, 24))
        )
        window = dice.choice(["auto", 3, 9])
        config = GenerationConfig(40, "exact", window=window, verifier_attention="sinks+window")  # type: ignore[arg-type]
        assert Generator(pair, config).generate(text).token_ids == plain, number
        alone, less = (
            Generator(pair, GenerationConfig(40, "quantized", verifier_attention=seen)).generate(text).token_ids  # type: ignore[arg-type]
            for seen in ("full", "sinks+window")
        )
        differ += alone != less
    assert differ > 2
    assert any("writes another text" in note for note in pair.notes)


def test_it_is_chosen_where_the_context_is_dear(tmp_path: Path) -> None:
    save_model(tmp_path, *CASES["qwen3"])
    target = load_target(tmp_path, CPU, torch.float32)
    pair, notes = make_pair(target, target), list[str]()

    def narrow(slope: float, prompt: int, **options: Any) -> bool:
        cost = PassCost((1,), (1.0 + CONTEXT * slope,), PassCost((1,), (slope,)))
        pair.measured["verifier"] = CostRecord(cost, {"role": "verifier"}, 0.0)
        config = GenerationConfig(9, **{"verify": "exact", **options})
        return VerifierAttention(pair, config, notes.append).pair_for(prompt) is not pair

    dear = 2e-3  # two passes for 1000 positions
    assert saved_share(1.0, dear, 2516) == pytest.approx(4 / (1 + 5.032))
    assert saved_share(1.0, dear, 300) == 0
    assert narrow(dear, 2000)
    assert not narrow(1e-4, 2000)
    assert not narrow(1.0, SHORTEST - 1)
    assert not narrow(dear, 2000, verifier_attention="full")
    assert not narrow(dear, 2000, verify="quantized")
    assert narrow(dear, 2000, sampling=SamplingConfig(1.0))
    assert narrow(0.0, 5, verifier_attention="sinks+window")
    assert any("ms more for each 1000 positions" in note for note in notes)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, *CASES["qwen3"])
    decoder = load_target(tmp_path, CPU, torch.float32)
    assert why_not_narrow(decoder) is None
    assert "no layer of it sees more" in str(why_not_narrow(narrowed(decoder)))
    table = make_pair(TableModel(8, 0), TableModel(8, 0))
    with pytest.raises(UsageError, match="--verifier-attention sinks\\+window: its verifier runs on transformers"):
        Generator(table, GenerationConfig(5, verifier_attention="sinks+window"))
    with pytest.raises(UsageError, match="--verify full has none"):
        GenerationConfig(5, "full", verifier_attention="sinks+window")
    with pytest.raises(UsageError, match="--verifier-attention must be one of auto, full"):
        GenerationConfig(5, verifier_attention="sinks")  # type: ignore[arg-type]
