"""Our checkpoints of every architecture of the lean decoder in GPTQModel, as `inspect` says which it loads."""

from pathlib import Path

import pytest
import torch
from interop.family_cases import EXPORTED, FAILING, FIRST, Verifiers, are_ours, says
from interop.interop_cases import logits_of, missing, our_logits, quantize_with_gptqmodel

from quasar_core.api.exporting import export
from quasar_core.checkpoint.reader import VerifierCheckpoint

pytest_plugins = ["interop.family_cases"]
pytestmark = [pytest.mark.interop, missing("optimum", "gptqmodel"), pytest.mark.usefixtures("eagerly")]


def gives_ours(folder: Path, ours: torch.Tensor) -> bool:
    """Whether GPTQModel loads a checkpoint, and passes it as we do."""
    from gptqmodel import BACKEND, GPTQModel

    try:
        loaded = GPTQModel.load(str(folder), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16)
        return are_ours(logits_of(loaded.model.float()), ours)
    except (ValueError, AttributeError):
        return False


@pytest.mark.parametrize("family", sorted(FIRST.keys() - FAILING))
def test_gptqmodel_loads_what_inspect_says(family: str, verifiers: Verifiers) -> None:
    folder = verifiers.of(family)
    said = says("GPTQModel", folder)
    assert gives_ours(folder, our_logits(folder)) == (said == "yes"), said
    assert said.endswith("`quasar models export` writes what it loads") == (family in EXPORTED)


@pytest.mark.parametrize("family", sorted(EXPORTED))
def test_gptqmodel_loads_what_is_exported(family: str, tmp_path: Path, verifiers: Verifiers) -> None:
    folder = verifiers.of(family)
    exported = Path(export(str(folder), tmp_path / "exported")["checkpoint"])
    assert says("GPTQModel", exported) == "yes"
    assert gives_ours(exported, our_logits(folder))


@pytest.mark.parametrize("family", ["Phi3", "Glm4", "Mixtral"])
def test_what_gptqmodel_writes_is_read_here(family: str, tmp_path: Path, verifiers: Verifiers) -> None:
    """Under its own names."""
    source = verifiers.of(family).parent / "tiny"
    theirs = logits_of(quantize_with_gptqmodel(source, tmp_path / "theirs", {"format": "gptq"}).float())
    checkpoint = VerifierCheckpoint(tmp_path / "theirs")
    assert checkpoint.layer_names == VerifierCheckpoint(verifiers.of(family)).layer_names
    assert checkpoint.file_layers != checkpoint.layer_names
    assert are_ours(theirs, our_logits(tmp_path / "theirs"))
