"""Our checkpoints of every architecture of the lean decoder in transformers, by optimum, as `inspect` says.

Before the tests that GPTQModel itself loads them in: once it has loaded some families, transformers' classes have
experts apart in that process.
"""

from pathlib import Path

import pytest
from interop.family_cases import EXPORTED, FAILING, FIRST, Verifiers, are_ours, says
from interop.interop_cases import logits_by_optimum, missing, our_logits

from quasar_core.api.exporting import export

pytest_plugins = ["interop.family_cases"]
pytestmark = [pytest.mark.interop, missing("optimum", "gptqmodel"), pytest.mark.usefixtures("eagerly")]


@pytest.mark.parametrize("family", sorted(FIRST.keys() - FAILING))
def test_transformers_loads_what_inspect_says(family: str, tmp_path: Path, verifiers: Verifiers) -> None:
    """By optimum, the files as they are, and exported; it has what is stored as one layer as one."""
    folder = verifiers.of(family)
    ours = our_logits(folder)
    exported = [Path(export(str(folder), tmp_path / "exported")["checkpoint"])] if family in EXPORTED else []
    for checkpoint in (folder, *exported):
        said = says("transformers", checkpoint)
        try:
            found = are_ours(logits_by_optimum(checkpoint), ours)
        except (IndexError, ValueError, AttributeError):  # what was left unread is no group's number, for one
            found = False
        assert found == (said == "yes"), said
    assert not exported or said != "yes"
