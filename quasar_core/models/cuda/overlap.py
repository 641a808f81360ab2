"""Let the launches of a pass overlap where that is faster and changes no bit: tried on the decoder itself, at load.

It hides what a launch costs; whether it gains depends on the device and on the products.
"""

from collections.abc import Sequence
from functools import partial

import torch

from quasar_core.kernels.gpu import first_line, raise_if_lost
from quasar_core.models.cuda.graph_pass import POSITION, CudaPass, cache_at
from quasar_core.models.cuda.graphs import PlainLauncher
from quasar_core.models.cuda.torch_steps import Steps
from quasar_core.models.decoder.cache import DecoderCache
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.timing import time_in_turn, timed

COUNTS = (1, 8)  # tokens of the passes that are tried: plain decoding's, and a verify's
ROUNDS = 20


def with_overlap(apart: CudaPass) -> tuple[CudaPass, str]:
    """The pass whose launches overlap where that can be had and gains, else the one given; and a sentence."""
    from quasar_core.kernels.triton.language import why_not_overlapping
    from quasar_core.models.cuda.triton_steps import TritonSteps

    obstacle = why_not_overlapping(apart.decoder.device)
    if obstacle:
        return apart, f"launches do not overlap: {obstacle}"
    assert isinstance(apart.steps, TritonSteps)
    return choose_overlap(apart, TritonSteps(overlaps=True, joined=apart.steps.joined))


def choose_overlap(apart: CudaPass, overlapping: Steps) -> tuple[CudaPass, str]:
    """The faster of two passes of a decoder, and a sentence; the plain one where the other fails, or differs."""
    decoder = apart.decoder
    cache = cache_at(decoder, POSITION)
    try:
        overlapped = CudaPass(decoder, overlapping, fast=True, joins_norms=apart.joins_norms)
        differing = differing_passes(decoder, apart.steps, overlapped, cache)
        seconds = time_passes([apart, overlapped], cache)
    except Exception as error:  # of Triton, which does not know the option, or of the driver
        raise_if_lost(error)
        return apart, f"launches do not overlap: it failed here ({first_line(error)})"
    if differing:
        return apart, f"launches do not overlap: {differing} of {ROUNDS * len(COUNTS)} passes differed"
    figures = (
        f"{1e6 * seconds[1]:.0f} µs for passes of {' and '.join(map(str, COUNTS))}, {1e6 * seconds[0]:.0f} without"
    )
    if seconds[1] < seconds[0]:
        return overlapped, f"launches overlap: {figures}"
    return apart, f"launches do not overlap: with it {figures}"


def differing_passes(decoder: LeanDecoder, plain: Steps, overlapped: CudaPass, cache: DecoderCache) -> int:
    """Passes that overlap, and whose logits are not to the last bit those of the same kernels one after the other."""
    apart, differing = CudaPass(decoder, plain, PlainLauncher(), joins_norms=overlapped.joins_norms), 0
    apart.dense = overlapped.dense
    for count in COUNTS:
        overlapped.run([0] * count, cache)  # which chooses the products
        cache.rollback(POSITION)
        expected = apart.run([0] * count, cache)
        cache.rollback(POSITION)
        for _ in range(ROUNDS):
            differing += not torch.equal(overlapped.run([0] * count, cache), expected)
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
