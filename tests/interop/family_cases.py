"""What the tests of all architectures share: our checkpoint of a small model of each, and when logits are ours."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers.decoder_cases import CASES, save_model
from helpers.tiny_model import save_tiny_model
from interop.interop_cases import VOCABULARY, quantize

from quasar_core.checkpoint.gptqmodel_names import NAMINGS
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.models.describe import describe

FIRST = {family: case for case, (family, _) in reversed(CASES.items())}  # of each family's cases
FIRST["Gemma4 with experts"] = "gemma 4, experts"
FIRST["GraniteMoeHybrid with experts"] = "granite 4, experts"
FIRST["GraniteMoeHybrid without Mamba"] = "granite 4, attention alone"
FAILING = {"MuseGlimmer"}  # which GPTQModel has as a multimodal model alone, with a processor, as transformers has
# GPTQModel dequantizes in float16; what it loads computes in float32, but a router may choose another expert for a
# token all the same.
TOLERANCE, TOKENS = 5e-3, 0.9
EXPORTED = {name.removesuffix("ForCausalLM").replace("Gemma4", "Gemma4 with experts") for name in NAMINGS}


class Verifiers:
    """Our checkpoints of families' tiny models, each made once.

    Mixtral's first: once GPTQModel has loaded one of some families, transformers writes it under other names.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.of("Mixtral")

    @cache  # noqa: B019 (of one object, which lives as long as all tests)
    def of(self, family: str) -> Path:
        place = self.folder / family.replace(" ", "-")
        save_tiny_model(place / "tiny")
        name, options = CASES[FIRST[family]]
        save_model(place / "tiny", name, {**options, "vocab_size": VOCABULARY})
        with pytest.MonkeyPatch.context() as patched:
            return quantize(patched, place / "tiny", group_size=32)


@pytest.fixture(scope="session")
def verifiers(tmp_path_factory: pytest.TempPathFactory) -> Verifiers:
    return Verifiers(tmp_path_factory.mktemp("families"))


@pytest.fixture
def eagerly() -> Iterator[None]:
    """GPTQModel compiles its dequantization, which would take half a minute a model."""
    with torch.compiler.set_stance("force_eager"):
        yield


def says(loader: str, folder: Path) -> str:
    return str(describe(VerifierCheckpoint(folder))["loaders"][loader])


def are_ours(theirs: torch.Tensor, ours: torch.Tensor) -> bool:
    """Whether logits [T, V] agree for nearly all tokens."""
    error = (theirs - ours).abs().amax(dim=-1) / ours.abs().max()
    return (error < TOLERANCE).float().mean().item() >= TOKENS
