"""Answers that are kept for later runs: on request alone, bounded, private, and forgotten on request."""

import stat

import pytest
from helpers.drafters import spaced_words
from helpers.tiny_models import TableModel, make_pair

from quasar_cli.main import run
from quasar_core.config import GenerationConfig
from quasar_core.decode.drafts import draft_memory
from quasar_core.decode.drafts.draft_memory import keep_answers, memory_file, recall_answers
from quasar_core.decode.generator import Generator
from quasar_core.store.folders import home


def answer(**options: object) -> tuple[object, object]:
    """The second of two runs with the same model: its result and its pair."""
    pair = make_pair(TableModel(6, 3), tokenizer=spaced_words(6))
    config = GenerationConfig(40, "full", num_draft_tokens=4, **options)  # type: ignore[arg-type]
    return Generator(pair, config).generate([1, 2]), pair


def test_a_later_run_drafts_from_the_answers_of_an_earlier_one() -> None:
    first, _ = answer(draft_memory=True)
    second, pair = answer(draft_memory=True)
    assert second.token_ids == first.token_ids
    assert "memory" not in first.stats.drafters
    assert second.stats.drafters["memory"].accepted > 0
    assert "draft memory: 40 tokens of earlier answers" in pair.notes


def test_without_being_asked_nothing_is_kept() -> None:
    answer()
    assert not (home() / "drafts").exists()


def test_the_latest_tokens_are_kept_and_only_the_user_may_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_memory, "MOST_KEPT", 5)
    path = memory_file(spaced_words(6))
    assert keep_answers(path, range(9)) == ""
    assert recall_answers(path)[0] == [4, 5, 6, 7, 8]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("cut", [0, 5, -3])
def test_a_damaged_memory_is_begun_anew_and_that_is_said(cut: int) -> None:
    path = memory_file(spaced_words(6))
    keep_answers(path, [1, 2, 3])
    path.write_bytes(path.read_bytes()[:cut])
    tokens, note = recall_answers(path)
    assert tokens == []
    assert "is damaged" in note
    assert answer(draft_memory=True)[0].token_ids


def test_where_it_cannot_be_kept_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(draft_memory, "save_file", refuse)
    _, pair = answer(draft_memory=True)
    assert any("not kept" in note and note.endswith("Permission denied") for note in pair.notes)


def test_models_forget_removes_it(capsys: pytest.CaptureFixture[str]) -> None:
    answer(draft_memory=True)
    assert memory_file(spaced_words(6)).exists()
    assert run(["models", "forget"]) == 0
    assert "files of kept answers, 1; of texts for drafts, 0; models in 12 bits, 0." in capsys.readouterr().err
    assert not memory_file(spaced_words(6)).exists()
    assert run(["models", "forget"]) == 0
