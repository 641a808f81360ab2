"""A peer's process: vLLM's engine, plain, with its n-gram drafts, or with a draft model.

It runs in the environment that vLLM is installed in, from its file, so it imports nothing of quasar but its neighbour.
"""

import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent)]
from talk import Ask, Told, peak_memory, serve  # type: ignore[import-not-found]  # noqa: E402 - beside this file

SPECULATIVE_TOKENS = 5
LOOKUP = {"prompt_lookup_min": 1, "prompt_lookup_max": 3}  # as our n-grams by default
ROOM = 16  # tokens of a context beyond the answer's


def begin(settings: dict[str, Any]) -> tuple[str, Any]:
    """Load the model."""
    import vllm

    engine = vllm.LLM(
        model=settings["folder"],
        dtype=settings["dtype"],
        max_model_len=settings["max_context"],
        speculative_config=speculative(settings),
        disable_log_stats=False,  # times and counts of drafts
        enable_prefix_caching=True,
        max_num_seqs=1,
        enforce_eager=settings["device"] == "cpu",
        seed=0,
    )
    return f"vLLM {vllm.__version__}", lambda ask: answer(engine, ask, settings)


def speculative(settings: dict[str, Any]) -> dict[str, Any] | None:
    """What vLLM's --speculative-config would say."""
    if settings["assistant"] is not None:
        return {
            "method": "draft_model",
            "model": settings["assistant"],
            "num_speculative_tokens": SPECULATIVE_TOKENS,
        }
    if settings["draft"] == "ngram":
        return {"method": "ngram", "num_speculative_tokens": SPECULATIVE_TOKENS, **LOOKUP}
    return None


def answer(engine: Any, ask: Ask, settings: dict[str, Any]) -> Told:
    """One answer."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=ask.temperature,
        seed=ask.seed,
        max_tokens=min(ask.max_new_tokens, settings["max_context"] - len(ask.prompt_ids)),
        ignore_eos=not settings["eos_ids"],
        stop_token_ids=settings["eos_ids"],
        detokenize=False,
    )
    before = drafts(engine)
    start = time.perf_counter()
    (output,) = engine.generate({"prompt_token_ids": ask.prompt_ids}, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    drafted, accepted = (after - then for after, then in zip(drafts(engine), before, strict=True))
    token_ids = list(output.outputs[0].token_ids)
    first = min(output.metrics.first_token_latency, seconds)
    return Told(
        token_ids=token_ids,
        prefill_s=first,
        decode_s=seconds - first,
        passes=max(0, len(token_ids) - 1 - accepted),
        drafted=drafted,
        accepted=accepted,
        peak_memory_bytes=peak_memory(),
    )


def drafts(engine: Any) -> tuple[int, int]:
    """Draft tokens offered and accepted, since the engine began."""
    counts = {metric.name: getattr(metric, "value", 0) for metric in engine.get_metrics()}
    names = "vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens"
    return int(counts.get(names[0], 0)), int(counts.get(names[1], 0))


if __name__ == "__main__":
    serve(begin)
