"""Drafts of a checkpoint's own head: those of its definition, whatever was passed; they change no text."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.decoder_cases import CASES, CPU, FLOAT, random_tokens, save_model
from helpers.mtp_heads import TheirHead, add_head
from helpers.multimodal_models import add_tensors, save_multimodal
from helpers.quantized_decoder import quantize_layers
from helpers.tiny_models import TableModel, make_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from quasar_core import load_pair
from quasar_core.api import decoding
from quasar_core.config import GenerationConfig
from quasar_core.decode.drafts import guessers
from quasar_core.decode.generator import Generator
from quasar_core.draft.mtp import SHORT, NextTokenHead
from quasar_core.errors import QuasarError
from quasar_core.kernels.cpu import library
from quasar_core.models import loading
from quasar_core.models.decoder.cache import DecoderCache
from quasar_core.models.decoder.hidden_rows import HiddenRows
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.drafting.mtp import head_bytes, load_head
from quasar_core.models.pair import Pair
from quasar_core.models.weights.lean_weights import attach_verifier, load_target

KINDS = ["qwen3.5", "glm 4 moe"]
TOKENS = st.lists(st.integers(3, 95), min_size=1, max_size=6)


@pytest.fixture(scope="module", params=KINDS)
def head(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LeanDecoder, Any, Any]:
    """A model, its head of random weights, and how transformers has both."""
    folder = tmp_path_factory.mktemp("mtp")
    theirs = save_model(folder, *CASES[request.param])
    tensors = add_head(folder, theirs)
    model = load_target(folder, CPU, FLOAT)
    model.keeps_rows = True
    return model, load_head(folder, model), TheirHead(theirs, tensors)


class Text:
    """A text and the model's cache, which holds all but its last token, as decoding leaves them."""

    def __init__(self, model: LeanDecoder) -> None:
        self.model, self.tokens, self.cache = model, list[int](), model.new_cache(256)

    def go_on(self, new: list[int], refused: list[int], taken: int) -> None:
        """So many tokens are taken back, some follow, and a draft behind them is refused."""
        self.tokens = [*self.tokens[: len(self.tokens) - min(taken, len(self.tokens))], *new]
        held = max(min(self.cache.length, len(self.tokens) - len(new) - 1), 0)
        self.cache.rollback(held)
        self.model.forward([*self.tokens[held:-1], *refused] or [5], self.cache)
        self.cache.rollback(len(self.tokens) - 1)

    def rows(self) -> torch.Tensor:
        """Of all but the last token, passed at once."""
        cache = self.model.new_cache(256)
        self.model.forward(self.tokens[:-1], cache)
        assert isinstance(cache.rows, HiddenRows)
        return cache.rows.values[: cache.length]


@given(steps=st.lists(st.tuples(TOKENS, st.integers(0, 3), TOKENS | st.just([]), st.integers(0, 4)), min_size=1))
@settings(max_examples=8, deadline=None)
def test_drafts_are_those_of_whole_texts_whatever_was_passed_and_refused(
    head: tuple[LeanDecoder, Any, Any], steps: list[tuple[list[int], int, list[int], int]]
) -> None:
    model, own, theirs = head
    text = Text(model)
    guesser = NextTokenHead(own, 0.0, lambda: text.cache)
    for new, taken, refused, count in steps[:5]:
        text.go_on(new, refused, taken if model.longest_tree else 0)
        if len(text.tokens) < 2:
            assert guesser.follow(text.tokens, 0) == (-1, 0.0)
            continue
        drafted, known = list[int](), 0
        for _ in range(count):
            drafted.append(guesser.follow([*text.tokens, *drafted], known)[0])
            known = len(text.tokens) + len(drafted) - 1
        assert drafted == theirs.guesses(text.rows(), text.tokens, count)
        assert text.cache.length == len(text.tokens) - 1


def test_a_prompt_passes_in_pieces_and_what_is_new_once_more(
    head: tuple[LeanDecoder, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, own, _ = head
    lengths, text = list[int](), Text(model)

    def noting(run: Any) -> Any:
        def noted(tokens: Any, *rest: Any, **more: Any) -> Any:
            lengths.append(len(tokens))
            return run(tokens, *rest, **more)

        return noted

    monkeypatch.setattr(own, "forward", noting(own.forward))
    monkeypatch.setattr(own, "choose", noting(own.choose))
    guesser = NextTokenHead(own, 0.0, lambda: text.cache)
    text.go_on(random_tokens(60), [], 0)
    first = guesser.follow(text.tokens, 0)
    assert lengths == [58, 1]
    lengths.clear()
    assert guesser.follow(text.tokens, 60) == first
    assert lengths == [1]
    lengths.clear()
    text.go_on([4, 5, 6], [], 0)
    guesser.follow(text.tokens, 60)
    assert lengths == [3]
    lengths.clear()
    another = Text(model)
    another.go_on(random_tokens(SHORT + 1), [], 0)
    text.cache, text.tokens = another.cache, another.tokens
    guesser.follow(text.tokens, 0)
    assert lengths == [SHORT]


def test_behind_other_drafts_it_guesses_where_one_token_has_no_row(head: tuple[LeanDecoder, Any, Any]) -> None:
    model, own, theirs = head
    text = Text(model)
    text.go_on(random_tokens(9), [], 0)
    guesser = NextTokenHead(own, 0.0, lambda: text.cache)
    assert guesser.follow([*text.tokens, 7, 8], 0) == (-1, 0.0)
    guesser.follow([*text.tokens, 7], 0)
    rows, tokens = text.rows(), text.tokens[1:]
    chained, _ = theirs(rows, tokens)
    _, logits = theirs(torch.cat((rows, chained[-1:])), [*tokens, 7])
    assert guesser.follow([*text.tokens, 7], 10)[0] == int(logits[-1].argmax())


# Whole answers


def pair_of(folder: Path, kind: str, dtype: torch.dtype = FLOAT) -> tuple[Pair, Any]:
    """A pair of our decoders with their fast passes, where there are any; and transformers' model."""
    theirs = save_model(folder, *CASES[kind])
    add_head(folder, theirs)
    target = load_target(folder, CPU, dtype)
    own = ("mtp.", "model.layers.4.", "lm_head")
    codes = quantize_layers(folder, folder / "codes", lambda name: 16 if name.startswith(own) else 4)
    verifier = attach_verifier(target, codes, "auto")
    if library.why_not_here() is None:
        loading.attach(target), loading.attach(verifier)
    return make_pair(target, verifier, target_folder=folder), theirs


@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_head_of_any_weights_changes_no_text(
    tmp_path: Path, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if dtype == torch.bfloat16:
        request.getfixturevalue("cpp_pass")  # what PyTorch rounds to 16 bits depends on the rows beside it
    monkeypatch.setattr(guessers, "share_of_pass", lambda *_: 0.1)
    pair, _ = pair_of(tmp_path, kind, dtype)
    plain = Generator(pair, GenerationConfig(30, "full", "none"))
    first = random_tokens(20)
    turn = [*first, *plain.generate(first).token_ids, 5, 6, 7]
    expected = {tuple(prompt): plain.generate(prompt).token_ids for prompt in (first, turn, random_tokens(9, seed=3))}
    for verify in ("full", "exact"):
        for drafts, window in ((1, 1), (3, 4), (7, 12)):
            config = GenerationConfig(30, verify, "mtp", num_draft_tokens=drafts, window=window)  # type: ignore[arg-type]
            generator = Generator(pair, config)
            for prompt, text in expected.items():
                found = generator.generate(prompt)
                assert found.token_ids == text
                assert found.stats.drafted > 0


def save_oracle(folder: Path) -> None:
    """A model of one block with a narrow window, and a head that is right: it makes of the next token what the model
    will, as soon as the window reaches back no further than its own first position."""
    model = save_model(folder, "Mistral", {"num_hidden_layers": 1, "sliding_window": 6})
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    embedding /= embedding.square().mean(-1, keepdim=True).sqrt()
    size = model.config.hidden_size
    block = {name.replace("model.", "mtp.", 1): each for name, each in tensors.items() if ".layers.0." in name}
    head = {
        "mtp.fc.weight": torch.eye(size, 2 * size),
        "mtp.pre_fc_norm_embedding.weight": torch.ones(size),
        "mtp.pre_fc_norm_hidden.weight": torch.ones(size),
        "mtp.norm.weight": tensors["model.norm.weight"],
    }
    add_tensors(folder, {"model.embed_tokens.weight": embedding, **{k: v.clone() for k, v in (block | head).items()}})


@pytest.mark.parametrize("verify", ["full", "exact"])
def test_a_head_that_is_right_is_accepted(tmp_path: Path, verify: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guessers, "share_of_pass", lambda *_: 0.05)
    save_oracle(tmp_path)
    target = load_target(tmp_path, CPU, FLOAT)
    pair = make_pair(target, target, target_folder=tmp_path)
    prompt = random_tokens(12)
    expected = Generator(pair, GenerationConfig(60, "full", "none")).generate(prompt).token_ids
    config = GenerationConfig(60, verify, "mtp", num_draft_tokens=4, window=8)  # type: ignore[arg-type]
    found = Generator(pair, config).generate(prompt)
    assert found.token_ids == expected
    assert found.stats.drafted > 40
    assert found.stats.accepted == found.stats.drafted
    assert [note for note in pair.notes if note.startswith("mtp: ")] == [
        "mtp: the checkpoint's own head drafts; its pass of a token reads 0.05 of the "
        f"{'target' if verify == 'full' else 'verifier'}'s weights"
    ]


def test_a_verifier_alone_drafts_with_the_targets_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guessers, "share_of_pass", lambda *_: 0.1)
    pair, _ = pair_of(tmp_path, "qwen3.5")
    pair.target = None
    expected = Generator(pair, GenerationConfig(20, "quantized", "none")).generate([7, 8, 9]).token_ids
    found = Generator(pair, GenerationConfig(20, "quantized", "mtp", num_draft_tokens=3)).generate([7, 8, 9])
    assert found.token_ids == expected
    assert found.stats.drafted > 0


def test_it_needs_our_own_decoder_and_passes_that_give_rows(tmp_path: Path) -> None:
    config = GenerationConfig(5, "full", "mtp", num_draft_tokens=3)
    with pytest.raises(QuasarError, match="--draft mtp needs our own decoder"):
        Generator(make_pair(TableModel(13, seed=3)), config)
    pair, _ = pair_of(tmp_path, "qwen3.5")
    assert isinstance(pair.target, LeanDecoder)
    pair.target.fast = type("Recorded", (), {"gives_rows": False})()
    with pytest.raises(QuasarError, match="--draft mtp needs the model's last rows, which passes recorded on cpu"):
        Generator(pair, config)


def test_a_model_without_a_head_is_refused_before_anything_is_generated(tmp_path: Path) -> None:
    save_model(tmp_path, *CASES["llama"])
    pair = make_pair(load_target(tmp_path, CPU, FLOAT), target_folder=tmp_path)
    with pytest.raises(QuasarError, match="--draft mtp needs a head that predicts further tokens"):
        Generator(pair, GenerationConfig(5, "full", "mtp", num_draft_tokens=3))
    cache: Any = pair.new_cache(8)
    assert isinstance(cache, DecoderCache)
    assert cache.rows is None


def test_loading_reads_the_head_of_a_multimodal_folder_and_refuses_one_without_before_any_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guessers, "share_of_pass", lambda *_: 0.1)
    model = save_multimodal(tmp_path, "qwen3.5")
    options: dict[str, Any] = {"verify": "full", "device": "cpu", "dtype": "float32"}
    plain = decoding.load_pair(str(tmp_path), **options)
    expected = Generator(plain, GenerationConfig(20, "full", "none")).generate([40, 41, 42]).token_ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_pair, "load_models", None)
        with pytest.raises(QuasarError, match="--draft mtp needs a head that predicts further tokens"):
            decoding.load_pair(str(tmp_path), draft="mtp", **options)
    add_head(tmp_path, transformers.Qwen3_5ForCausalLM(model.config.text_config))
    pair = decoding.load_pair(str(tmp_path), draft="mtp", **options)
    assert isinstance(pair.head, LeanDecoder)
    assert isinstance(pair.new_cache(8).rows, HiddenRows)
    found = Generator(pair, GenerationConfig(20, "full", "mtp", num_draft_tokens=3)).generate([40, 41, 42])
    assert found.token_ids == expected
    assert found.stats.drafted > 0
    assert head_bytes(tmp_path, FLOAT) == sum(
        tensor.nbytes for name, tensor in load_file(tmp_path / "model.safetensors").items() if name.startswith("mtp.")
    )
