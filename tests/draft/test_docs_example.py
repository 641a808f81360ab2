"""The drafter of docs/drafters.md, as a reader would register it."""

import re
from pathlib import Path

import pytest
from helpers.tiny_models import PROMPT, TableModel, make_pair

from quasar_core.config import GenerationConfig
from quasar_core.decode.generator import Generator

PAGE = (Path(__file__).parents[2] / "docs" / "drafters.md").read_text(encoding="utf-8")


def block(mark: str) -> str:
    (found,) = re.findall(rf"^<!-- {mark} -->\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return found


@pytest.fixture
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_package.py").write_text(block("drafter"))
    info = tmp_path / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    table, entry = block("entry point").strip().split("\n")
    group = re.fullmatch(r'\[project\.entry-points\."(.*)"\]', table)
    assert group is not None
    (info / "entry_points.txt").write_text(f"[{group[1]}]\n{entry.replace(chr(34), '')}\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("verify", ["full", "exact"])
def test_the_example_drafts_and_changes_no_text(verify: str) -> None:
    model = TableModel(8, 0)
    pair = make_pair(model, model.disturbed(0.3))

    def answer(draft: str) -> tuple:
        config = GenerationConfig(60, verify, draft, num_draft_tokens=4, window=4)  # type: ignore[arg-type]
        result = Generator(pair, config).generate([token % 8 for token in PROMPT])
        return result.token_ids, result.stats.drafters

    plain, unused = answer("none")
    drafted, used = answer("first-successor")
    assert drafted == plain
    assert not unused
    assert used["first-successor"].accepted > 0
