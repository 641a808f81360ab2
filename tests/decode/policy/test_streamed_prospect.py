"""What more bits would give where the target is streamed: the law of errors, and when it is spoken of."""

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.decoder_cases import CASES, CPU, FLOAT, save_model
from helpers.quantized_decoder import quantize_layers
from helpers.tiny_models import make_pair
from hypothesis import given
from hypothesis import strategies as st

from quasar_core.config import LoadOptions
from quasar_core.decode.costs.pass_costs import PairCosts, PassCost
from quasar_core.decode.policy.agreement import AgreementCurve, RunningAgreement
from quasar_core.decode.policy.lengths import plan_exact
from quasar_core.decode.policy.streamed_prospect import (
    Codes,
    Outlook,
    Room,
    changed,
    describe_expected,
    describe_more_bits,
    errors_left,
)
from quasar_core.models.loading import load_models
from quasar_core.models.memory.offload import plan_offload
from quasar_core.records import FidelityReport, KernelPrice, MarginTable

MARGINS = MarginTable([0.1, 0.5, 2.0], [100, 400, 1000, 2500], [60, 320, 930, 2490])
FIDELITY = FidelityReport("self", 4000, 0.95, 0.93, 0.9, 0.02, 0.1, 4.0, 4.1, MARGINS)
CODES = Codes([(800, 4.0), (200, 4.0)], head=100)
COSTS = PairCosts(PassCost((1, 33), (0.05, 0.1)), PassCost((1, 257), (0.4, 0.9)))


AGREEMENT = RunningAgreement(AgreementCurve(MARGINS))


def outlook(room: Room, codes: Codes = CODES, costs: PairCosts = COSTS) -> Outlook:
    return Outlook(codes, FIDELITY, room, costs, AGREEMENT, 0.0)


@given(st.floats(1e-5, 2), st.floats(0, 6), st.floats(0, 1))
def test_disagreements_halve_with_each_bit_but_for_what_the_kernel_adds(kl: float, more: float, added: float) -> None:
    assert errors_left(replace(FIDELITY, kl_mean=kl), more) == pytest.approx(2**-more)
    priced = replace(FIDELITY, in_use=KernelPrice("vnni", 500, kl, kl + added, 0.96, 0.95))
    assert 2**-more - 1e-9 <= errors_left(priced, more) <= 1
    assert errors_left(priced, 40) == pytest.approx((added / (kl + added)) ** 0.5, abs=1e-6)


def test_the_law_is_that_of_measured_verifiers() -> None:
    """Shares of sampled text at which the demo model disagreed with verifiers of 2, 3, 4 and 8 bits."""
    measured = {2: 0.2571, 3: 0.1250, 4: 0.0645, 8: 0.0039}
    for bits, wrong in measured.items():
        expected = measured[2] * errors_left(replace(FIDELITY, kl_mean=0.3473), bits - 2)
        assert wrong == pytest.approx(expected, rel=0.05)


def test_what_a_verifier_reads() -> None:
    codes = Codes([(800, 4.0), (200, 8.0)], head=100)
    assert (codes.bits, codes.size, codes.growth(8), codes.growth(6), codes.growth(4)) == (4.8, 700, 400, 200, 0)


def test_more_bits_are_weighed_where_memory_holds_them() -> None:
    room = Room(spare=10**9, staying=0, bandwidth=1e9)
    six, eight = outlook(room).wider()
    assert (six.bits, eight.bits, six.growth, eight.growth) == (6, 8, 250, 500)
    assert AGREEMENT.now.mean < six.agreement < eight.agreement
    assert 1 - eight.agreement == pytest.approx((1 - AGREEMENT.now.mean) / 16, rel=1e-3)
    none = Room(spare=300, staying=100, bandwidth=1e9)
    assert [one.bits for one in outlook(none).wider()] == [6]
    assert outlook(room, replace(CODES, layers=[(1000, 8.0)])).wider() == []
    assert outlook(room, replace(CODES, layers=[])).wider() == []


def test_what_no_longer_stays_is_read_at_each_confirm() -> None:
    """500 bytes more, of which 200 are spare: 300 of 10,000 a second."""
    free, full = Room(10**9, 300, 10000.0), Room(200, 300, 10000.0)
    dearer = replace(COSTS, confirm=PassCost((1, 257), (0.43, 0.93)))
    assert outlook(full).wider()[1].rate == pytest.approx(outlook(free, costs=dearer).wider()[1].rate)
    assert outlook(full).wider()[1].rate < outlook(free).wider()[1].rate


def test_costs_of_a_wider_verifier() -> None:
    costs = changed(COSTS, 1.5, 0.25)
    assert (costs.verify(1), costs.confirm(1), costs.confirm(257)) == (0.05 * 1.5, 0.65, 1.15)


def test_sentences() -> None:
    said = describe_expected(COSTS, 7.5, 0.956, measured=True)
    assert "a confirm takes 0.4 s and a verify 0.05 s, so about 7.5 tokens a second are expected" in said
    assert "0.956 of the verifier's tokens, as it did when the verifier was made" in said
    assert describe_expected(COSTS, 7.5, 0.9, measured=False).endswith("which was not measured")
    six, eight = outlook(Room(10**9, 0, 1e9)).wider()
    assert "quasar quantize MODEL --bits 8` makes it" in eight.describe()
    assert "quasar quantize MODEL --bits 6 --mixed` makes it" in six.describe()


def test_a_streamed_pair_is_told_what_more_bits_would_give(tmp_path: Path) -> None:
    """Of a verifier of 4 bits that the target rarely takes, where a confirm is dear; of one of 8 bits nothing."""
    save_model(tmp_path / "model", *CASES["llama"])
    plan = plan_offload(tmp_path / "model", None, FLOAT, 100, LoadOptions(verify="full", offload="target"))
    rarely = replace(FIDELITY, margins=MarginTable([], [1000], [800]))
    for bits, told in ((4, True), (8, False)):
        checkpoint = quantize_layers(
            tmp_path / "model", tmp_path / f"{bits}", lambda name, bits=bits: bits if "_proj" in name else 16
        )
        loaded = load_models(tmp_path / "model", checkpoint, CPU, FLOAT, offload=plan)
        pair = make_pair(loaded.target, loaded.verifier, fidelity=rarely)
        codes = Codes.of(loaded.verifier)
        weights = 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)
        assert (codes.bits, codes.size) == (bits, weights * bits // 8 + codes.head)
        assert codes.head == 4 * loaded.verifier.vocab_size * 64
        agreement = RunningAgreement(AgreementCurve(rarely.margins))
        said = describe_more_bits(pair, COSTS, agreement, plan_exact(COSTS, agreement.now, 0.0).rate, 0.0)
        assert (said is not None) == told
    assert describe_more_bits(replace(pair, fidelity=None), COSTS, agreement, 0.0, 0.0) is None
    assert describe_more_bits(replace(pair, target=None), COSTS, agreement, 0.0, 0.0) is None
