"""What `--backend optimum` does with and without the packages: these tests need neither."""

import importlib.util

import pytest
import torch

from quasar_core.config import QuantizeConfig
from quasar_core.errors import UsageError
from quasar_core.quantize.optimum_backend import check_optimum, read_weight, watch_blocks


def test_missing_packages_are_named_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"optimum and gptqmodel: run pip install 'quasar-cli\[gptqmodel\]'"):
        check_optimum(QuantizeConfig(backend="optimum"))


def test_a_quantized_head_is_refused() -> None:
    with pytest.raises(UsageError, match="--lm-head-bits needs --backend native"):
        check_optimum(QuantizeConfig(backend="optimum", lm_head_bits=8))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_read_off_a_rounded_weight(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (6, 64), generator=generator)
    zeros = torch.randint(1, 2**bits, (6, 2), generator=generator)
    scales = (torch.rand(6, 2, generator=generator) + 0.5).half().float()
    groups = torch.arange(64) // 32
    linear = torch.nn.Linear(64, 6, bias=False)
    linear.weight.data = scales[:, groups] * (codes - zeros[:, groups])
    weight = read_weight(linear, scales, zeros.float(), groups, QuantizeConfig(bits=bits, group_size=32))
    assert torch.equal(weight.codes.t().long(), codes)
    assert torch.equal(weight.zeros.t().long(), zeros)
    assert torch.equal(weight.scales.t().float(), scales)
    assert weight.has_trivial_groups


def test_a_zero_of_0_which_version_1_cannot_store_becomes_1() -> None:
    linear = torch.nn.Linear(4, 1, bias=False)
    linear.weight.data = torch.tensor([[0.0, 1.0, 2.0, 15.0]])
    groups = torch.zeros(4, dtype=torch.int64)
    weight = read_weight(linear, torch.ones(1, 1), torch.zeros(1, 1), groups, QuantizeConfig(group_size=-1))
    assert weight.zeros.item() == 1
    assert weight.dequantize().tolist() == [[0.0, 1.0, 2.0, 14.0]]


def test_each_block_is_reported_once_as_it_begins() -> None:
    blocks = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
    seen: list[tuple[str, int, int]] = []
    watch_blocks(blocks, lambda *report: seen.append(report))
    for block in blocks:
        block(torch.ones(1))
        block(torch.ones(1))
    assert seen == [("quantizing", 0, 2), ("quantizing", 1, 2)]
