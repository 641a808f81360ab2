"""transformers as arms of a bench: the same text, and honest counts."""

import json
from pathlib import Path

import pytest
from helpers.decoder_cases import CASES, CPU, FLOAT, random_prompts, random_tokens, save_model
from helpers.near_ties import clear_prompt
from helpers.tiny_models import make_pair

from quasar_core.bench.peers import TransformersPeer
from quasar_core.config import GenerationConfig, Request, SamplingConfig
from quasar_core.decode.generator import Generator
from quasar_core.decode.processors import read_processors
from quasar_core.errors import UsageError
from quasar_core.models.lean_weights import load_target
from quasar_core.models.pair import Pair


@pytest.fixture
def prompt(tmp_path: Path) -> list[int]:
    """One after which the best token always leads clearly."""
    model = save_model(tmp_path, *CASES["qwen3"])
    return clear_prompt(model, random_prompts(8, repeats=3), 40)


@pytest.fixture
def pair(tmp_path: Path, prompt: list[int]) -> Pair:
    return make_pair(load_target(tmp_path, CPU, FLOAT), target_folder=tmp_path)


@pytest.mark.parametrize("draft", ["none", "ngram"])
def test_greedy_text_is_ours(pair: Pair, prompt: list[int], draft: str) -> None:
    config = GenerationConfig(40, "full", draft, ignore_eos=True)  # type: ignore[arg-type]
    pieces: list[str] = []
    ours = Generator(pair, config).generate(prompt)
    theirs = TransformersPeer(pair, config).generate(prompt, pieces.append)
    assert theirs.token_ids == ours.token_ids
    assert theirs.finish_reason == "length"
    assert pieces == [theirs.text]
    stats = theirs.stats
    assert (stats.new_tokens, stats.prompt_tokens) == (40, 24)
    assert stats.decode_s > 0
    assert stats.ttft_s == stats.prefill_s > 0
    if draft == "none":
        assert (stats.steps, stats.prefill_tokens, stats.acceptance_length) == (39, 1, 1.0)
    else:
        assert stats.steps < 39


def test_the_seed_decides_sampled_text(pair: Pair) -> None:
    peer = TransformersPeer(pair, GenerationConfig(20, "full", "none", sampling=SamplingConfig(1.0, seed=3)))
    first, again = (peer.generate(random_tokens(8)).token_ids for _ in range(2))
    assert first == again != peer.generate(random_tokens(8), request=Request(20, seed=4)).token_ids


def test_the_end_of_text_ends_an_answer(pair: Pair, prompt: list[int]) -> None:
    config = GenerationConfig(40, "full", "none")
    token = Generator(pair, config).generate(prompt).token_ids[5]
    pair.eos_ids = frozenset({token})
    ours = Generator(pair, config).generate(prompt)
    theirs = TransformersPeer(pair, config).generate(prompt)
    assert (theirs.token_ids, theirs.finish_reason) == (ours.token_ids, "eos")


def test_without_files_there_is_no_peer(pair: Pair) -> None:
    pair.target_folder = None
    with pytest.raises(UsageError, match="needs the target's files"):
        TransformersPeer(pair, GenerationConfig())


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_processors_are_applied_or_left_out_in_every_arm(pair: Pair, tmp_path: Path, ignore_eos: bool) -> None:
    options = {"repetition_penalty": 1.5, "min_new_tokens": 5, "exponential_decay_length_penalty": [1, 1.2]}
    (tmp_path / "generation_config.json").write_text(json.dumps({**options, "eos_token_id": 2, "pad_token_id": 0}))
    pair.processors, pair.eos_ids = read_processors(tmp_path), frozenset([2])
    texts = []
    for processors in (True, False):
        config = GenerationConfig(16, "full", "ngram", num_draft_tokens=4, ignore_eos=ignore_eos, processors=processors)
        ours = Generator(pair, config).generate(random_tokens(8)).token_ids
        assert TransformersPeer(pair, config).generate(random_tokens(8)).token_ids == ours
        texts.append(ours)
    assert texts[0] != texts[1]
