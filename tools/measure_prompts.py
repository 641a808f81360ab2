"""Compare the two ways of a prompt's pass on the CPU: in C++, and in PyTorch's operations.

`python -m tools.measure_prompts MODEL [--threads N] [--rounds N] [--sizes 1,8,33]`: milliseconds of the pass of a
prompt of so many tokens, of which the last one's logits are made, in bfloat16 as it lies and compressed, both ways in
turn; and the longest of the sizes up to which C++ is no slower. `SHORT_PROMPT` of `models/cpu/cpu_pass.py` rests on it.
"""

import argparse
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import torch

from quasar_core.models.cpu.compressed_weights import compress
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.loading import attach
from quasar_core.models.weights.lean_weights import load_target
from quasar_core.timing import Sampler, time_in_turn, timed

SIZES = (1, 4, 8, 16, 24, 33, 40, 48, 64, 96)
CPP, TORCH = "C++", "PyTorch"


def prompt_sampler(decoder: LeanDecoder, size: int, way: str) -> Sampler:
    """Seconds of a prompt's pass, in one of the two ways."""
    assert decoder.fast is not None
    fast, cache = decoder.fast, decoder.new_cache(size)
    tokens = [i * decoder.vocab_size // size for i in range(size)]

    def work() -> None:
        fast.longest_prompt = size if way == CPP else 0
        decoder.pass_prompt(tokens, cache, size)
        cache.rollback(0)

    return timed(work)


def measure(decoder: LeanDecoder, sizes: Sequence[int], rounds: int) -> dict[int, dict[str, float]]:
    """Median seconds by size and way."""
    ways = [(size, way) for size in sizes for way in (CPP, TORCH)]
    samplers = {one: prompt_sampler(decoder, *one) for one in ways}
    timings = time_in_turn(samplers, rounds=rounds, warm_up=True)
    return {size: {way: timings[size, way].median for way in (CPP, TORCH)} for size in sizes}


def longest_in_cpp(found: dict[int, dict[str, float]]) -> int:
    """The longest size up to which C++ is no slower; 0 where it is from the first."""
    return max(takewhile(lambda size: found[size][CPP] <= found[size][TORCH], sorted(found)), default=0)


def main() -> None:
    """Print a table for weights as they lie, and one for compressed weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--sizes", type=lambda text: tuple(map(int, text.split(","))), default=SIZES)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    for compressed in (False, True):
        decoder = load_target(options.model, torch.device("cpu"), torch.bfloat16)
        note = compress([decoder], wanted=True) if compressed else "weights: bfloat16 as it lies"
        found = measure(attach_or_exit(decoder), options.sizes, options.rounds)
        print(note)
        for size, seconds in found.items():
            print(f"{size:4} tokens: " + ", ".join(f"{way} {1000 * seconds[way]:.2f} ms" for way in (CPP, TORCH)))
        print(f"C++ is no slower up to {longest_in_cpp(found)} tokens.\n", flush=True)


def attach_or_exit(decoder: LeanDecoder) -> LeanDecoder:
    """The decoder with its C++ pass; ends the program where there is none."""
    note = attach(decoder)
    if decoder.fast is None:
        raise SystemExit(note)
    return decoder


if __name__ == "__main__":
    main()
