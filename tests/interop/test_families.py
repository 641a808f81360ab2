"""Our checkpoints of every architecture of the lean decoder in GPTQModel, as `inspect` says which it loads."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.decoder_cases import CASES, save_model
from helpers.tiny_model import save_tiny_model
from interop.interop_cases import VOCABULARY, logits_of, missing, our_logits, quantize

from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.models.describe import describe

pytestmark = [pytest.mark.interop, missing("optimum", "gptqmodel")]
FIRST = {family: case for case, (family, _) in reversed(CASES.items())}  # of each family's cases
FIRST["Gemma4 with experts"] = "gemma 4, experts"
# GPTQModel 7.6 loads the first, and its pass fails: the router's output is a tuple there. The other it has as a
# multimodal model alone, with a processor, as transformers has.
FAILING = {"Glm4Moe", "MuseGlimmer"}
# In float16, in which a router may also choose another expert for a token or two.
TOLERANCE, TOKENS = 0.02, 0.9


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """GPTQModel compiles its dequantization, which would take half a minute a model."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("family", sorted(FIRST.keys() - FAILING))
def test_gptqmodel_loads_what_inspect_says(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptqmodel import BACKEND, GPTQModel

    source = tmp_path / "tiny"
    save_tiny_model(source)
    name, options = CASES[FIRST[family]]
    save_model(source, name, {**options, "vocab_size": VOCABULARY})
    folder = quantize(monkeypatch, source, group_size=32)
    ours = our_logits(folder)
    says = describe(VerifierCheckpoint(folder))["loaders"]["GPTQModel"]
    try:
        loaded = GPTQModel.load(str(folder), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16)
        error = (logits_of(loaded.model) - ours).abs().amax(dim=-1) / ours.abs().max()
        gives_ours = (error < TOLERANCE).float().mean().item() >= TOKENS
    except (ValueError, AttributeError):
        gives_ours = False
    assert gives_ours == (says == "yes"), says
