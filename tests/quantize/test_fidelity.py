"""Fidelity figures by hand, on models whose logits are written down."""

import math
import statistics
from dataclasses import asdict, replace

import pytest
import torch
from helpers.tiny_models import LastTokenModel, quantized_copy, random_model

from quasar_core.quantize import fidelity
from quasar_core.quantize.fidelity import (
    KINDS,
    Tally,
    kernel_divergence,
    kl_divergence,
    margin_table,
    margins,
    measure_fidelity,
)
from quasar_core.records import FidelityReport, MarginTable


def test_divergence_and_overlap_by_hand() -> None:
    """p = (½, ½), q = (¼, ¾): KL = ½ ln 2 + ½ ln ⅔ = ½ ln 4⁄3; Σ min = ¼ + ½."""
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert kl_divergence(p, q).tolist() == pytest.approx([0.5 * math.log(4 / 3)])
    assert kl_divergence(p + 3, q - 5).tolist() == pytest.approx([0.5 * math.log(4 / 3)], abs=1e-6)
    tally = Tally()
    tally.add(p, q, torch.tensor([1]), 1)
    assert tally.overlap[0].tolist() == pytest.approx([0.75])
    assert tally.kl[0].tolist() == pytest.approx([0.5 * math.log(4 / 3)])
    assert (tally.target_nll, tally.verifier_nll) == pytest.approx((math.log(2), math.log(4 / 3)))
    assert kl_divergence(p, p).tolist() == [0]


def test_margins_are_differences_of_the_two_best() -> None:
    assert margins(torch.tensor([[1.0, 5.0, 3.0], [2.0, 2.0, 0.0]])).tolist() == [2, 0]


def test_rows_are_compared_a_few_at_a_time_with_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one by one, against each value by its formula."""
    p, q = (torch.randn(23, 301, generator=torch.Generator().manual_seed(seed)) * 3 for seed in (0, 1))
    tokens = torch.arange(23) * 7
    monkeypatch.setattr(fidelity, "COMPARED_VALUES", 5 * 301)
    tally = Tally()
    tally.add(p, q, tokens, 4)
    torch.testing.assert_close(torch.cat(tally.kl), kl_divergence(p, q))
    torch.testing.assert_close(torch.cat(tally.overlap), torch.minimum(p.softmax(-1), q.softmax(-1)).sum(-1))
    assert torch.equal(torch.cat(tally.agreed), p.argmax(-1) == q.argmax(-1))
    best = q.topk(2).values
    assert torch.equal(torch.cat(tally.margin), best[:, 0] - best[:, 1])
    nll = torch.nn.functional.cross_entropy
    expected = [nll(logits, tokens, reduction="sum").item() for logits in (p, q)]
    assert [tally.target_nll, tally.verifier_nll] == pytest.approx(expected, rel=1e-5)
    assert torch.cat(tally.positions).tolist() == list(range(4, 27))


def test_margin_table_by_hand() -> None:
    """Margins 1 to 8 in four bins: quantiles of 1⁄16, 4⁄16 and 9⁄16, interpolated; disagreement at 1, 2 and 4."""
    margin = torch.tensor([8.0, 1, 2, 3, 4, 5, 6, 7])
    agreed = torch.tensor([True, False, False, True, False, True, True, True])
    table = margin_table(margin, agreed, bins=4)
    assert table.edges == [1.4375, 2.75, 4.9375]
    assert table.counts == [1, 1, 2, 4]
    assert table.agreed == [0, 0, 1, 4]


def test_equal_margins_make_one_bin() -> None:
    table = margin_table(torch.full((6,), 2.0), torch.tensor([True] * 5 + [False]))
    assert table.edges == [2]
    assert (table.counts, table.agreed) == ([0, 6], [0, 5])


def test_ties_have_no_bin_of_their_own_below_the_others() -> None:
    """In 16 bits logits tie often, as SmolLM2's do."""
    margin = torch.tensor([0.0] * 4 + [float(i) for i in range(1, 9)])
    table = margin_table(margin, margin > 0, bins=4)
    assert (table.edges, table.counts, table.agreed) == ([3.1875], [7, 5], [3, 5])
    assert margin_table(torch.zeros(3), torch.tensor([True] * 3)).counts == [3]


def test_reports_of_before_with_an_edge_at_0_are_read() -> None:
    assert MarginTable(edges=[0.0, 1.0], counts=[0, 2, 1], agreed=[0, 1, 1]).edges == [0.0, 1.0]
    with pytest.raises(ValueError, match="ascend"):
        MarginTable(edges=[math.nan], counts=[0, 2], agreed=[0, 1])


def test_a_report_by_hand() -> None:
    """Two tokens. After 0 the target has (0.6, 0.4) and the verifier (0.3, 0.7); after 1 both have (0.1, 0.9).

    Held out: 0 1 1, so one position after 0 and one after 1. Target: −ln 0.4 − ln 0.9; verifier: −ln 0.7 − ln 0.9.
    Greedy: 1 1 0 0 1, of which the first 3 tokens do not count: two positions, after 0 and after 0.
    """
    target = LastTokenModel([[0.6, 0.4], [0.1, 0.9]])
    verifier = LastTokenModel([[0.3, 0.7], [0.1, 0.9]])
    seen: list[tuple[str, int, int]] = []
    report = measure_fidelity(
        target,
        verifier,
        target.new_cache(8),
        held_out=torch.tensor([[0, 1, 1]]),
        greedy=torch.tensor([[1, 1, 0, 0, 1]]),
        greedy_from=3,
        text_name="two tokens",
        progress=lambda *call: seen.append(call),
    )
    divergence = 0.6 * math.log(0.6 / 0.3) + 0.4 * math.log(0.4 / 0.7)
    assert (report.text, report.tokens) == ("two tokens", 2)
    assert (report.agreement, report.agreement_sampled) == (0, 0.5)
    assert report.overlap == pytest.approx((0.7 + 1) / 2)
    assert report.kl_mean == pytest.approx(divergence / 2, rel=1e-5)
    assert report.kl_p99 == pytest.approx(0.99 * divergence, rel=1e-5)
    assert report.perplexity_target == pytest.approx((0.4 * 0.9) ** -0.5)
    assert report.perplexity_verifier == pytest.approx((0.7 * 0.9) ** -0.5)
    assert report.margins.edges == pytest.approx([math.log(0.7 / 0.3)], rel=1e-5)
    assert (sum(report.margins.counts), sum(report.margins.agreed)) == (2, 0)
    assert seen == [("measuring fidelity", done, 2) for done in (0, 1, 2)]


def test_a_verifier_that_is_the_target_is_faithful() -> None:
    target = random_model("qwen3")
    rows = torch.randint(97, (3, 20), generator=torch.Generator().manual_seed(0))
    report = measure_fidelity(target, target, target.new_cache(20), rows, rows, 5, "self")
    assert (report.agreement, report.agreement_sampled) == (1, 1)
    assert (report.kl_mean, report.kl_p99) == pytest.approx((0, 0), abs=1e-6)
    assert report.overlap == pytest.approx(1)
    assert report.perplexity_target == report.perplexity_verifier
    assert report.tokens == 3 * 19
    assert sum(report.margins.counts) == sum(report.margins.agreed) == 3 * 15


def test_more_bits_are_more_faithful() -> None:
    """On the mean of three models; an error of a sixteenth is 1 ÷ 256 of the divergence, before it saturates."""
    rows = torch.randint(97, (4, 30), generator=torch.Generator().manual_seed(0))

    def divergence(name: str, bits: int) -> float:
        target, verifier = random_model(name), quantized_copy(name, bits)
        return measure_fidelity(target, verifier, target.new_cache(30), rows, rows, 5, "self").kl_mean

    two, four, eight = (statistics.mean(divergence(n, bits) for n in ("llama", "qwen2", "qwen3")) for bits in (2, 4, 8))
    assert 0 < eight < 0.1 * four
    assert four < two


def test_slices_by_hand() -> None:
    """After 0 the two disagree and diverge, after 1 they are equal. Rows of 17: positions 1 to 15, and 16."""
    target = LastTokenModel([[0.6, 0.4], [0.1, 0.9]])
    verifier = LastTokenModel([[0.3, 0.7], [0.1, 0.9]])
    divergence = 0.6 * math.log(0.6 / 0.3) + 0.4 * math.log(0.4 / 0.7)
    row = [0, 1, 1, 1, 0, *[1] * 10, 0, 1]  # 0 stands at 0, 4 and 15; what follows it is at 1, 5 and 16
    kinds = torch.tensor([KINDS.index("digits"), KINDS.index("letters")])
    report = measure_fidelity(target, verifier, target.new_cache(20), torch.tensor([row]), None, 1, "x", kinds=kinds)
    first, second = report.by_position
    assert [part.name for part in report.by_position] == ["1 to 15", "16 to 31"]
    assert (first.tokens, first.agreement) == (15, pytest.approx(13 / 15))
    assert first.kl_mean == pytest.approx(2 * divergence / 15, rel=1e-5)
    assert (second.tokens, second.agreement) == (1, 0)
    letters, digits = report.by_kind
    assert [letters.name, digits.name] == ["letters", "digits"]
    assert (letters.tokens, digits.tokens) == (14, 2)
    assert letters.kl_mean == pytest.approx(3 * divergence / 14, rel=1e-5)
    assert digits.kl_mean == pytest.approx(0, abs=1e-7)
    assert report.agreement == report.agreement_sampled == pytest.approx(13 / 16)
    assert sum(report.margins.counts) == 16


def test_the_price_of_a_kernel_by_hand() -> None:
    """On the token after 0, unpacked weights disagree with the target and the kernel does not."""
    target = LastTokenModel([[0.6, 0.4], [0.1, 0.9]])
    exact, in_use = LastTokenModel([[0.3, 0.7], [0.1, 0.9]]), LastTokenModel([[0.55, 0.45], [0.1, 0.9]])
    price = kernel_divergence(target, exact, in_use, target.new_cache(4), torch.tensor([[0, 1, 1]]), "a kernel")
    assert (price.kernel, price.tokens, price.agreement_exact, price.agreement) == ("a kernel", 2, 0.5, 1)
    divergence = 0.6 * math.log(0.6 / 0.55) + 0.4 * math.log(0.4 / 0.45)
    assert price.kl_mean == pytest.approx(divergence / 2, rel=1e-4)
    assert price.kl_mean_exact > price.kl_mean


def test_a_report_reads_back_and_an_older_one_too() -> None:
    target = LastTokenModel([[0.6, 0.4], [0.1, 0.9]])
    kinds = torch.tensor([0, 1])
    report = measure_fidelity(target, target, target.new_cache(4), torch.tensor([[0, 1, 1]]), None, 1, "x", kinds=kinds)
    price = kernel_divergence(target, target, target, target.new_cache(4), torch.tensor([[0, 1, 1]]), "dense")
    content = asdict(replace(report, in_use=price))
    assert FidelityReport.from_dict(content) == replace(report, in_use=price)
    older = {name: value for name, value in content.items() if name not in ("by_position", "by_kind", "in_use")}
    read = FidelityReport.from_dict(older)
    assert (read.by_position, read.by_kind, read.in_use) == ([], [], None)
