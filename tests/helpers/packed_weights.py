"""Helpers of the tests."""

import torch

from quasar_core.checkpoint.gptq_format import QuantizedWeight, count_groups, trivial_groups


def random_codes(bits: int, rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**bits, (rows, columns), generator=generator).to(torch.uint8)


def make_weight(bits: int, in_features: int, out_features: int, group_size: int, seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = (count_groups(in_features, group_size), out_features)
    scales = torch.rand(groups, generator=generator) + 0.1
    zeros = torch.randint(1, 2**bits, groups, generator=generator)
    signs = torch.randint(2, groups, generator=generator) * 2 - 1
    return QuantizedWeight(
        bits,
        group_size,
        random_codes(bits, in_features, out_features, seed),
        (signs * scales).to(torch.float16),
        zeros.to(torch.int32),
        trivial_groups(in_features, group_size),
    )


def symmetric(weight: QuantizedWeight) -> QuantizedWeight:
    zeros = torch.full_like(weight.zeros, 2 ** (weight.bits - 1))
    return QuantizedWeight(weight.bits, weight.group_size, weight.codes, weight.scales, zeros, weight.g_idx)
