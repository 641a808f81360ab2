"""Whether the launches of a decoder's recorded passes overlap: tried on the decoder itself, and told.

Overlapping hides what a launch costs, ten times a layer; whether it gains depends on the device and on the products,
as PyTorch's own kernels take no part in it. It must change no result: a pass that overlaps is compared, to the last
bit, with the same kernels launched one after the other.
"""

from collections.abc import Sequence
from functools import partial

import torch

from quasar_core.models.cuda_graphs import PlainLauncher
from quasar_core.models.cuda_pass import SHORTEST_BUCKET, CudaPass
from quasar_core.models.decoder import LeanDecoder
from quasar_core.models.decoder_cache import DecoderCache
from quasar_core.models.pass_steps import Steps
from quasar_core.timing import time_in_turn, timed

COUNTS = (1, 8)  # tokens of the passes that are tried: plain decoding's, and a verify's
POSITION = 500
ROUNDS = 20


def choose_overlap(decoder: LeanDecoder, plain: Steps, overlapping: Steps) -> tuple[CudaPass, str]:
    """The faster of two passes of a decoder, and a sentence; the plain one where the other fails, or differs."""
    apart = CudaPass(decoder, plain)
    cache = cache_at(decoder, POSITION)
    try:
        joined = CudaPass(decoder, overlapping)
        differing = differing_passes(decoder, plain, joined, cache)
        seconds = time_passes([apart, joined], cache)
    except RuntimeError as error:
        return apart, f"launches do not overlap: it failed here ({str(error).splitlines()[0]})"
    if differing:
        return apart, f"launches do not overlap: {differing} of {ROUNDS * len(COUNTS)} passes differed"
    figures = (
        f"{1e6 * seconds[1]:.0f} µs for passes of {' and '.join(map(str, COUNTS))}, {1e6 * seconds[0]:.0f} without"
    )
    if seconds[1] < seconds[0]:
        return joined, f"launches overlap: {figures}"
    return apart, f"launches do not overlap: with it {figures}"


def differing_passes(decoder: LeanDecoder, plain: Steps, joined: CudaPass, cache: DecoderCache) -> int:
    """Passes that overlap, and whose logits are not to the last bit those of the same kernels one after the other."""
    apart, differing = CudaPass(decoder, plain, PlainLauncher()), 0
    apart.dense = joined.dense
    for count in COUNTS:
        joined.run([0] * count, cache)  # which chooses the products
        cache.rollback(POSITION)
        expected = apart.run([0] * count, cache)
        cache.rollback(POSITION)
        for _ in range(ROUNDS):
            differing += not torch.equal(joined.run([0] * count, cache), expected)
            cache.rollback(POSITION)
    return differing


def time_passes(passes: Sequence[CudaPass], cache: DecoderCache) -> list[float]:
    """Seconds of each, the medians of all counts added up; they take turns."""

    def choose(number: int, count: int) -> None:
        cache.rollback(POSITION)
        passes[number].choose([0] * count, cache)

    turns = [(number, count) for count in COUNTS for number in range(len(passes))]
    samplers = {turn: timed(partial(choose, *turn)) for turn in turns}
    timings = time_in_turn(samplers, rounds=ROUNDS, warm_up=True)  # the first pass of a size records it
    cache.rollback(POSITION)
    return [sum(timings[number, count].median for count in COUNTS) for number in range(len(passes))]


def cache_at(decoder: LeanDecoder, length: int) -> DecoderCache:
    """A cache of zeros that stands there."""
    cache = decoder.new_cache(SHORTEST_BUCKET)
    for states in cache.layers:
        states.zero_()
    cache.advance(length)
    return cache
