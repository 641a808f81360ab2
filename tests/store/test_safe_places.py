"""What is never replaced, emptied or removed: the target, and every file and folder that quasar did not write."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.decoder_cases import save_model as save_decoder
from helpers.folders import contents
from helpers.quantize_cases import CONFIG, quantize
from helpers.verifier_cards import write_card

from quasar_cli.main import run
from quasar_core import store
from quasar_core.api import quantizing
from quasar_core.errors import QuasarError, UsageError
from quasar_core.quantize import run as quantize_run
from quasar_core.store import folders
from quasar_core.store.folders import relate, remove_verifier
from tools.demo import grow, train

pytest_plugins = ["helpers.quantize_fixtures"]


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("load_calibration", "quantize_with", "assemble"):
        monkeypatch.setattr(quantize_run, name, lambda *_, **__: pytest.fail("work was begun"))


def texts(folder: Path) -> Path:
    """A folder of somebody's texts."""
    (folder / "chapter").mkdir(parents=True)
    (folder / "chapter" / "one.txt").write_text("mine")
    return folder


# quantize


def _itself(source: Path) -> Path:
    return source


def _through_a_link(source: Path) -> Path:
    (source.parent / "link").symlink_to(source)
    return source.parent / "link"


def _spelled_another_way(source: Path) -> Path:
    """As a file system that ignores case finds the same folder."""
    (source.parent / "TINY").symlink_to(source)
    return source.parent / "TINY" / ".." / "TINY" / "."


def _by_dots(source: Path) -> Path:
    return source.parent / "tiny" / ".." / "tiny"


def _what_holds_it(source: Path) -> Path:
    return source.parent


def _what_holds_it_and_a_card(source: Path) -> Path:
    write_card(source.parent)
    return source.parent


def _inside(source: Path) -> Path:
    return source / "verifier"


def _deep_inside(source: Path) -> Path:
    return _through_a_link(source) / "a" / "b"


def _whose_work_would_lie_there(source: Path) -> Path:
    source.rename(source.with_name("x.partial"))
    return source.with_name("x")


def _that_would_be_set_aside_there(source: Path) -> Path:
    source.rename(source.with_name("x.replaced-by-quasar"))
    return source.with_name("x")


OVERLAPS: list[Callable[[Path], Path]] = [
    _itself,
    _through_a_link,
    _spelled_another_way,
    _by_dots,
    _what_holds_it,
    _what_holds_it_and_a_card,
    _inside,
    _deep_inside,
    _whose_work_would_lie_there,
    _that_would_be_set_aside_there,
]


@pytest.mark.parametrize("place", OVERLAPS)
@pytest.mark.usefixtures("no_work")
def test_an_output_that_overlaps_the_target_is_refused_before_any_work(
    source: Path, place: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    output = place(source)
    model = next(path for path in source.parent.iterdir() if (path / "config.json").exists() and not path.is_symlink())
    before = contents(source.parent)
    for force in (True, False):
        with pytest.raises(UsageError, match=r"(is|holds|lies in) the model .*: name another --output"):
            quantize(model, output=output, force=force)
    with pytest.raises(UsageError, match="name another --output"):
        quantizing.estimate(str(model), CONFIG, output=output, device="cpu")
    for extra in (["--force"], ["--dry-run"], ["--force", "--dry-run"]):
        assert run(["quantize", str(model), "--output", f"{output}/", *extra]) == 2
        assert "name another --output" in " ".join(capsys.readouterr().err.split())
    assert contents(source.parent) == before


@pytest.mark.parametrize("card", [None, "{}", "[]", "{", '{"format_version": 1}', '{"name": "a quasar project"}'])
@pytest.mark.usefixtures("no_work")
def test_a_folder_that_quasar_did_not_write_is_never_replaced(source: Path, card: str | None) -> None:
    output = texts(source.parent / "thesis")
    if card is not None:
        (output / "quasar.json").write_text(card)
    before = contents(output)
    for force in (True, False):
        with pytest.raises(UsageError, match="thesis exists and is no verifier that quasar wrote"):
            quantize(source, output=output, force=force)
    with pytest.raises(UsageError, match="thesis exists and is no verifier"):
        quantizing.estimate(str(source), CONFIG, output=output, device="cpu")
    assert contents(output) == before


@pytest.mark.usefixtures("no_work")
def test_a_place_without_a_name_is_refused(source: Path) -> None:
    with pytest.raises(UsageError, match="no place for a verifier"):
        folders.refuse_place(Path("/"), source)


def test_a_file_and_a_dead_link_are_never_replaced(source: Path) -> None:
    (source.parent / "file").write_text("mine")
    with pytest.raises(UsageError, match="file exists and is no verifier"):
        quantize(source, output=source.parent / "file", force=True)
    assert (source.parent / "file").read_text() == "mine"


@pytest.mark.usefixtures("no_work")
def test_a_folder_in_the_place_of_unfinished_work_is_not_emptied(source: Path) -> None:
    texts(source.parent / "x.partial")
    with pytest.raises(UsageError, match=r"x\.partial is where unfinished work would lie, and holds something else"):
        quantize(source, output=source.parent / "x")
    with pytest.raises(UsageError, match="holds something else"):
        quantize(source, output=source.parent / "x", resume=False)
    assert contents(source.parent / "x.partial") == {"chapter/one.txt": b"mine"}


def test_an_empty_folder_is_filled_with_force(source: Path) -> None:
    (source.parent / "new").mkdir()
    quantize(source, output=source.parent / "new", force=True)
    assert (source.parent / "new" / "quasar.json").is_file()
    assert not list(source.parent.glob("*.replaced-by-quasar"))


def test_how_folders_lie_to_each_other(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / "link").symlink_to(inner)
    assert relate(tmp_path / "link", inner) == "is"
    assert relate(tmp_path / "a" / "b" / ".." / "b", inner) == "is"
    assert relate(tmp_path / "a", tmp_path / "link") == "holds"
    assert relate(tmp_path / "link" / "new" / "deep", tmp_path / "a") == "lies in"
    assert relate(tmp_path / "a" / "b2", inner) is None
    assert relate(tmp_path / "a" / "new", tmp_path / "a" / "gone") is None


# models remove


def test_only_a_verifiers_own_files_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "v"
    texts(folder)
    write_card(folder)
    for name in ("config.json", "model.safetensors", "model-00001-of-00002.safetensors", "adapter.safetensors"):
        (folder / name).write_text(name)
    store.record_pair("demo", folder)
    assert run(["models", "remove", "v", "--yes"]) == 0
    assert contents(folder) == {"chapter/one.txt": b"mine", "adapter.safetensors": b"adapter.safetensors"}
    assert store.list_pairs() == []


@pytest.mark.parametrize("as_target", [False, True])
def test_a_target_and_a_link_are_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_target: bool) -> None:
    folder = texts(tmp_path / "v")
    write_card(folder)
    store.record_pair(str(folder) if as_target else "demo", folder)
    if not as_target:
        folder.rename(tmp_path / "moved")
        folder.symlink_to(tmp_path / "moved")
    before = contents(folder)
    with pytest.raises(QuasarError, match="so it is not deleted; `quasar models remove v --keep-files` forgets"):
        store.remove_pair("v", delete_files=True)
    assert contents(folder) == before
    assert [pair.name for pair in store.list_pairs()] == ["v"]


def test_a_removal_that_was_interrupted_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "v"
    folder.mkdir()
    write_card(folder)
    for name in ("config.json", "README.md", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("")
    unlink, left = Path.unlink, iter(range(2))

    def stopped(path: Path, missing_ok: bool = False) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stopped)
        with pytest.raises(KeyboardInterrupt):
            remove_verifier(folder)
    assert (folder / "quasar.json").exists()
    assert remove_verifier(folder)
    assert not folder.exists()


@pytest.mark.parametrize("left", [0, 1, 2, 3, 4, 5])
def test_every_removal_that_was_interrupted_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    """Of work in progress, of what it leaves in a verifier, of a verifier that was set aside, of a pair's verifier."""
    monkeypatch.setenv("QUASAR_HOME", str(tmp_path / "home"))
    partial, output = folders.partial_folder(tmp_path / "x"), tmp_path / "x"
    aside, paired = folders.replaced_folder(output), tmp_path / "paired"
    for folder in (partial, output, aside, paired):
        (folder / "commits").mkdir(parents=True)
        for name in ("lock", "config.json", "README.md", "commits/identity.json", "commits/block-00000.safetensors"):
            (folder / name).touch()
        if folder != partial:
            write_card(folder)
    store.record_pair("demo", paired)
    removals = [
        lambda: folders.begin_work(partial),
        lambda: folders.clear_commits(output),
        lambda: [remove_verifier(place) for place in folders.set_aside_before(output)],
        lambda: store.remove_pair("paired", delete_files=True),
    ]
    for removal in removals:
        with monkeypatch.context() as patch:
            stop_after(patch, left)
            with contextlib.suppress(KeyboardInterrupt):
                removal()
        if store.list_pairs() or removal is not removals[-1]:
            removal()
    assert os.listdir(partial) == ["lock"]
    assert sorted(os.listdir(output)) == ["README.md", "config.json", "lock", "quasar.json"]
    assert not aside.exists()
    assert not paired.exists()


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let so many files and folders be removed, and no more."""
    left = iter(range(count))

    def limit(name: str) -> None:
        original = getattr(os, name)

        def removing(*args: object, **options: object) -> object:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return original(*args, **options)

        monkeypatch.setattr(os, name, removing)

    for name in ("unlink", "rmdir"):
        limit(name)


# grow, train


def test_growing_touches_nothing_that_is_there(tmp_path: Path) -> None:
    save_decoder(tmp_path / "small", "Qwen3", {"head_dim": 32, "tie_word_embeddings": True})
    texts(tmp_path / "grown.partial")
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="holds something else"):
        grow.grow(tmp_path / "small", {}, tmp_path / "grown")
    with pytest.raises(UsageError, match="lies in the model"):
        grow.grow(tmp_path / "small", {}, tmp_path / "small" / "grown")
    assert contents(tmp_path) == before


def test_training_refuses_a_folder_that_is_there(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="exists; name another folder"):
        train.refuse_output(texts(tmp_path / "mine"))
    texts(tmp_path / "new.partial")
    with pytest.raises(UsageError, match="holds something else"):
        train.refuse_output(tmp_path / "new")


def test_the_target_is_only_read(source: Path) -> None:
    before = contents(source)
    quantize(source)
    assert contents(source) == before
