"""What the study compares beside the solver: a low-rank correction, scales by distillation; and its table."""

import pytest
import torch
from helpers.layers import make_hessian, make_layer
from helpers.tiny_models import random_model

from quasar_core.checkpoint.gptq_format import QuantizedWeight
from quasar_core.quantize.fidelity import kl_divergence
from quasar_core.quantize.solve.gptq import SolverConfig, solve
from tools.study import study
from tools.study.distill import distill_scales
from tools.study.lowrank import low_rank_part, rank_of_bytes


def test_full_rank_is_the_error_itself() -> None:
    error, inputs = make_layer(12, 16)
    torch.testing.assert_close(low_rank_part(error, make_hessian(inputs), 12), error, rtol=0, atol=2e-2)


def test_a_low_rank_leaves_the_least_error_in_the_outputs() -> None:
    """Eckart and Young: the squared singular values of E H^½ that are left out; no plain SVD does as well."""
    error, inputs = make_layer(12, 16)
    hessian = make_hessian(inputs)
    left, sizes, right = torch.linalg.svd(error)
    plain = (left[:, :3] * sizes[:3]) @ right[:3]

    def missed(part: torch.Tensor) -> float:
        rest = error - part
        return ((rest @ hessian) * rest).sum().item()

    values, vectors = torch.linalg.eigh(hessian)
    least = torch.linalg.svdvals(error @ vectors * values.clamp_min(0).sqrt())[3:].square().sum().item()
    assert missed(low_rank_part(error, hessian, 3)) == pytest.approx(least, rel=2e-2)
    assert least < missed(plain)


def test_a_rank_by_its_bytes() -> None:
    """Two factors of rank 8 in float16 for 256 × 256: 2 · 8 · 512 bytes, as one bit of each weight takes."""
    assert rank_of_bytes(256 * 256 // 8, 256, 256) == 8


def quantized(name: str) -> dict[str, QuantizedWeight]:
    """Every layer of the blocks, rounded under an identity as Hessian."""
    model = random_model(name).model
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n}
    config = SolverConfig(bits=3, group_size=32)
    return {n: solve(m.weight.detach(), torch.eye(m.in_features), config, n).weight for n, m in layers.items()}


@pytest.mark.parametrize("name", ["llama", "qwen3"], ids=["untied", "tied"])
def test_distilled_scales_lower_the_divergence_that_they_are_fitted_to(name: str) -> None:
    with torch.inference_mode():
        random_model.cache_clear()
        model, weights = random_model(name).model, quantized(name)
    random_model.cache_clear()
    rows = torch.randint(97, (16, 24), generator=torch.Generator().manual_seed(0))
    fitted = distill_scales(model, weights, rows, epochs=3)

    @torch.no_grad()
    def divergence(dense: dict[str, torch.Tensor]) -> float:
        other = study.with_weights(model, dense)
        return kl_divergence(model(rows).logits.flatten(0, 1), other(rows).logits.flatten(0, 1)).mean().item()

    before = divergence({name: weight.dequantize() for name, weight in weights.items()})
    assert 0 < divergence(fitted) < before


def test_the_table_has_a_row_for_each_variant(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(study.Study, "open", lambda model, *rest: study.Study(model, random_model("llama"), {}))

    def run(self: study.Study, variant: study.Variant) -> study.Outcome:
        return study.Outcome(self.name, variant.name, variant.solver.damp, 0.2, 0.9, 0.95, 12_345, 7.0)

    monkeypatch.setattr(study.Study, "run", run)
    study.run_study(["a", "b"], 8, 0, "text.txt", ["damping"])
    lines = capsys.readouterr().out.splitlines()
    rest = "| 0.2000 | 0.9000 | 0.9500 | 12,345 | 7 |"
    damped = [f"damping 0.01 | 0.01000 {rest}", f"damping 0.1 | 0.10000 {rest}"]
    assert lines[2:] == [f"| {model} | {row}" for model in ("a", "b") for row in damped]
    assert len(lines[0].split("|")) == len(lines[1].split("|")) == len(lines[2].split("|"))
    assert "foreign text" in [variant.name for variant in study.variants("text.txt")]
