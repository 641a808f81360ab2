"""A tree's nodes get what their paths get alone: to the last bit in C++, to rounding in PyTorch's operations."""

import random
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_cases import CASES, CPU, DYNAMIC, assert_close, random_tokens, save_model
from helpers.interpret import triton_steps
from helpers.quantized_decoder import mixed_bits, quantize_layers

from quasar_core.models import loading
from quasar_core.models.base import choose_best, depths_of
from quasar_core.models.cuda.graph_pass import CudaPass
from quasar_core.models.cuda.torch_steps import TorchSteps
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.weights.lean_weights import attach_verifier, load_target

FLOAT, BF16 = torch.float32, torch.bfloat16
VOCABULARY, ROOM = 96, 160


def random_tree(dice: random.Random, count: int) -> tuple[list[int], list[int]]:
    """Tokens and parents; some are chains, some fans, most are neither, and a node may lie far behind its parent."""
    kind = dice.choice(["chain", "fan", "any", "any"])
    parents = {"chain": range(-1, count - 1), "fan": [-1] + [0] * (count - 1)}.get(kind) or [
        -1 if node == 0 else dice.randrange(node) for node in range(count)
    ]
    return [dice.randrange(VOCABULARY) for _ in range(count)], list(parents)


def path_to(node: int, parents: Sequence[int]) -> list[int]:
    """The nodes from the first to this one."""
    path = [node]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


class OneByOne:
    """A text's logits, its tokens passed one by one; the prompt once."""

    def __init__(self, decoder: LeanDecoder, prompt: Sequence[int]) -> None:
        self.decoder, self.cache, self.start = decoder, decoder.new_cache(ROOM), len(prompt)
        self.pass_tokens(prompt)

    def pass_tokens(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits behind the last of them."""
        for token in tokens:
            logits = self.decoder.forward([token], self.cache)
        return logits[-1]

    def behind(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits behind the prompt and these."""
        self.cache.rollback(self.start)
        return self.pass_tokens(tokens)


def decoder_of(folder: Path, case: str, dtype: torch.dtype, kind: str) -> LeanDecoder:
    save_model(folder, *CASES[case])
    target = load_target(folder, CPU, dtype)
    if kind == "target":
        return target
    return attach_verifier(target, quantize_layers(folder, folder / "verifier", mixed_bits), "vnni")


def check_trees(decoder: LeanDecoder, compare: Any, seed: int, runs: int, threads: int = 1) -> None:
    """Every node of random trees behind prompts of several lengths; then a path is kept, and the text goes on.

    Trees are passed by so many threads, paths by one.
    """
    dice = random.Random(seed)
    for _ in range(runs):
        prompt = random_tokens(dice.choice([1, 3, 15, 16, 17, 30, 47, 62, 64]))
        tokens, parents = random_tree(dice, min(dice.choice([1, 2, 5, 9, 20, 31]), decoder.longest_tree))
        cache, one_by_one = decoder.new_cache(ROOM), OneByOne(decoder, prompt)
        for token in prompt:
            decoder.forward([token], cache)
        torch.set_num_threads(threads)
        logits = decoder.forward_tree(tokens, parents, cache)
        torch.set_num_threads(1)
        assert cache.length == len(prompt) + len(tokens)
        for node in range(len(tokens)):
            path = [tokens[i] for i in path_to(node, parents)]
            compare(logits[node], one_by_one.behind(path))
        cache.rollback(len(prompt))
        torch.set_num_threads(threads)
        found = decoder.choose_tree(tokens, parents, cache, 3)
        torch.set_num_threads(1)
        expected = choose_best(logits, 3)
        assert (found.tokens, found.likeliest, found.accepted) == (expected.tokens, expected.likeliest, None)
        assert found.margins == pytest.approx(expected.margins, abs=1e-6)
        kept = path_to(dice.randrange(len(tokens)), parents)
        cache.keep(len(prompt), kept)
        assert cache.length == len(prompt) + len(kept)
        after = random_tokens(4)
        text = [*[tokens[i] for i in kept], *after]
        compare(decoder.forward(after, cache)[-1], one_by_one.behind(text))


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("cpp_pass")
@pytest.mark.parametrize("kind", ["target", "verifier"])
@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
@pytest.mark.parametrize("case", ["llama", "qwen3, listed windows, biases"])
def test_in_cpp_a_node_has_the_bits_of_its_path(tmp_path: Path, case: str, dtype: torch.dtype, kind: str) -> None:
    decoder = decoder_of(tmp_path, case, dtype, kind)
    loading.attach(decoder)
    assert decoder.longest_tree == 64
    for threads, runs in ((1, 4), (3, 2)):
        check_trees(decoder, assert_same_bits, seed=threads, runs=runs, threads=threads)


@pytest.mark.usefixtures("cpp_pass")
@pytest.mark.parametrize(
    "case", ["gemma 2", "gemma 3, two ropes", "ministral 3", "phi 3, a part rotates, window", "muse glimmer"]
)
def test_so_it_is_in_models_with_caps_two_rotations_and_growing_queries(tmp_path: Path, case: str) -> None:
    decoder = decoder_of(tmp_path, case, BF16, "target")
    loading.attach(decoder)
    check_trees(decoder, assert_same_bits, seed=4, runs=3)


@pytest.mark.parametrize("case", ["llama", "mistral, window", "ministral 3", "gemma 2", "muse glimmer"])
def test_in_pytorchs_operations_a_node_has_the_logits_of_its_path(tmp_path: Path, case: str) -> None:
    decoder = decoder_of(tmp_path, case, FLOAT, "target")
    check_trees(decoder, assert_close, seed=5, runs=4)


@pytest.mark.parametrize("case", ["qwen3", "mistral, window", "ministral 3", "muse glimmer"])
def test_in_the_steps_of_cuda_a_node_has_the_logits_of_its_path(tmp_path: Path, case: str) -> None:
    """Trees of up to 16 nodes; a pass is filled up to a recorded size."""
    decoder = decoder_of(tmp_path, case, FLOAT, "target")
    decoder.fast = CudaPass(decoder, TorchSteps())
    check_trees(decoder, assert_close, seed=6, runs=4)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("name", "options"), [("Qwen3", {"num_attention_heads": 6, "head_dim": 32}), ("Mistral", {"sliding_window": 7})]
)
def test_tritons_kernels_are_as_near_to_float32_as_those_of_pytorch(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    """In float16, as the interpreter rounds; a node that saw another's would be far off."""
    steps = triton_steps()
    save_model(tmp_path, name, {**options, "num_hidden_layers": 2})
    prompt, tokens, parents = random_tokens(11), [5, 9, 5, 70, 31], [-1, 0, 0, 2, 1]
    logits = {}
    for way, dtype in (("exact", FLOAT), ("triton", torch.float16)):
        decoder = load_target(tmp_path, CPU, dtype)
        cache = decoder.new_cache(40)
        decoder.forward(prompt, cache, last_only=True)
        if way == "triton":
            decoder.fast = CudaPass(decoder, steps, fast=True)
        logits[way] = decoder.forward_tree(tokens, parents, cache)
        cache.keep(11, [0, 2, 3])
        logits[way] = torch.cat((logits[way], decoder.forward([8, 3], cache)))
    assert (logits["triton"] - logits["exact"]).norm() / logits["exact"].norm() <= 8 * 2**-11


@pytest.mark.usefixtures("cpp_pass")
def test_rotations_that_follow_the_texts_length(tmp_path: Path) -> None:
    save_model(tmp_path, "Llama", {"max_position_embeddings": 32, "rope_parameters": DYNAMIC})
    decoder = load_target(tmp_path, CPU, FLOAT)
    loading.attach(decoder)
    check_trees(decoder, assert_same_bits, seed=9, runs=4)


def test_another_order_of_a_path_would_show(tmp_path: Path) -> None:
    """The comparison can fail: a node that saw its sibling too would have other logits."""
    decoder = decoder_of(tmp_path, "llama", FLOAT, "target")
    prompt = random_tokens(5)
    cache = decoder.new_cache(ROOM)
    decoder.forward(prompt, cache)
    apart = decoder.forward_tree([1, 2, 3], [-1, 0, 0], cache)
    cache.rollback(5)
    behind = decoder.forward_tree([1, 2, 3], [-1, 0, 1], cache)
    assert_close(apart[1], behind[1])
    assert (apart[2] - behind[2]).abs().max() > 1e-3


@pytest.mark.parametrize("parents", [[0], [-1, -1], [-1, 1], [-1, 0, 3], [-1, 0, -2]])
def test_what_is_no_tree_is_refused(parents: list[int]) -> None:
    with pytest.raises(ValueError, match="of a tree cannot stand behind"):
        depths_of(parents)
