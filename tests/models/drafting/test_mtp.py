"""A checkpoint's own head against one built of transformers' block; rows of passes; heads that are refused."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_cases import CASES, CPU, FLOAT, assert_close, random_tokens, save_model
from helpers.mtp_heads import TheirHead, add_head
from helpers.multimodal_models import add_tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_core.errors import QuasarError
from quasar_core.models import loading
from quasar_core.models.decoder.cache import DecoderCache
from quasar_core.models.decoder.hidden_rows import HiddenRows, LastRow
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.drafting.mtp import load_head, over
from quasar_core.models.weights.lean_weights import load_target

KINDS = ["qwen3.5", "glm 4 moe"]
SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=9)


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Any]:
    """A tiny model with a head of random weights, and how transformers has both."""
    folder = tmp_path_factory.mktemp("mtp")
    model = save_model(folder, *CASES[request.param])
    return folder, request.param, TheirHead(model, add_head(folder, model))


def pass_head(head: LeanDecoder, rows: torch.Tensor, tokens: Sequence[int], sizes: Sequence[int]) -> Any:
    """Logits, and the row of the last token of each pass, of a head that reads these rows."""
    cache = head.new_cache(len(tokens))
    cache.given, sizes = rows, [*sizes, *[1] * len(tokens)]
    logits, last = [], []
    while cache.length < len(tokens):
        logits.append(head.forward(tokens[cache.length : cache.length + sizes.pop(0)], cache))
        assert isinstance(cache.rows, LastRow)
        last.append((cache.length - 1, cache.rows.value.clone()))
    return torch.cat(logits), last


@pytest.mark.parametrize("passes", ["C++", "PyTorch"])
def test_a_head_gives_what_its_definition_gives_in_pieces_too(
    folder: tuple[Path, str, Any], passes: str, request: pytest.FixtureRequest
) -> None:
    where, kind, theirs = folder
    model = load_target(where, CPU, FLOAT)
    if passes == "C++":
        request.getfixturevalue("cpp_pass")
        loading.attach(model)
    head = over(load_head(where, model), model) if passes == "C++" else load_head(where, model)
    assert (head.fast is not None) == (passes == "C++")
    tokens = random_tokens(40)
    rows = torch.randn(len(tokens), 64, generator=torch.Generator().manual_seed(2))
    expected_rows, expected = theirs(rows, tokens)
    for sizes in ([40], [20, 1, 3]):
        logits, last = pass_head(head, rows, tokens, sizes)
        assert_close(logits, expected, kind)
        for position, row in last:
            assert_close(row, expected_rows[position], kind)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16], ids=str)
def test_the_cpp_pass_of_a_head_has_the_same_bits_however_it_is_cut(
    folder: tuple[Path, str, Any], dtype: torch.dtype
) -> None:
    model = load_target(folder[0], CPU, dtype)
    head = load_head(folder[0], model)
    loading.attach(head)
    tokens, rows = random_tokens(24), torch.randn(24, 64).to(dtype)
    whole, _ = pass_head(head, rows, tokens, [24])
    for sizes in ([5, 1, 7, 2], []):
        assert torch.equal(pass_head(head, rows, tokens, sizes)[0], whole)


@pytest.mark.parametrize("passes", ["C++", "PyTorch"])
@settings(max_examples=10, deadline=None)
@given(sizes=SIZES, back=st.integers(0, 9))
def test_rows_are_those_that_transformers_head_reads(
    folder: tuple[Path, str, Any], request: pytest.FixtureRequest, passes: str, sizes: list[int], back: int
) -> None:
    """In any passes, and after going back; a position holds what was passed there last."""
    where, kind, theirs = folder
    model = load_target(where, CPU, FLOAT)
    if passes == "C++":
        request.getfixturevalue("cpp_pass")
        loading.attach(model)
    model.keeps_rows = True
    cache, text = model.new_cache(128), list[int]()
    assert isinstance(cache.rows, HiddenRows)
    for number, size in enumerate(sizes):
        new = random_tokens(size, seed=number)
        model.forward(new, cache, last_only=size > 6)
        text += new
        if number == 2:
            cache.rollback(len(text) - min(back, len(text)))
            del text[cache.length :]
    if text:
        assert_close(cache.rows.values[: len(text)], theirs.rows(text), kind)


def test_a_trees_path_keeps_its_rows(folder: tuple[Path, str, Any]) -> None:
    where, kind, theirs = folder
    if kind == "qwen3.5":
        pytest.skip("its drafts are chains")
    model = load_target(where, CPU, FLOAT)
    model.keeps_rows = True
    text, tree = random_tokens(12), [7, 8, 9, 10, 11]
    for attached in (False, True):
        cache = model.new_cache(32)
        model.forward(text, cache)
        model.forward_tree(tree, [-1, 0, 0, 2, 2], cache)
        cache.keep(12, [0, 2, 4])
        path = [*text, 7, 9, 11]
        assert_close(cache.rows.values[: len(path)], theirs.rows(path), kind)
        if not attached and loading.choose(model)[0] is not None:
            loading.attach(model)


def test_what_has_been_written_is_told_each_reader_once() -> None:
    rows, one, other = HiddenRows(8, 2, CPU, FLOAT), HiddenRows, LastRow  # any two readers
    assert [rows.changed(one), rows.changed(one)] == [0, 8]
    for start in (5, 3, 4):
        rows.mark(start, 1)
    assert [rows.changed(one), rows.changed(one), rows.changed(other)] == [3, 8, 0]
    rows.mark(6, 1)
    assert [rows.changed(one), rows.changed(other)] == [6, 6]


def test_caches_keep_no_rows_unless_asked(folder: tuple[Path, str, Any]) -> None:
    cache = load_target(folder[0], CPU, FLOAT).new_cache(8)
    assert isinstance(cache, DecoderCache)
    assert cache.rows is None
    assert cache.given is None


def test_a_model_without_a_head_is_refused_in_a_sentence(tmp_path: Path) -> None:
    save_model(tmp_path, *CASES["qwen3.5"])
    with pytest.raises(QuasarError, match=r"--draft mtp needs a head that predicts further tokens, and .* has none"):
        load_head(tmp_path, load_target(tmp_path, CPU, FLOAT))


def test_of_several_heads_the_first_drafts_and_what_has_no_place_is_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path, *CASES["qwen3.5"])
    tensors = add_head(tmp_path, model)
    add_tensors(tmp_path, {name.replace("layers.0", "layers.1"): each for name, each in tensors.items()})
    load_head(tmp_path, load_target(tmp_path, CPU, FLOAT))
    add_tensors(tmp_path, {"mtp.layers.0.self_attn.sinks": torch.ones(4)})
    with pytest.raises(QuasarError, match=r"holds mtp\.layers\.0\.self_attn\.sinks, which quasar has no place for"):
        load_head(tmp_path, load_target(tmp_path, CPU, FLOAT))


def test_a_head_may_have_an_embedding_of_its_own(tmp_path: Path) -> None:
    model = save_model(tmp_path, *CASES["qwen3.5"])
    tensors = add_head(tmp_path, model)
    own = torch.randn_like(model.get_input_embeddings().weight)
    add_tensors(tmp_path, {"mtp.embed_tokens.weight": own})
    head = load_head(tmp_path, load_target(tmp_path, CPU, FLOAT))
    tokens, rows = random_tokens(9), torch.randn(9, 64)
    _, expected = TheirHead(model, tensors, own)(rows, tokens)
    assert_close(pass_head(head, rows, tokens, [9])[0], expected, "qwen3.5")
