"""Drafters by the names of the command line, those of other packages too."""

from pathlib import Path

import pytest

from quasar_core.config import GenerationConfig, registered_drafters
from quasar_core.draft.auto import AutoDrafter
from quasar_core.draft.automaton import SuffixAutomaton
from quasar_core.draft.make import Sources, make_drafter
from quasar_core.draft.memory import MemoryDrafter
from quasar_core.draft.ngram import NgramDrafter
from quasar_core.draft.none import NoDrafter
from quasar_core.draft.plugins import load_plugin
from quasar_core.draft.prediction import PredictionDrafter
from quasar_core.draft.suffix import SuffixDrafter
from quasar_core.draft.texts import TextIndex, TextsDrafter
from quasar_core.errors import QuasarError, UsageError

GOOD = """
from quasar_core.draft import Draft, Drafter

class Good(Drafter):
    def observe(self, tokens): pass
    def forget(self, count): pass
    def propose(self, limit, after=()): return Draft.of([1, 2][:limit], "good", 1)

class Lacking(Drafter):
    observe = forget = propose = None

class Stranger:
    observe = forget = propose = print

def broken():
    raise RuntimeError("no licence")
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that registers drafters, as pip installs it."""
    (tmp_path / "some_drafters.py").write_text(GOOD)
    info = tmp_path / "some_drafters-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-drafters\nVersion: 1.0\n")
    names = {"good": "Good", "lacking": "Lacking", "stranger": "Stranger", "broken": "broken", "gone": "Gone"}
    entries = [f"{name} = some_drafters:{value}\n" for name, value in names.items()]
    (info / "entry_points.txt").write_text("[quasar.drafters]\n" + "".join(entries))
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("draft", "kind"),
    [("none", NoDrafter), ("ngram", NgramDrafter), ("suffix", SuffixDrafter), ("auto", SuffixDrafter)],
)
def test_drafters_are_made_by_name(draft: str, kind: type) -> None:
    assert type(make_drafter(GenerationConfig(draft=draft), Sources())) is kind


def test_the_sizes_of_the_command_line_reach_the_drafter() -> None:
    drafter = make_drafter(GenerationConfig(draft="ngram", ngram_min=2, ngram_max=4), Sources())
    assert isinstance(drafter, NgramDrafter)
    assert list(drafter.sizes) == [4, 3, 2]


def test_each_source_joins_with_a_drafter_and_what_was_learned_is_shared() -> None:
    sources = Sources(texts=TextIndex.build([[1, 2]]), memory=SuffixAutomaton())
    drafter = make_drafter(GenerationConfig(draft="ngram"), sources, expected=[1, 2])
    assert isinstance(drafter, AutoDrafter)
    assert [type(one) for one in drafter.drafters] == [PredictionDrafter, NgramDrafter, TextsDrafter, MemoryDrafter]
    assert drafter.acceptance is sources.acceptance


def test_a_name_that_nobody_registers_is_refused_and_the_known_ones_are_listed() -> None:
    with pytest.raises(UsageError, match=r"--draft must be one of auto, none, ngram, suffix.*, not unheard-of"):
        GenerationConfig(draft="unheard-of")
    with pytest.raises(UsageError, match="no installed package"):
        load_plugin("unheard-of")


@pytest.mark.usefixtures("package")
def test_a_registered_drafter_is_made_by_its_name() -> None:
    assert {"good", "broken"} <= set(registered_drafters())
    drafter = make_drafter(GenerationConfig(draft="good"), Sources())
    assert drafter.propose(1).tokens == (1,)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("broken", "no licence"),
        ("gone", "could not be loaded"),
        ("lacking", "has no observe, forget, propose"),
        ("stranger", "does not inherit from quasar_core.draft.Drafter"),
    ],
)
def test_one_that_is_no_drafter_is_refused_with_the_reason(name: str, why: str) -> None:
    with pytest.raises(QuasarError, match=f"The drafter {name} .*{why}"):
        make_drafter(GenerationConfig(draft=name), Sources())


@pytest.mark.parametrize("option", [{"draft_from": ("x",)}, {"prediction": "x"}])
def test_what_drafts_are_made_from_needs_drafts(option: dict) -> None:
    with pytest.raises(UsageError, match="leave --draft none out"):
        GenerationConfig(draft="none", **option)
