"""Many clients at once: no wrong answer, no leak. The full soak is `tools/soak.py`."""

import pytest

pytest.importorskip("starlette")
pytest.importorskip("httpx")


@pytest.mark.slow
def test_two_thousand_requests_leave_no_wrong_answer_and_no_memory_behind() -> None:
    from quasar_core import quantize_model
    from tools.soak import soak_server

    quantize_model("demo", bits=4, samples=16, seq_len=128)
    found = soak_server(2000, 16, draft="ngram")  # auto remembers answers, up to a bound
    assert found["wrong"] == []
    assert found["alive_at_the_end"]
    assert sum(found["requests"].values()) == 2000
    assert found["mb_per_1000_requests"] < 5
