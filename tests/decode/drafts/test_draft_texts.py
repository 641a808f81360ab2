"""Texts that the user names for drafts: what is read, what is left out, what is kept."""

import os
from pathlib import Path

import pytest
from helpers.drafters import spaced_words

from quasar_core.decode.drafts import draft_texts
from quasar_core.decode.drafts.draft_texts import read_index, read_texts
from quasar_core.errors import UsageError
from quasar_core.store.folders import home


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two texts and much else."""
    place = tmp_path / "texts"
    (place / "in" / "deep").mkdir(parents=True)
    (place / ".git").mkdir()
    (place / "a.txt").write_text("w1 w2 w3\n")
    (place / "in" / "deep" / "b.md").write_text("w4 w5\n")
    (place / "empty.txt").write_text("")
    (place / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    (place / "null.txt").write_bytes(b"a\0b")
    (place / ".hidden").write_text("secret")
    (place / ".git" / "config").write_text("secret")
    (place / "link").symlink_to(tmp_path / "elsewhere")
    (place / "large.log").write_bytes(b"x" * 200)
    return place


@pytest.fixture(autouse=True)
def _limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_texts, "LARGEST_FILE", 100)


def test_a_folder_gives_its_texts_and_says_what_it_leaves_out(folder: Path) -> None:
    texts = read_texts([str(folder)])
    assert [path.name for path in texts.contents] == ["a.txt", "empty.txt", "b.md"]
    assert texts.left_out == {"larger than 4 MiB": ["large.log"], "not text": ["null.txt", "picture.png"]}
    sentence = texts.describe(5)
    assert sentence.startswith("draft texts: 3 files of 5 tokens; left out as")
    assert "not text: null.txt, picture.png (2)" in sentence


def test_a_file_that_was_named_is_read_once_even_if_hidden(folder: Path) -> None:
    names = [str(folder / ".hidden"), str(folder / "a.txt"), str(folder)]
    assert [path.name for path in read_texts(names).contents] == [".hidden", "a.txt", "empty.txt", "b.md"]


@pytest.mark.parametrize(("name", "why"), [("picture.png", "not UTF-8"), ("null.txt", "not text"), ("x", "not exist")])
def test_a_named_file_that_is_no_text_is_refused(folder: Path, name: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        read_texts([str(folder / name)])


def test_a_pipe_is_refused_and_within_a_folder_left_out(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="a pipe"):
        read_texts([str(tmp_path / "pipe")])
    os.mkfifo(folder / "pipe")
    assert len(read_texts([str(folder)]).contents) == 3


def test_nothing_to_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UsageError, match=r"--draft-from .*no text was found"):
        read_texts([str(tmp_path)])


def test_texts_have_a_limit_in_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_texts, "MOST_BYTES", 14)
    texts = read_texts([str(folder)])
    assert texts.left_out["beyond 64 MiB in all"] == ["b.md"]


class TestIndex:
    def read(self, *places: Path) -> tuple[list[int], list[str]]:
        """The index's ids, and the stages of work that were told."""
        stages: list[str] = []
        index, _ = read_index([str(place) for place in places], self.tokenizer, lambda stage, *_: stages.append(stage))
        return index.ids.tolist(), stages

    @pytest.fixture(autouse=True)
    def _tokenizer(self) -> None:
        self.tokenizer = spaced_words(12)

    def kept(self) -> list[Path]:
        return sorted((home() / "drafts").iterdir())

    def test_it_is_built_once_and_kept_by_content(self, folder: Path) -> None:
        ids, stages = self.read(folder)
        assert stages
        again, untold = self.read(folder)
        assert again == ids
        assert not untold
        assert len(self.kept()) == 1
        (folder / "a.txt").write_text("w1 w2 w4\n")
        changed, told = self.read(folder)
        assert told
        assert changed != ids
        assert len(self.kept()) == 2

    def test_a_damaged_one_is_made_again(self, folder: Path) -> None:
        ids, _ = self.read(folder)
        (path,) = self.kept()
        for content in (b"", b"nonsense", path.read_bytes()[:-4]):
            path.write_bytes(content)
            again, stages = self.read(folder)
            assert again == ids
            assert stages

    def test_only_the_newest_are_kept(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(draft_texts, "MOST_KEPT", 2)
        for number in range(4):
            (folder / "a.txt").write_text(f"w{number} w9\n")
            self.read(folder)
        assert len(self.kept()) == 2

    def test_where_it_cannot_be_kept_that_is_said_and_it_serves(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(draft_texts, "save_file", refuse)
        index, sentence = read_index([str(folder)], self.tokenizer)
        assert index.ids.size
        assert "read again next time" in sentence
        assert sentence.endswith("Permission denied")
