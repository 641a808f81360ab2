"""Text that a model writes is kept as it is written: killed at any step, it goes on to the same text."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.chat_text import CHATML, chat_tokenizer
from helpers.quantize_cases import quantize, tensors_of
from helpers.tiny_models import random_model, words
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_core.errors import QuasarError
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.weights.lean_weights import load_target
from quasar_core.quantize import text_log
from quasar_core.quantize.self_text import Text, write_self_text
from quasar_core.quantize.text_batch import Asked
from quasar_core.quantize.text_log import kept_batch
from quasar_core.quantize.text_writers import LeanRows, LeanWriter, TransformersRows, TransformersWriter, Writer
from quasar_core.records import Progress

pytest_plugins = ["helpers.quantize_fixtures"]
ROWS, LENGTH = 5, 24


@pytest.fixture(autouse=True)
def _kept_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_log, "SECONDS", 0.0)
    monkeypatch.setattr(text_log, "SHARE", 0)


def write(kept: Path | None, progress: Progress | None = None, seed: int = 3, **options: Any) -> Text:
    tokenizer, lean = options.pop("tokenizer", None) or words(), options.pop("lean", True)
    more = {"progress": progress} if progress else {}
    return write_self_text(writer(lean), tokenizer, ROWS, LENGTH, seed, kept=kept, **more, **options)


def assert_same_text(one: Text, other: Text) -> None:
    for ours, theirs in zip(tensors_in(one), tensors_in(other), strict=True):
        assert torch.equal(ours, theirs)


def tensors_in(text: Text) -> list[torch.Tensor]:
    found = text.likeliest
    parts = [text.tokens, text.hidden, *((found.tokens, found.chances) if found else ())]
    return [part for part in parts if part is not None]


def writer(lean: bool) -> Writer:
    """One with room for two rows at once."""
    found = LeanWriter(lean_model()) if lean else TransformersWriter(random_model("qwen3").model)
    found.room = 2 * found.row_bytes(LENGTH)
    return found


@cache
def lean_model() -> LeanDecoder:
    with tempfile.TemporaryDirectory() as folder:
        random_model("qwen3").model.save_pretrained(folder)
        return load_target(Path(folder), torch.device("cpu"), torch.float32)


@cache
def straight_text() -> Text:
    return write(None)


def stop_at(tokens: int) -> Progress:
    def progress(stage: str, done: int, total: int) -> None:
        if done >= tokens:
            raise KeyboardInterrupt

    return progress


def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    passes: list[int] = []
    for rows in (LeanRows, TransformersRows):
        next_logits = rows.next_logits
        monkeypatch.setattr(rows, "next_logits", lambda *args, passed=next_logits: (passes.append(1), passed(*args))[1])
    return passes


ASKED = Asked(3, 4, hidden=True)  # of the first batch and a row of the second one thing, of the others the other


@pytest.mark.parametrize(
    "options", [{}, {"greedy_from": 9, "lean": False}, {"tokenizer": chat_tokenizer(CHATML)}, {"asked": ASKED}]
)
@pytest.mark.parametrize("moments", [[1], [47], [48], [60, 61, 100], [119]])
def test_an_interrupted_text_goes_on_to_the_same_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moments: list[int], options: dict[str, Any]
) -> None:
    straight = write(None, **options)
    for tokens in moments:
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, stop_at(tokens), **options)
    passes = count_passes(monkeypatch)
    assert_same_text(write(tmp_path, **options), straight)
    whole, in_batch = divmod(moments[-1], 2 * LENGTH)
    left = LENGTH * 3 - whole * LENGTH - in_batch // 2
    assert len(passes) <= left + 3, "what was kept is not passed again, but for the last token"
    passes.clear()
    assert_same_text(write(tmp_path, **options), straight)
    assert not passes, "a finished text is read"


@settings(max_examples=8, deadline=None)
@given(cut=st.integers(1, 4000), damage=st.sampled_from(["cut", "garbage", "flipped"]))
def test_a_log_that_was_not_written_whole_loses_its_end_alone(
    tmp_path_factory: pytest.TempPathFactory, cut: int, damage: str
) -> None:
    """As a kill leaves it in the middle of a record, or a disk that lost a page."""
    kept = tmp_path_factory.mktemp("kept")
    with pytest.raises(KeyboardInterrupt):
        write(kept, stop_at(40))
    (log,) = kept.glob("*.log")
    content = log.read_bytes()
    place = max(0, len(content) - cut)
    tail = {"cut": b"", "garbage": b"\xff" * 50, "flipped": bytes([content[place] ^ 1]) + content[place + 1 :]}[damage]
    log.write_bytes(content[:place] + tail)
    assert_same_text(write(kept), straight_text())


@settings(max_examples=12, deadline=None)
@given(place=st.integers(0, 150), bit=st.integers(0, 6))
def test_a_changed_bit_in_what_tells_a_log_has_it_written_anew(
    tmp_path_factory: pytest.TempPathFactory, place: int, bit: int
) -> None:
    kept = tmp_path_factory.mktemp("kept")
    with pytest.raises(KeyboardInterrupt):
        write(kept, stop_at(40))
    (log,) = kept.glob("*.log")
    content = bytearray(log.read_bytes())
    content[place] ^= 1 << bit
    log.write_bytes(content)
    assert kept_batch(kept, log.stem) is None
    assert_same_text(write(kept), straight_text())


def test_a_log_of_another_text_is_not_used(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, stop_at(40), seed=3)
    (log,) = tmp_path.glob("*.log")
    log.rename(log.with_name(log.name.replace("seed-3", "seed-4")))
    assert_same_text(write(tmp_path, seed=4), write(None, seed=4))
    (whole,) = tmp_path.glob("seed-4-row-0.safetensors")
    whole.rename(whole.with_name("seed-5-row-0.safetensors"))
    assert_same_text(write(tmp_path, seed=5), write(None, seed=5))


def test_a_damaged_text_is_one_sentence(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "seed-3-row-0.safetensors").write_bytes(b"no")
    with pytest.raises(QuasarError, match=r"row-0\.safetensors is not readable .*: delete it, and it is made anew"):
        write(tmp_path)


@settings(max_examples=20, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_changed_bit_in_a_finished_text_is_found(
    tmp_path_factory: pytest.TempPathFactory, place: float, bit: int
) -> None:
    """In the tokens, in what tells the text, in the sum itself."""
    kept = tmp_path_factory.mktemp("kept")
    write(kept)
    finished = kept / "seed-3-row-0.safetensors"
    content = bytearray(finished.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    content[begin + int(place * (len(content) - begin))] ^= 1 << bit
    finished.write_bytes(content)
    with pytest.raises(QuasarError, match=r"row-0\.safetensors is not readable .*: delete it, and it is made anew"):
        write(kept)


def test_little_of_the_time_goes_into_keeping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock of the test's own: a step takes 1 s, keeping 3 s."""
    clock = [0.0]
    monkeypatch.setattr(text_log, "SECONDS", 2.0)
    monkeypatch.setattr(text_log, "SHARE", 20)
    monkeypatch.setattr(text_log.time, "monotonic", lambda: clock[0])
    append, kept = text_log.TextLog._append, []

    def slow(log: text_log.TextLog, record: dict[str, torch.Tensor]) -> None:
        kept.append(clock[0])
        clock[0] += 3
        append(log, record)

    monkeypatch.setattr(text_log.TextLog, "_append", slow)

    def tick(*_: object) -> None:
        clock[0] += 1

    write_self_text(TransformersWriter(random_model("qwen3").model), words(), 2, 120, 0, progress=tick, kept=tmp_path)
    assert kept == [2.0, 65.0]


@pytest.mark.parametrize("stage", ["writing held-out text", "writing calibration text"])
def test_quantizing_goes_on_within_the_text(source: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    def progress(now: str, done: int, total: int) -> None:
        if now == stage and done > total // 2:
            raise KeyboardInterrupt

    passes = count_passes(monkeypatch)
    straight = tensors_of(Path(quantize(source, output=source.parent / "straight").checkpoint))
    whole = len(passes)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, progress=progress)
    passes.clear()
    output = Path(quantize(source).checkpoint)
    assert len(passes) < (0.8 if stage == "writing held-out text" else 0.4) * whole
    resumed = tensors_of(output)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())
    assert not (output / "commits").exists()


def test_a_run_that_wrote_nothing_leaves_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_log, "SECONDS", 1e9)

    def progress(now: str, done: int, total: int) -> None:
        if now == "writing held-out text":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, progress=progress)
    assert not list(source.parent.glob("*.partial"))
