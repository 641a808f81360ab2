"""Every Triton kernel against float64 on a GPU, at the sizes of a large model: `make test-gpu`."""

import os

import pytest
import torch

from quasar_core.kernels.triton.adapters import why_not_triton

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _kernels_of_a_gpu() -> None:
    """A GPU's own kernels are meant, so that a run which interprets them fails."""
    assert os.environ.get("TRITON_INTERPRET", "0") == "0", "kernels are interpreted: run `pytest -m gpu`"


@pytest.mark.gpu
def test_kernels_agree_with_float64_on_the_gpu() -> None:
    """One test, since cases are known only where there is a device to make their numbers on; all failures are told."""
    obstacle = "no GPU is here" if not torch.cuda.is_available() else why_not_triton(GPU, torch.bfloat16)
    if obstacle:
        pytest.skip(obstacle)
    from tools.gpu_bench.checks import correctness_cases

    wrong = {}
    for name, measure in correctness_cases(GPU, small=False):
        error, tolerance = measure()
        if not error <= tolerance:
            wrong[name] = error
    assert not wrong


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 4])
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(splits: int) -> None:
    """In tiles of 16 and of 64 rows: what plain equality of texts on a GPU rests on."""
    obstacle = "no GPU is here" if not torch.cuda.is_available() else why_not_triton(GPU, torch.bfloat16)
    if obstacle:
        pytest.skip(obstacle)
    from quasar_core.kernels.triton.blocks import Blocks
    from quasar_core.kernels.triton.products import multiply_dense

    generator = torch.Generator(GPU).manual_seed(0)
    weight, x = (torch.randn(n, 4096, device=GPU, generator=generator).bfloat16() for n in (6144, 40))
    blocks = Blocks(64, 128, splits, 4)
    out = {count: torch.empty(count, 6144, device=GPU, dtype=torch.bfloat16) for count in (1, 5, 16, 17, 40)}
    for count, place in out.items():
        multiply_dense(x[:count], weight, place, blocks=blocks)
    for count, place in out.items():
        assert torch.equal(place, out[40][:count]), count
