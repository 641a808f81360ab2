"""Successors beside a verifier: counted while quantizing, or for one that was made before; drafts begin with them."""

from collections import defaultdict
from pathlib import Path

import pytest
import torch
from helpers.quantize_cases import CONFIG, quantize
from transformers import AutoModelForCausalLM

from quasar_core.api import decoding, quantizing
from quasar_core.config import GenerationConfig
from quasar_core.decode.drafts.drafting import Drafting
from quasar_core.decode.generator import Generator
from quasar_core.draft.successor_file import read_successors
from quasar_core.draft.successors import ODDS
from quasar_core.errors import UsageError
from quasar_core.models.pair import Pair, load_tokenizer
from quasar_core.quantize.calibration import load_calibration
from quasar_core.quantize.text_writers import TransformersWriter
from quasar_core.store.folders import SUCCESSORS

pytest_plugins = ["helpers.quantize_fixtures"]


def test_counts_are_of_the_targets_own_logits(source: Path) -> None:
    """Of every context of one token, against plain passes of transformers' model over the calibration text."""
    folder = Path(quantize(source).checkpoint)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    vocabulary = model.config.vocab_size
    known = read_successors(folder, vocabulary)
    assert known is not None
    samples = load_calibration(TransformersWriter(model), load_tokenizer(source), CONFIG, 10_000).samples
    with torch.inference_mode():
        chances = model(input_ids=samples).logits.float().softmax(dim=-1)
    sums: dict[int, torch.Tensor] = defaultdict(lambda: torch.zeros(vocabulary))
    counts: dict[int, int] = defaultdict(int)
    for text, rows in zip(samples.tolist(), chances, strict=True):
        for token, row in zip(text, rows, strict=True):
            best = row.topk(8)
            sums[token][best.indices] += best.values
            counts[token] += 1
    for token, total in sums.items():
        size, tokens, odds = known.after([token])
        expected = total / counts[token]
        assert size == 1
        for successor, share in zip(tokens, odds, strict=True):
            if successor >= 0:  # in 16 bits, one of two near each other may be among the best here and not there
                assert abs(share - ODDS * expected[successor].item()) < 12
        assert odds[0] > ODDS * expected.max().item() - 3


def test_they_are_added_to_a_verifier_that_was_made_before(source: Path) -> None:
    folder = Path(quantize(source).checkpoint)
    written = read_successors(folder, 10_000)
    assert written is not None
    (folder / SUCCESSORS).unlink()
    assert quantizing.add_successors(str(source), CONFIG) == folder / SUCCESSORS
    again = read_successors(folder, 10_000)
    assert again is not None
    assert again.contexts.tolist() == written.contexts.tolist()
    (folder / SUCCESSORS).unlink()
    assert quantizing.add_successors(str(source), CONFIG, output=folder) == folder / SUCCESSORS
    with pytest.raises(UsageError, match=r"is no verifier of .*tiny"):
        quantizing.add_successors(str(source), CONFIG, output=source.parent / "elsewhere")


def notes_and_known(pair: Pair, draft: str) -> tuple[str, bool]:
    pair.notes.clear()
    known = Drafting(pair, GenerationConfig(draft=draft)).sources.known
    return "".join(pair.notes), known is not None


def test_drafts_begin_with_them_in_every_mode(source: Path) -> None:
    folder = Path(quantize(source).checkpoint)
    for verify in ("exact", "quantized", "full"):
        pair = decoding.load_pair(str(source), verify=verify)
        assert notes_and_known(pair, "auto")[1]
        assert notes_and_known(pair, "recycle")[1]
        assert notes_and_known(pair, "ngram") == ("", False)
    (folder / SUCCESSORS).write_bytes(b"damaged")
    note, known = notes_and_known(pair, "auto")
    assert not known
    assert "cannot be read" in note
    (folder / SUCCESSORS).unlink()
    note, known = notes_and_known(pair, "auto")
    assert not known
    assert "`quasar quantize MODEL --successors`" in note


def test_they_change_no_text(source: Path) -> None:
    quantize(source)
    pair = decoding.load_pair(str(source), dtype="float32")
    texts = [
        Generator(pair, GenerationConfig(40, verify, draft, num_draft_tokens=5)).generate([41, 42, 43]).token_ids  # type: ignore[arg-type]
        for verify, draft in (("full", "none"), ("full", "auto"), ("exact", "auto"), ("exact", "recycle"))
    ]
    assert all(text == texts[0] for text in texts)
