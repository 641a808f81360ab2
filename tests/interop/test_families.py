"""Our checkpoints of every architecture of the lean decoder in GPTQModel, as `inspect` says which it loads."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers.decoder_cases import CASES, save_model
from helpers.tiny_model import save_tiny_model
from interop.interop_cases import (
    VOCABULARY,
    logits_by_optimum,
    logits_of,
    missing,
    our_logits,
    quantize,
    quantize_with_gptqmodel,
)

from quasar_core.api.exporting import export
from quasar_core.checkpoint.gptqmodel_names import NAMINGS
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.models.describe import describe

pytestmark = [pytest.mark.interop, missing("optimum", "gptqmodel")]
FIRST = {family: case for case, (family, _) in reversed(CASES.items())}  # of each family's cases
FIRST["Gemma4 with experts"] = "gemma 4, experts"
FIRST["GraniteMoeHybrid with experts"] = "granite 4, experts"
FIRST["GraniteMoeHybrid without Mamba"] = "granite 4, attention alone"
FAILING = {"MuseGlimmer"}  # which it has as a multimodal model alone, with a processor, as transformers has
# GPTQModel dequantizes in float16; what it loads computes in float32, but a router may choose another expert for a
# token all the same.
TOLERANCE, TOKENS = 5e-3, 0.9
EXPORTED = {name.removesuffix("ForCausalLM").replace("Gemma4", "Gemma4 with experts") for name in NAMINGS}


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """GPTQModel compiles its dequantization, which would take half a minute a model."""
    with torch.compiler.set_stance("force_eager"):
        yield


class Verifiers:
    """Our checkpoints of families' tiny models, each made once.

    Mixtral's first: once GPTQModel has loaded one of some families, transformers writes it under other names.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.of("Mixtral")

    @cache  # noqa: B019 (of one object, which lives as long as the module's tests)
    def of(self, family: str) -> Path:
        place = self.folder / family.replace(" ", "-")
        save_tiny_model(place / "tiny")
        name, options = CASES[FIRST[family]]
        save_model(place / "tiny", name, {**options, "vocab_size": VOCABULARY})
        with pytest.MonkeyPatch.context() as patched:
            return quantize(patched, place / "tiny", group_size=32)


@pytest.fixture(scope="module")
def verifiers(tmp_path_factory: pytest.TempPathFactory) -> Verifiers:
    return Verifiers(tmp_path_factory.mktemp("families"))


def says(loader: str, folder: Path) -> str:
    return str(describe(VerifierCheckpoint(folder))["loaders"][loader])


def are_ours(theirs: torch.Tensor, ours: torch.Tensor) -> bool:
    """Whether logits [T, V] agree for nearly all tokens."""
    error = (theirs - ours).abs().amax(dim=-1) / ours.abs().max()
    return (error < TOLERANCE).float().mean().item() >= TOKENS


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
