"""What bounds a streaming arm is told from its counts alone."""

from typing import Any

import pytest

from tools.measure_offload import describe_bound, most_gained


@pytest.mark.parametrize(
    ("agreement", "ratio", "most"),
    [(0.0, 20.0, 1.0), (1.0, 20.0, 257 * 20 / 276), (0.5, 1.0, 1.0), (0.5, 8.0, 1.75 * 0.8)],
)
def test_the_best_window_by_hand(agreement: float, ratio: float, most: float) -> None:
    assert most_gained(agreement, ratio) == pytest.approx(most, rel=1e-6)


def test_the_sentence_counts_places_that_the_target_looked_at() -> None:
    """Of windows of 10, 4 and 3 tokens it took 10, 2 and none: 12 of 14 places; 2 GB at 1 GB/s are 40 verifies."""
    answer: dict[str, Any] = {"windows": [10, 4, 3], "kept": [10, 2, 0], "verify_s": 1.0, "verify_passes": 20}
    answer |= {"tokens": [0] * 17, "target_passes": 4}
    said = describe_bound({"answers": [answer], "pass_bytes": 2e9}, 1e9)
    assert said.startswith(
        "exact: 4.0 tokens a sweep, which takes as long as 40 verifies; the target took the verifier's"
    )
    assert f"0.857 of 14 places, so without drafts {most_gained(12 / 14, 40):.1f} × plain is the most" in said
    answer["verify_passes"] = answer["verify_s"] = 0
    assert describe_bound({"answers": [answer], "pass_bytes": 2e9}, 1e9) == "exact: nothing was verified"
