"""The C++ pass computes what the plain pass computes, and a token's logits whatever passes beside it."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.decoder_cases import (
    CASES,
    CPU,
    DELTA,
    DYNAMIC,
    FLOAT,
    LENGTH,
    assert_close,
    assert_close_but_for_steps,
    exact_logits,
    fresh_logits,
    in_passes,
    random_tokens,
    relative_error,
    save_model,
)
from helpers.fast_pass import fast
from helpers.quantized_decoder import mixed_bits, quantize_layers
from helpers.tiny_models import make_pair

from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.config import GenerationConfig, VerifyMode
from quasar_core.decode.generator import Generator
from quasar_core.errors import QuasarError
from quasar_core.kernels.threads import use_threads
from quasar_core.models import loading
from quasar_core.models.architectures import ARCHITECTURES
from quasar_core.models.base import NO_TOKEN, choose_best
from quasar_core.models.cpu import cpu_pass
from quasar_core.models.decoder.layer import DenseLinear
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.weights.lean_weights import attach_verifier, load_target

BF16 = torch.bfloat16
Made = Callable[..., Path]
HYBRIDS = [
    *("qwen3.5, one head of keys, biases", "lfm2, biases, plain MLP", "granite 4, groups, biases, rotates"),
    *("lfm2 moe", "granite 4, experts, groups, biases, rotates"),
]
SPLITS = ([1], [2, 12, 1, 4, 8], [33, 12])

pytestmark = pytest.mark.usefixtures("cpp_pass")
each_form = pytest.mark.usefixtures("form")


def tiny_target(folder: Path, case: str, dtype: torch.dtype = FLOAT) -> LeanDecoder:
    save_model(folder, *CASES[case])
    return load_target(folder, CPU, dtype)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The folder of a case's tiny model, and in it `verifier`, of mixed bits where none are given; made once."""

    @functools.cache
    def make(case: str, bits: int | None = None) -> Path:
        folder = tmp_path_factory.mktemp("made")
        save_model(folder, *CASES[case])
        quantize_layers(folder, folder / "verifier", mixed_bits if bits is None else lambda name: bits)
        return folder

    return make


def verifier_in(folder: Path, target: LeanDecoder, kernel: str = "vnni") -> LeanDecoder:
    return attach_verifier(target, VerifierCheckpoint(folder / "verifier"), kernel)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(tmp_path: Path, case: str) -> None:
    expected = fresh_logits(save_model(tmp_path, *CASES[case]), random_tokens())
    decoder = fast(load_target(tmp_path, CPU, FLOAT))
    for sizes in SPLITS:
        assert_close(in_passes(decoder, random_tokens(), sizes), expected, case)


@each_form
@pytest.mark.parametrize(
    "case",
    ["gemma 2", "apertus", "gemma 4, shared states and own inputs", "muse glimmer", "qwen 2 moe", *HYBRIDS],
)
def test_every_form_gives_the_logits_of_transformers(tmp_path: Path, case: str) -> None:
    """Caps, tanh, xIELU, norms and rotations of each kind, in each instruction set."""
    expected = fresh_logits(save_model(tmp_path, *CASES[case]), random_tokens())
    decoder = fast(load_target(tmp_path, CPU, FLOAT))
    for sizes in SPLITS:
        assert_close(in_passes(decoder, random_tokens(), sizes), expected, case)


@pytest.mark.parametrize("case", ["lfm2 moe", "glm 4 moe"])
def test_what_comes_to_the_sum_of_shares_is_added(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is too little to be seen in any model."""
    row = ARCHITECTURES[f"{CASES[case][0]}ForCausalLM"]
    assert row.mixture is not None
    own = in_passes(tiny_target(tmp_path, case), random_tokens(), [LENGTH])
    changed = replace(row, mixture=replace(row.mixture, added=0.5))
    monkeypatch.setitem(ARCHITECTURES, f"{CASES[case][0]}ForCausalLM", changed)
    decoder = load_target(tmp_path, CPU, FLOAT)
    expected = in_passes(decoder, random_tokens(), [LENGTH])
    assert_close(in_passes(fast(decoder), random_tokens(), [12, 1, 4]), expected, case)
    assert relative_error(own, expected) > 1e-2


@each_form
@pytest.mark.parametrize(
    "case", ["llama, all biases", "qwen3, listed windows, biases", "smollm3, windows", "muse glimmer"]
)
def test_bf16_costs_a_few_roundings_of_cache_and_embedding(tmp_path: Path, case: str) -> None:
    """Between products all is float32, so that four blocks of two roundings each stay within six of bfloat16's."""
    expected = exact_logits(save_model(tmp_path, *CASES[case]), random_tokens(), BF16)
    logits = in_passes(fast(load_target(tmp_path, CPU, BF16)), random_tokens(), [12, 4])
    assert relative_error(logits, expected) <= 6 * 2**-8


@each_form
@pytest.mark.parametrize(
    ("case", "bits"),  # mixed bits are 4 and 8: in experts 3 are the others that lie as they do nowhere else
    [
        *(("qwen3, listed windows, biases", bits) for bits in (2, 3, 4, 8, None)),
        ("qwen 3 moe", 3),
        ("qwen 3 moe", None),
        *(pytest.param("qwen 3 moe", bits, marks=pytest.mark.slow) for bits in (2, 4, 8)),
    ],
)
def test_a_verifier_equals_its_plain_pass(made: Made, case: str, bits: int | None) -> None:
    folder = made(case, bits)
    verifier = verifier_in(folder, load_target(folder, CPU, FLOAT))
    expected = in_passes(verifier, random_tokens(), [12, 4])
    assert_close_but_for_steps(in_passes(fast(verifier), random_tokens(), [12, 4]), expected)


@pytest.mark.parametrize(
    "case", ["qwen3, listed windows, biases", "glm 4 moe, no norms", "mixtral", "muse glimmer", *HYBRIDS]
)
def test_a_verifier_that_was_unpacked_equals_its_plain_pass(made: Made, case: str) -> None:
    verifier = verifier_in(made(case), load_target(made(case), CPU, FLOAT), kernel="dense")
    expected = in_passes(verifier, random_tokens(), [12, 4])
    assert_close(in_passes(fast(verifier), random_tokens(), [12, 4]), expected, family=CASES[case][0])


@each_form
@pytest.mark.parametrize(
    ("case", "kind", "dtype"),  # every two of them meet
    [
        *itertools.product(["qwen3, listed windows, biases"], ["target", "verifier"], [FLOAT, BF16]),
        *(("qwen 3 moe", "target", FLOAT), ("qwen 3 moe", "verifier", BF16)),
        *(("qwen 2 moe, some blocks", "target", BF16), ("qwen 2 moe, some blocks", "verifier", FLOAT)),
    ],
    ids=str,
)
def test_logits_do_not_depend_on_the_pass_or_on_the_threads(
    made: Made, case: str, kind: str, dtype: torch.dtype
) -> None:
    decoder = load_target(made(case), CPU, dtype)
    if kind == "verifier":
        decoder = verifier_in(made(case), decoder)
    tokens = random_tokens(70)
    torch.set_num_threads(1)
    expected = in_passes(fast(decoder), tokens, [1])
    for threads, sizes, count in ((2, [2], 6), (3, [3, 17], 37), (2, [8], 16), (2, [13, 5, 31], 49), (2, [64, 6], 70)):
        torch.set_num_threads(threads)
        assert torch.equal(in_passes(decoder, tokens[:count], sizes), expected[:count])


@pytest.mark.parametrize(("kind", "dtype"), [("target", BF16), ("verifier", FLOAT)], ids=str)
@pytest.mark.parametrize("case", HYBRIDS)
def test_nor_do_those_of_layers_with_a_state(made: Made, case: str, kind: str, dtype: torch.dtype) -> None:
    """Neither on where a pass went back to."""
    target = load_target(made(case), CPU, dtype)
    decoder = fast(verifier_in(made(case), target) if kind == "verifier" else target)
    tokens = random_tokens(40)
    torch.set_num_threads(1)
    expected = in_passes(decoder, tokens, [1])
    torch.set_num_threads(3)
    assert torch.equal(in_passes(decoder, tokens, [3, 17]), expected)
    cache = decoder.new_cache(64)
    decoder.forward([*tokens[:9], 5, 6, 7], cache)
    for start, count in ((9, 20), (12, 25), (11, 29)):
        cache.rollback(start)
        assert torch.equal(decoder.forward(tokens[start : start + count], cache), expected[start : start + count])


def test_a_long_context_equals_the_plain_pass(tmp_path: Path) -> None:
    save_model(tmp_path, "Llama", {"max_position_embeddings": 2048})
    decoder = load_target(tmp_path, CPU, FLOAT)
    cache, tokens = decoder.new_cache(1100), random_tokens(1040)
    decoder.forward(tokens[:1001], cache, last_only=True)
    expected = decoder.forward(tokens[1001:], cache)
    cache.rollback(1001)
    assert_close(fast(decoder).forward(tokens[1001:], cache), expected)
    assert cache.length == 1040


def test_dynamic_rope_before_and_beyond_its_threshold(tmp_path: Path) -> None:
    save_model(tmp_path, "Llama", {"max_position_embeddings": 32, "rope_parameters": DYNAMIC})
    plain, decoder = load_target(tmp_path, CPU, FLOAT), fast(load_target(tmp_path, CPU, FLOAT))
    caches = plain.new_cache(64), decoder.new_cache(64)
    for start, count in ((0, 20), (20, 8), (28, 10), (10, 5), (15, 30), (20, 3)):
        for cache in caches:
            cache.rollback(start)
        tokens = random_tokens(count)
        assert_close(decoder.forward(tokens, caches[1]), plain.forward(tokens, caches[0]))


@each_form
@pytest.mark.parametrize("count", [1, 7, 40, 150])
def test_what_it_chose_is_the_best_of_each_row(tmp_path: Path, count: int) -> None:
    decoder = fast(tiny_target(tmp_path, "qwen3"))
    decoder.layers[-1].down.weight.zero_()  # type: ignore[attr-defined]
    head = decoder.head.weight  # type: ignore[attr-defined]
    head[50:60] = head[40:50]  # rows of equal logits: the first counts
    for team in (1, 2, 3):
        torch.set_num_threads(team)
        logits = decoder.forward(random_tokens(count), decoder.new_cache(256))
        found = decoder.choose(random_tokens(count), decoder.new_cache(256))
        for few in (1, 3, 8):
            listed = decoder.choose(random_tokens(count), decoder.new_cache(256), few)
            assert listed == replace(
                found, likeliest=logits.sort(stable=True, descending=True).indices[:, :few].tolist()
            )
        best = logits.topk(2, dim=-1).values
        assert found.tokens == logits.argmax(dim=-1).tolist()
        assert found.margins == (best[:, 0] - best[:, 1]).tolist()


def test_inference_mode_gives_the_same_logits_and_choices(tmp_path: Path) -> None:
    decoder = fast(tiny_target(tmp_path, "qwen3"))
    expected = decoder.forward([1, 2], decoder.new_cache(8)), decoder.choose([1, 2], decoder.new_cache(8))
    with torch.inference_mode():
        assert torch.equal(decoder.forward([1, 2], decoder.new_cache(8)), expected[0])
        assert decoder.choose([1, 2], decoder.new_cache(8)) == expected[1]


ALL = range(96)


@pytest.mark.parametrize(
    "spoiled",
    [{7: torch.nan}, {95: torch.inf}, {7: torch.nan, 11: torch.inf}, dict.fromkeys(ALL, -torch.inf)],
    ids=["NaN", "infinite", "both", "all minus infinite"],
)
def test_logits_that_are_no_numbers_yield_no_token(tmp_path: Path, spoiled: dict[int, float]) -> None:
    decoder = tiny_target(tmp_path, "llama")
    decoder.head = DenseLinear(decoder.head.weight, torch.zeros(96))  # type: ignore[attr-defined]
    for token, value in spoiled.items():
        decoder.head.bias[token] = value
    for count in (1, 3):
        found = fast(decoder).choose([1, 2, 3][:count], decoder.new_cache(8), 3)
        assert found.tokens == [NO_TOKEN] * count
        assert found.likeliest == [[NO_TOKEN] * 3] * count


@pytest.mark.parametrize("count", [64, 65, 129, 200])
def test_a_pass_of_any_length_runs_in_parts_of_the_same_bits(tmp_path: Path, count: int) -> None:
    decoder = fast(tiny_target(tmp_path, "qwen3", BF16))
    decoder._plain_pass = None  # type: ignore[method-assign, assignment]
    tokens, cache = random_tokens(count), decoder.new_cache(count)
    expected = in_passes(decoder, tokens, [1])
    assert torch.equal(decoder.forward(tokens, cache), expected)
    cache.rollback(0)
    assert decoder.choose(tokens, cache) == choose_best(expected)
    assert cache.length == count


def test_long_prompts_run_in_pytorchs_operations(tmp_path: Path) -> None:
    decoder = fast(tiny_target(tmp_path, "llama"))
    decoder.fast.longest_prompt, decoder.fast.run = 9, None  # type: ignore[assignment, method-assign, union-attr]
    assert decoder.pass_prompt(random_tokens(10), decoder.new_cache(16), 6).shape[0] == 1  # its end is no short prompt


@each_form
@pytest.mark.parametrize("case", ["qwen3", "gemma 3, two ropes", HYBRIDS[0]])
def test_short_prompts_run_in_cpp_of_which_the_last_row_is_made(made: Made, case: str) -> None:
    """The logits of the last token, its keys and values behind it, all as decoding has them, to the bit."""
    decoder, tokens = fast(load_target(made(case), CPU, BF16)), random_tokens(20)
    expected = in_passes(decoder, tokens, [1])
    decoder._plain_pass = None  # type: ignore[method-assign, assignment]
    decoder.fast.longest_prompt = 12  # type: ignore[union-attr]
    for threads, sizes in ((1, (12, 8)), (3, (1, 7, 12))):
        torch.set_num_threads(threads)
        cache = decoder.new_cache(20)
        for size in sizes:
            last = decoder.pass_prompt(tokens[cache.length : cache.length + size], cache, 5)
            assert torch.equal(last, expected[cache.length - 1 : cache.length])


def test_passes_of_every_kind_run_where_threads_are_steered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short and long prompts, rows, trees, choices: each the same as with a fixed number."""
    decoder = fast(tiny_target(tmp_path, "qwen3", BF16))
    decoder.fast.longest_prompt = 6  # type: ignore[union-attr]

    def all_kinds() -> list[torch.Tensor]:
        cache = decoder.new_cache(40)
        found = [decoder.pass_prompt(random_tokens(count), cache, 8) for count in (5, 10)]
        found += [decoder.forward(random_tokens(3), cache), decoder.forward_tree([1, 2, 3], [-1, 0, 0], cache)]
        chosen = decoder.choose([5, 6], cache), decoder.choose_tree([7, 8], [-1, 0], cache)
        return [*found, *(torch.tensor([*some.tokens, *some.margins]) for some in chosen)]

    expected = all_kinds()
    torch.set_num_threads(2)
    monkeypatch.setattr("quasar_core.kernels.threads._without_efficient_cores", lambda count: count)
    use_threads("auto")
    assert all(torch.equal(*both) for both in zip(all_kinds(), expected, strict=True))


@pytest.mark.parametrize(
    ("products", "has", "dtype", "longest"),
    [
        ("pairs", "fma", BF16, 33),
        ("pairs", "fma", FLOAT, 0),
        ("pairs", "amx_bf16", BF16, 0),
        ("tiles", "amx_bf16", BF16, 256),
        ("tiles", "amx_bf16", FLOAT, 0),
        ("others", "fma", BF16, 0),
    ],
)
def test_prompts_run_here_as_far_as_pytorchs_own_products_are_no_faster(
    monkeypatch: pytest.MonkeyPatch, products: str, has: str, dtype: torch.dtype, longest: int
) -> None:
    monkeypatch.setattr(cpu_pass.cpp, "multiplies_bfloat16", lambda: products != "others")
    monkeypatch.setattr(cpu_pass.cpp, "multiplies_in_tiles", lambda: products == "tiles")
    monkeypatch.setattr(cpu_pass.forms, "instructions", lambda: frozenset({has}))
    assert cpu_pass.longest_prompt(dtype) == longest


TEXT_CASES = [
    *("qwen3", "mistral, window", "gemma 2", "gemma 3, two ropes", "granite", "hunyuan", "phi 3", "olmo 3", "glm 4"),
    *("mixtral", "qwen 3 moe", "qwen 2 moe", "glm 4 moe", "granite moe"),
    *("exaone 4", "ministral 3", "apertus", "gemma 4, shared states and own inputs", "muse glimmer"),
]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", TEXT_CASES)
def test_exact_text_is_that_of_plain_decoding_in_bf16_too(made: Made, case: str, every: bool) -> None:
    """A third of the ways for each case, unless `every` one of them."""
    target = fast(load_target(made(case, 4), CPU, BF16))
    pair = make_pair(target, fast(verifier_in(made(case, 4), target)))
    plain = Generator(pair, GenerationConfig(80, "full", "none")).generate(random_tokens(20)).token_ids
    ways: list[tuple[VerifyMode, int, int]] = [("full", drafts, 1) for drafts in (1, 8, 64)]
    ways += [("exact", drafts, window) for drafts, window in ((1, 1), (4, 3), (8, 24), (64, 63), (64, 200))]
    for verify, drafts, window in ways if every else ways[TEXT_CASES.index(case) % 3 :: 3]:
        config = GenerationConfig(80, verify, num_draft_tokens=drafts, window=window)
        assert Generator(pair, config).generate(random_tokens(20)).token_ids == plain


@pytest.mark.parametrize("case", HYBRIDS)
def test_and_so_it_is_where_layers_have_a_state(made: Made, case: str) -> None:
    target = fast(load_target(made(case, 4), CPU, BF16))
    pair = make_pair(target, fast(verifier_in(made(case, 4), target)))
    plain = Generator(pair, GenerationConfig(40, "full", "none")).generate(random_tokens(20)).token_ids
    ways: list[tuple[VerifyMode, int, int]] = [("full", 4, 1), ("exact", 1, 1), ("exact", 6, 5), ("exact", 64, 200)]
    for verify, drafts, window in ways:
        config = GenerationConfig(40, verify, num_draft_tokens=drafts, window=window)
        assert Generator(pair, config).generate(random_tokens(20)).token_ids == plain


def test_what_it_does_not_run_says_why(tmp_path: Path) -> None:
    target = tiny_target(tmp_path, "llama")
    reference = attach_verifier(target, quantize_layers(tmp_path, tmp_path / "verifier", lambda name: 4), "reference")
    assert loading.choose(reference) == (
        None,
        "passes: PyTorch's operations, not the C++ pass: it runs packed products on vnni or dense, and this verifier "
        "has some on reference",
    )
    half = load_target(tmp_path, CPU, torch.float16)
    assert loading.choose(half)[1].endswith("it takes bfloat16 and float32, not float16")
    save_model(tmp_path / "odd", "Llama", {"intermediate_size": 72})
    odd = load_target(tmp_path / "odd", CPU, FLOAT)
    assert loading.choose(odd)[1].endswith("hidden, intermediate and head sizes must be multiples of 16")
    save_model(tmp_path / "uneven", "Qwen3_5", {**DELTA, "linear_value_head_dim": 24})
    uneven = load_target(tmp_path / "uneven", CPU, FLOAT)
    assert loading.choose(uneven)[1].endswith("sizes of heads of recurrent layers must be multiples of 16")


def test_a_pass_beyond_the_caches_end_is_refused(tmp_path: Path) -> None:
    decoder = fast(tiny_target(tmp_path, "llama"))
    cache = decoder.new_cache(LENGTH)
    decoder.forward(random_tokens(40), cache)
    with pytest.raises(QuasarError, match="The cache holds 45 tokens, and 46 are needed"):
        decoder.forward([1] * 6, cache)


@pytest.mark.parametrize("token", [-1, 96])
def test_a_token_outside_the_vocabulary_is_refused(tmp_path: Path, token: int) -> None:
    decoder = fast(tiny_target(tmp_path, "llama"))
    with pytest.raises(IndexError, match="is not in a vocabulary of 96"):
        decoder.forward([1, token], decoder.new_cache(8))
