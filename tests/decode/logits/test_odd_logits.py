"""Logits that are not numbers: one sentence in every mode, wherever a text comes upon them, and nowhere else."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_cases import FLOAT, save_model
from helpers.fast_pass import fast
from helpers.quantized_decoder import quantize_layers
from helpers.tiny_model import save_tiny_model
from helpers.tiny_models import (
    CPU,
    PROMPT,
    VOCABULARY,
    LastTokenModel,
    TableModel,
    drafter_factory,
    generate,
    greedy_by_hand,
    make_pair,
)
from safetensors.torch import load_file, save_file

from quasar_cli.main import run
from quasar_core.config import SamplingConfig
from quasar_core.errors import QuasarError
from quasar_core.kernels.cpu import library
from quasar_core.models.weights.lean_weights import attach_verifier, load_target
from quasar_core.quantize.fidelity import measure_fidelity

SENTENCE = "The model's logits are not numbers: try --dtype bfloat16 or float32."
WHILE_QUANTIZING = "The model's logits are not numbers."  # quantize has no --dtype
MODES = ("full", "exact", "quantized")
SAMPLINGS = {
    "greedy": SamplingConfig(),
    "greedy, penalized": SamplingConfig(repetition_penalty=1.2),
    "sampled": SamplingConfig(temperature=1.0),
}
ODD: dict[str, Any] = {
    "NaN": lambda row: row.__setitem__(3, math.nan),
    "all NaN": lambda row: row.fill_(math.nan),
    "infinite": lambda row: row.__setitem__(3, math.inf),
    "all minus infinite": lambda row: row.fill_(-math.inf),
}


def odd_after(model: TableModel, pair: tuple[int, int] | None, kind: str = "NaN") -> TableModel:
    """A copy whose logits are odd after these two tokens, after any where none are named."""
    copy = model.disturbed(0.0)
    for row in copy.table.view(-1, VOCABULARY) if pair is None else [copy.table[pair]]:
        ODD[kind](row)
    return copy


@pytest.fixture(scope="module")
def table() -> TableModel:
    return TableModel(VOCABULARY, seed=0)


@pytest.fixture(scope="module")
def text(table: TableModel) -> list[int]:
    return [*PROMPT, *greedy_by_hand(table, table, 24)]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("verify", MODES)
def test_a_prompts_pass_says_so(table: TableModel, verify: str, kind: str, sampling: str) -> None:
    target = odd_after(table, (PROMPT[-2], PROMPT[-1]), kind)
    with pytest.raises(QuasarError) as caught:
        generate(make_pair(target, table), verify, sampling=SAMPLINGS[sampling])
    assert str(caught.value) == SENTENCE


@pytest.mark.parametrize("draft", ["wrong", "oracle"])
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("verify", MODES)
def test_a_verify_or_a_confirm_says_so(table: TableModel, text: list[int], verify: str, kind: str, draft: str) -> None:
    """The verifier's logits are odd in the middle of the answer, and the target's; then the target's alone."""
    odd = odd_after(table, (text[20], text[21]), kind)
    make_draft = drafter_factory(draft, text)
    for target, verifier in ((odd, odd), (odd, table)) if verify != "quantized" else ((table, odd),):
        with pytest.raises(QuasarError) as caught:
            generate(make_pair(target, verifier), verify, 5, 7, make_draft=make_draft)
        assert str(caught.value) == SENTENCE


@pytest.mark.parametrize("verify", MODES)
def test_what_only_a_refused_draft_comes_upon_is_no_failure(table: TableModel, text: list[int], verify: str) -> None:
    """Plain decoding never reads those rows."""
    wrong = drafter_factory("wrong", text)
    seen = {(before, token) for before, token in pairwise(text)}
    odd = table
    for before, token in pairwise(text):
        if (before, (token + 1) % VOCABULARY) not in seen:
            odd = odd_after(odd, (before, (token + 1) % VOCABULARY))
    assert generate(make_pair(odd, odd), verify, 5, 7, make_draft=wrong).token_ids == text[len(PROMPT) :]


@pytest.mark.parametrize("kind", ODD)
def test_fidelity_says_so_of_either_model(kind: str) -> None:
    sound, odd = (LastTokenModel([[0.6, 0.4, 0.0, 0.0], [0.1, 0.9, 0.0, 0.0]]) for _ in range(2))
    ODD[kind](odd.table[1])
    rows = torch.tensor([[0, 1, 1]])
    for target, verifier in ((sound, odd), (odd, sound)):
        with pytest.raises(QuasarError) as caught:
            measure_fidelity(target, verifier, target.new_cache(8), rows, None, 1, "text")
        assert str(caught.value) == WHILE_QUANTIZING


@pytest.mark.parametrize("route", ["PyTorch", "C++"])
@pytest.mark.parametrize("verify", MODES)
def test_decoders_of_our_own_say_so(tmp_path: Path, verify: str, route: str) -> None:
    if route == "C++" and library.why_not_here():
        pytest.skip(f"the C++ pass: {library.why_not_here()}")
    save_model(tmp_path, "Llama", {})
    target = load_target(tmp_path, CPU, FLOAT)
    checkpoint = quantize_layers(tmp_path, tmp_path / "codes", lambda name: 4)
    verifier = attach_verifier(target, checkpoint, "vnni" if route == "C++" else "dense")
    target.embedding[5:] = math.nan  # not of the prompt's tokens
    if route == "C++":
        fast(target), fast(verifier)
    with pytest.raises(QuasarError) as caught:
        generate(make_pair(target, verifier), verify, make_draft=drafter_factory("wrong", [1] * 99))
    assert str(caught.value) == SENTENCE


COMMANDS = {"generate --verify full --prompt abc": SENTENCE, "quantize --samples 2 --seq-len 32": WHILE_QUANTIZING}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_says_so_and_exits_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    source = save_tiny_model(tmp_path / "model")
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"].fill_(3e38)  # finite, and too large for the head's products
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    verb, *options = command.split()
    where = [str(source)] if verb == "quantize" else ["--model", str(source)]
    assert run([verb, *where, *options]) == 1
    assert COMMANDS[command] in " ".join(capsys.readouterr().err.split())
