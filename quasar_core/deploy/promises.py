"""What a deployment promises and what it cannot do, in sentences by engine, mode and drafter."""

from quasar_core.deploy.wish import NAMES, Wish

LOCAL = ("127.0.0.1", "localhost", "::1")

PROMISES = {
    "exact": "the text is the full-precision model's: {engine}'s target decides each token. Greedy text may differ "
    "from {engine}'s own plain decoding where two tokens lie a rounding apart, since passes over several tokens round "
    "otherwise than passes over one",
    "quantized": "the text is that of the low-bit copy, not the full-precision model's: faster, not lossless; `quasar "
    "inspect` shows the measured agreement",
}


def promise(wish: Wish) -> str:
    """Whose text it is."""
    return PROMISES[wish.mode].format(engine=NAMES[wish.engine])


def limits(wish: Wish) -> list[str]:
    """What it cannot do, or does worse than `quasar generate`."""
    found = [*_OF_DRAFTS.get((wish.engine, wish.drafts_by), ()), *_OF_MODES.get((wish.engine, wish.mode), ())]
    if wish.host not in LOCAL and "--api-key" not in wish.others:
        found.append(f"whoever reaches {wish.host} may ask: add -- --api-key KEY")
    return found


_OF_DRAFTS = {
    ("vllm", "draft-model"): (
        "keys and values are held twice, and the prompt is passed twice: the copy has a cache, a head and an embedding "
        "of its own",
        "n-grams cannot draft beside the copy: one method at a time (--draft quasar has both)",
        "every draft has the same length, whatever it costs",
        "drafts run in vLLM's first model runner: its second has no CUDA graphs for them",
    ),
    ("vllm", "quasar"): (
        "vLLM calls this door experimental; it runs in its first model runner, without asynchronous scheduling",
        "the first rank of each group holds the copy and drafts while the others wait",
        "the copy passes one text after another: it drafts while at most 4 are decoded at once, beyond that n-grams "
        "alone",
        "not run on a GPU by us",
    ),
    ("vllm", "ngram"): ("only text that repeats speeds up",),
    ("vllm", "suffix"): (
        "needs the package arctic-inference; runs in vLLM's first model runner, without asynchronous scheduling",
    ),
    ("sglang", "draft-model"): (
        "keys and values are held twice, and the prompt is passed twice",
        "no attention by data parallelism, no rejection sampling, and 48 requests at once unless more are asked for",
    ),
    ("sglang", "ngram"): (
        "no attention by data parallelism, and 48 requests at once unless more are asked for",
        "trees of pages longer than one token need the flashinfer backend",
    ),
}
_OF_MODES = {
    ("vllm", "quantized"): ("no full-precision model is loaded, so nothing is confirmed",),
    ("sglang", "quantized"): ("no full-precision model is loaded, so nothing is confirmed",),
    ("sglang", "exact"): ("quasar's own drafts are not to be had: SGLang's registered algorithms are whole workers",),
}
