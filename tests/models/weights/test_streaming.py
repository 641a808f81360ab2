"""Weights that are fetched for every pass give what weights in memory give, to the last bit; what fails is said."""

from pathlib import Path

import pytest
import torch
from helpers.decoder_cases import CASES, CPU, FLOAT, random_tokens, save_model
from helpers.float8_models import to_blocks
from helpers.quantized_decoder import mixed_bits, quantize_layers
from helpers.streamed import assert_same, passes, source_of, streamed, wait_for
from helpers.tiny_models import make_pair

from quasar_core.config import GenerationConfig, SamplingConfig
from quasar_core.decode import engine
from quasar_core.decode.generator import Generator
from quasar_core.kernels import threads
from quasar_core.models import loading
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.memory.offload import movable_products
from quasar_core.models.weights.lean_weights import attach_verifier, load_target

BF16 = torch.bfloat16
SHARES = ([0, 1, 2, 3], [1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 3], [2])
STREAMED_CASES = (
    "qwen3, listed windows, biases",
    "gemma 2",
    "gemma 4, keys are values",
    "gemma 4, shared states and own inputs",
    "muse glimmer",
    "phi 3, a part rotates, window",
    "apertus",
)


def always_ready(decoder: LeanDecoder) -> LeanDecoder:
    loading.attach(decoder)
    return decoder


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "cpp"])
@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
@pytest.mark.parametrize("case", STREAMED_CASES)
def test_every_share_gives_the_same_bits(
    tmp_path: Path, case: str, dtype: torch.dtype, fast: bool, request: pytest.FixtureRequest
) -> None:
    if fast:
        request.getfixturevalue("cpp_pass")
    save_model(tmp_path, *CASES[case])
    tokens, ready = random_tokens(40), always_ready if fast else lambda decoder: decoder
    expected = passes(ready(load_target(tmp_path, CPU, dtype)), tokens)
    for blocks in SHARES[dtype == BF16 :: 2]:  # each dtype takes every second one
        decoder = ready(streamed(tmp_path, blocks, dtype))
        assert_same(passes(decoder, tokens), expected)
        assert_same(passes(decoder, tokens), expected)  # and when the buffers hold the first blocks already


def test_weights_stored_in_16_bits_are_read_straight_into_their_places(tmp_path: Path) -> None:
    save_model(tmp_path, *CASES["llama"]).to(BF16).save_pretrained(tmp_path)
    expected = passes(load_target(tmp_path, CPU, BF16), random_tokens())
    decoder = streamed(tmp_path, range(4), BF16)
    assert_same(passes(decoder, random_tokens()), expected)
    assert source_of(decoder).pass_bytes == 4 * 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)


def test_weights_in_8_bit_blocks_are_dequantized_on_the_way(tmp_path: Path) -> None:
    save_model(tmp_path / "plain", "Llama", {"intermediate_size": 80})
    to_blocks(tmp_path / "plain", tmp_path / "blocks", whole=False)
    expected = passes(load_target(tmp_path / "blocks", CPU, BF16), random_tokens())
    assert_same(passes(streamed(tmp_path / "blocks", range(4), BF16), random_tokens()), expected)


def test_what_the_verifier_takes_over_stays(tmp_path: Path) -> None:
    """Block 2 is not quantized, nor a part of two products of block 1: their weights serve both models."""
    save_model(tmp_path, *CASES["qwen3"])
    checkpoint = quantize_layers(tmp_path, tmp_path / "verifier", mixed_bits)
    movable, count = movable_products(tmp_path, checkpoint)
    assert count == 4
    names = {block: [product.names[0].rpartition(".")[2] for product in some] for block, some in movable.items()}
    every = ["q_proj", "o_proj", "gate_proj", "down_proj"]
    assert names == {0: every, 1: ["o_proj", "down_proj"], 3: every}
    whole = load_target(tmp_path, CPU, FLOAT)
    target = load_target(tmp_path, CPU, FLOAT, streamed=movable)
    tokens = random_tokens()
    expected = passes(attach_verifier(whole, checkpoint, "dense"), tokens)
    verifier = attach_verifier(target, checkpoint, "dense")
    passes(target, tokens)
    assert_same(passes(verifier, tokens), expected)


@pytest.mark.usefixtures("cpp_pass")
@pytest.mark.parametrize(("dtype", "blocks"), [(FLOAT, [1, 3, 2]), (BF16, [0, 1, 2, 3])], ids=str)
def test_answers_are_those_of_plain_decoding_in_windows_of_any_length(
    tmp_path: Path, dtype: torch.dtype, blocks: list[int]
) -> None:
    save_model(tmp_path, "Qwen3", {"head_dim": 32, "max_position_embeddings": 400})
    checkpoint = quantize_layers(tmp_path, tmp_path / "verifier", lambda name: 8 if "_proj" in name else 16)
    whole = always_ready(load_target(tmp_path, CPU, dtype))
    prompt, count = random_tokens(30), 200
    options = {"max_context": 400, "dtype": dtype}
    plain = GenerationConfig(count, "full", "none")
    expected = Generator(make_pair(whole, **options), plain).generate(prompt).token_ids
    movable, _ = movable_products(tmp_path, checkpoint)
    target = always_ready(load_target(tmp_path, CPU, dtype, streamed={block: movable[block] for block in blocks}))
    verifier = always_ready(attach_verifier(target, checkpoint, "vnni"))
    pair, longest = make_pair(target, verifier, **options), 0
    for window, draft in ((1, "none"), (33, "ngram"), (256, "ngram"), (256, "none")):
        answer = Generator(pair, GenerationConfig(count, window=window, draft=draft)).generate(prompt)
        assert answer.token_ids == expected
        longest = max(longest, *(confirm.window for confirm in answer.stats.confirm_log))
    assert Generator(pair, plain).generate(prompt).token_ids == expected
    assert longest > 64


@pytest.mark.usefixtures("cpp_pass")
def test_drawn_answers_are_those_with_all_weights_in_memory(tmp_path: Path) -> None:
    save_model(tmp_path, *CASES["llama"])
    checkpoint = quantize_layers(tmp_path, tmp_path / "verifier", lambda name: 8)
    sampling = SamplingConfig(temperature=1.0, seed=7)
    texts = []
    for blocks in ([], [0, 1, 2, 3]):
        movable, _ = movable_products(tmp_path, checkpoint)
        target = always_ready(load_target(tmp_path, CPU, FLOAT, streamed={block: movable[block] for block in blocks}))
        pair = make_pair(target, always_ready(attach_verifier(target, checkpoint, "vnni")))
        config = GenerationConfig(60, window=20, draft="ngram", num_draft_tokens=3, sampling=sampling)
        texts.append(Generator(pair, config).generate(random_tokens(20)).token_ids)
    assert texts[0] == texts[1]


def test_a_prompt_takes_one_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engine.PREFILL_CHUNK, "cpu", 7)
    save_model(tmp_path, *CASES["llama"])
    decoder = streamed(tmp_path, range(4))
    source = source_of(decoder)
    source.start()
    Generator(make_pair(decoder), GenerationConfig(1, "full", "none")).generate(random_tokens(30))
    wait_for(source)
    assert source.bytes_read == source.pass_bytes + source.pass_bytes // 2  # and half of the next one's blocks


def test_a_sweep_runs_in_all_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As every long prompt's pass does, whatever passes of decoding are steered to."""
    save_model(tmp_path, *CASES["llama"])
    decoder = streamed(tmp_path, range(4))
    torch.set_num_threads(2)
    monkeypatch.setattr(threads, "free_threads", lambda most, looks=1: 1)
    threads.use_threads("auto")
    seen: list[int] = []
    tokens, cache = random_tokens(30), decoder.new_cache(40)
    decoder.pass_prompt(tokens, cache, 10, lambda: seen.append(torch.get_num_threads()))
    assert set(seen) == {2}
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("blocks", [[1], [0, 3]])
def test_as_few_blocks_as_there_are_buffers_are_read_once(tmp_path: Path, blocks: list[int]) -> None:
    save_model(tmp_path, *CASES["llama"])
    decoder = streamed(tmp_path, blocks)
    passes(decoder, random_tokens())
    assert source_of(decoder).pass_bytes == 0
    assert decoder.streamed is None
    assert source_of(decoder).bytes_read == len(blocks) * 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)
