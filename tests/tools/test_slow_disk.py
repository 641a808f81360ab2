"""A slowed disk gives the same bytes, at no more than its rate."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from tools.slow_disk import SlowDisk


@given(
    st.lists(st.tuples(st.integers(1, 1000), st.integers(0, 30), st.integers(0, 30)), min_size=1), st.integers(1, 50)
)
def test_reads_take_as_long_as_the_rate_says(reads: list[tuple[int, int, int]], rate: int) -> None:
    """Each read is of so many bytes, takes so long by itself, after a pause."""
    clock, sizes = [0.0], [size for size, _, _ in reads]
    own = iter(seconds for _, seconds, _ in reads)
    left = iter(sizes)

    def read(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        clock[0] += next(own)
        return next(left)

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    disk, expected = SlowDisk(rate, read, lambda: clock[0], sleep), 0.0
    for size, seconds, pause in reads:
        clock[0] += pause
        begun = max(expected, clock[0])
        expected = begun + size / rate
        end = max(clock[0] + seconds, expected)
        assert disk(0, [memoryview(bytearray(1))], 0) == size
        assert abs(clock[0] - end) < 1e-6
