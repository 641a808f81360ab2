"""The two parts of a GPU bench that come before all others: do the kernels compute, and how long does a pass take."""

from functools import partial

from quasar_core.kernels.triton.adapters import why_not_triton
from quasar_core.models.decoder.cache import DecoderCache
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from tools.gpu_bench.correctness import check_kernel
from tools.gpu_bench.end_to_end import run_arms
from tools.gpu_bench.models import Bench, grown_target, rounded_verifier
from tools.gpu_bench.passes import ROOM, time_length

PART, SMOKE = "headline", "smoke"
QUESTIONS = 2  # whose answers are written end to end
# Cases at the sizes of the 8B shape, one for each kernel that its passes launch.
SMOKE_CASES = (
    "packed 4 bits symmetric 6144×4096 group 128 bfloat16",
    "packed 4 bits symmetric 4096×12288 group 128 bfloat16",
    "packed 4 bits asymmetric 6144×4096 group 128 bfloat16",
    "packed 8 bits symmetric 151936×1024 group 128 bfloat16",
    "gated 4 bits 24576×4096 splits 2 bfloat16",
    "gated 16 bits 24576×4096 splits 2 bfloat16",
    "dense 6144×4096 bfloat16",
    "dense 4096×12288 bfloat16",
    "norm with residual 4096 bfloat16",
    "joined norms 4 bits 4096×4096 bfloat16",
    "joined norms 16 bits 4096×12288 bfloat16",
    "rotate and store 8+2·2 heads of 128 norms rotation bfloat16",
    "attend 1 tokens, 32/8 heads of 128 at 511 bfloat16",
    "attend 8 tokens, 32/8 heads of 128 at 8000 bfloat16",
    "joined attention 1 tokens, 32/8 heads of 128 at 511, norms first bfloat16",
    "joined attention 8 tokens, 32/8 heads of 128 at 8000, norms first bfloat16",
    "16 bits, 8 of 128 experts 768×2048 bfloat16",
    "4 bits, 8 of 128 experts 768×2048 bfloat16",
    "experts by softmax",
    "argmax and margin, random, bfloat16",
    "accept greedy",
)


def run_smoke(bench: Bench) -> None:
    """A case of each kernel at real sizes, and that a row does not depend on the rows beside it."""
    plan, report = bench.plan, bench.report
    obstacle = "no GPU; the tests run the kernels through Triton's interpreter" if plan.dry else None
    obstacle = obstacle or why_not_triton(plan.device, plan.dtype)
    if obstacle:
        report.add(SMOKE, what="kernels", skipped=obstacle)
        return
    from tools.gpu_bench.checks import correctness_cases
    from tools.gpu_bench.compile_ahead import compile_ahead

    cases = dict(correctness_cases(plan.device, small=False))
    walked, failed = compile_ahead([(name, cases[name]) for name in SMOKE_CASES], plan.device, report.left() / 2)
    report.add(SMOKE, what="kernels compiled side by side", cases=walked, failed=failed)
    for name in SMOKE_CASES:
        report.attempt(SMOKE, name, partial(check_kernel, name, cases[name], report, SMOKE))


def run(bench: Bench) -> None:
    """Passes of the target and of its 4-bit copy at the shorter context, each length in an attempt of its own; texts.

    The models are made by every process anew: another one that goes on has to have them too.
    """
    report = bench.report
    report.say("making the grown model")
    target = grown_target(bench.plan, report.progress)
    cache = target.new_cache(min(bench.plan.contexts) + ROOM)
    time_passes(bench, "target", target, cache)
    report.say("making the 4-bit copy")
    verifier = rounded_verifier(target, "4-bit", report.progress)
    time_passes(bench, "4-bit", verifier, cache)
    few = min(QUESTIONS, bench.plan.questions)
    report.attempt(PART, "end to end", partial(run_arms, bench, target, verifier, PART, few))


def time_passes(bench: Bench, name: str, model: LeanDecoder, cache: DecoderCache) -> None:
    """A row of how the pass was chosen, and one for each number of tokens."""
    bench.report.add(PART, model=name, note=getattr(model.fast, "note", ""))
    context = min(bench.plan.contexts)
    for count in bench.plan.headline:
        what = f"{name}, {count} tokens"
        measure = partial(time_length, bench, name, model, cache, count, context, PART)
        bench.report.attempt(PART, what, measure)
