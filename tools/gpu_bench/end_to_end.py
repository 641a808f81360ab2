"""Part 3 of a GPU bench: text from the grown model, plain, with n-grams, by the verifier, and exact.

The grown model writes what the demo model writes, at the cost of the large shape; its verifier is rounded to nearest,
and how often that agrees is measured first, as `quasar quantize` would have stored it.
"""

import tempfile
from pathlib import Path

import torch

from quasar_core.bench.arms import BenchConfig
from quasar_core.bench.datasets import Dataset, load_datasets
from quasar_core.bench.results import Results
from quasar_core.bench.run import run_bench
from quasar_core.config import GenerationConfig
from quasar_core.decode.generator import Generator
from quasar_core.decode.text import encode_prompt
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.pair import Pair
from quasar_core.quantize.fidelity import measure_fidelity
from quasar_core.records import FidelityReport, Stats
from tools.gpu_bench.correctness import demo_pair
from tools.gpu_bench.models import Bench

PART = "end to end"
ARMS = ("vanilla", "ngram", "quantized", "exact")
REPEATS = 2  # the first one records graphs in passing; the last one counts


def run(bench: Bench, target: LeanDecoder, verifier: LeanDecoder) -> None:
    """Measure agreement, then bench the arms, interleaved."""
    bench.report.attempt(PART, "all", lambda: run_arms(bench, target, verifier, PART, bench.plan.questions))


def run_arms(bench: Bench, target: LeanDecoder, verifier: LeanDecoder, part: str, questions: int) -> None:
    """A row of fidelity, one for each arm, and what differs from plain decoding, of so many questions."""
    plan = bench.plan
    datasets = load_datasets("demo", questions)
    pair = demo_pair(plan, target, verifier)
    pair.fidelity = agreement(bench, pair, datasets[0], part)
    config = BenchConfig(ARMS, max_new_tokens=plan.new_tokens, limit=questions, repeats=REPEATS, ignore_eos=True)
    with tempfile.TemporaryDirectory() as folder:
        results = run_bench(pair, datasets, config, Path(folder) / "rows.json", progress=bench.report.progress)
    for arm in ARMS:
        add_arm(bench, arm, results, part)
    defects = sum(not divergence.near_tie for divergence in results.divergences)
    bench.report.add(
        part,
        what="divergences from plain decoding",
        count=len(results.divergences),
        not_near_ties=defects,
        notes=list(pair.notes),
        failed_answers=[f"{row.arm}: {row.error}" for row in results.errors],
        ok=not defects and not results.errors,
    )


def agreement(bench: Bench, pair: Pair, dataset: Dataset, part: str) -> FidelityReport:
    """How faithful the verifier is on the target's own greedy text, after the dataset's questions."""
    prompts = [encode_prompt(pair.tokenizer, question.turns[0]) for question in dataset.questions]
    config = GenerationConfig(bench.plan.new_tokens, verify="full", draft="none", ignore_eos=True)
    generator = Generator(pair, config)
    texts = [[*prompt, *generator.generate(prompt).token_ids] for prompt in prompts]
    length = min(map(len, texts))
    rows = torch.tensor([text[-length:] for text in texts])
    target, verifier = pair.primary, pair.verifier or pair.primary
    cache = pair.new_cache(length)
    found = measure_fidelity(target, verifier, cache, rows, rows, length // 2, "own greedy text")
    bench.report.add(part, what="verifier", agreement=found.agreement, kl_mean=found.kl_mean, positions=rows.numel())
    return found


def add_arm(bench: Bench, arm: str, results: Results, part: str) -> None:
    """Tokens per second over all answers, the ratio to plain decoding, and where the time went."""
    of_arm, plain = total_of(arm, results, REPEATS - 1), total_of(ARMS[0], results, REPEATS - 1)
    rate, plain_rate = of_arm.tokens_per_s, plain.tokens_per_s
    seconds = max(of_arm.decode_s, 1e-9)
    bench.report.add(
        part,
        arm=arm,
        tokens_per_s=rate,
        tokens_per_s_of_the_first_repeat=total_of(arm, results, 0).tokens_per_s,
        speedup=rate / plain_rate if rate and plain_rate else None,
        acceptance_length=of_arm.acceptance_length,
        acceptance_rate=of_arm.acceptance_rate,
        steps=of_arm.steps,
        confirms=of_arm.confirms,
        confirm_rate=of_arm.confirm_rate,
        new_tokens=of_arm.new_tokens,
        share_draft=of_arm.draft_s / seconds,
        share_verify=of_arm.verify_s / seconds,
        share_confirm=of_arm.confirm_s / seconds,
        ms_per_step=1000 * of_arm.verify_s / max(of_arm.steps, 1),
        ms_per_confirm=1000 * of_arm.confirm_s / max(of_arm.confirms, 1),
        prefill_s=of_arm.prefill_s,
        peak_memory_bytes=of_arm.peak_memory_bytes,
    )


def total_of(arm: str, results: Results, repeat: int) -> Stats:
    """Counts, seconds and logs of an arm's answers together; the highest peak."""
    stats = [row.stats for row in results.rows if (row.arm, row.repeat) == (arm, repeat) and row.stats]
    whole = Stats()
    for one in stats:
        for name, value in vars(one).items():
            setattr(whole, name, getattr(whole, name) + value)
    whole.peak_memory_bytes = max((one.peak_memory_bytes for one in stats), default=0)
    return whole
