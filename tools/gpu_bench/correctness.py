"""Part 1 of a GPU bench: everything that runs on the device computes what it should."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from quasar_core.bench.arms import BenchConfig
from quasar_core.bench.datasets import load_datasets
from quasar_core.bench.run import run_bench
from quasar_core.decode.logits.sampling import accept_matching
from quasar_core.kernels.triton.adapters import why_not_triton
from quasar_core.models.base import MOST_LIKELIEST, choose_best
from quasar_core.models.context import context_limit
from quasar_core.models.cuda.graph_pass import POSITION, CudaPass, cache_at
from quasar_core.models.cuda.overlap import differing_passes
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.pair import Pair, end_of_text_ids, load_tokenizer
from quasar_core.models.weights.lean_weights import load_target
from quasar_core.records import FidelityReport
from tools.demo.grow import DEMO
from tools.gpu_bench.models import Bench, Plan, small_verifier, with_untuned_pass
from tools.gpu_bench.report import Report

PART = "correctness"
# Our 16-bit logits may be this much farther from those in float32 than transformers' 16-bit logits are.
MORE_ROUNDING = 1.5
KERNEL_SHARE = 0.6  # of the part's time
COMPILE_SHARE = 0.5  # of the kernels' time
SPREAD = 5
OVERLAPPED = "qwen3"  # the tiny model whose passes are run with launches that overlap, too
SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {}),
    "mistral, window": ("Mistral", {"sliding_window": 37}),
    "qwen3, experts": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": True}),
    "qwen2, experts, one of every token": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 256}),
    "llama, all biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2, one key-value head": ("Qwen2", {"num_key_value_heads": 1}),
    "smollm3, tied": ("SmolLM3", {"no_rope_layer_interval": 2, "tie_word_embeddings": True}),
    "qwen3, head size 128": ("Qwen3", {"head_dim": 128, "tie_word_embeddings": True}),
}
# Passes of these sizes, one after the other: short ones, chunks of a prompt, on both sides of the bucket at 1024.
PASSES = (100, 1, 4, 16, 2, 120, 33, 700, 8, 33, 1, 5, 3, 16)
DRY_PASSES = (6, 1, 4, 16, 2, 8)
BEFORE, TREE = 6, (-1, 0, 0, 2, 1, 0, 5)  # tokens before a tree, and its nodes' parents
DRAFTS = (1, 2, 3, 6, 8, 16)  # tokens of a pass, and how many of its text are the decoder's own


def run(bench: Bench) -> None:
    """Kernels against float64, decoders against transformers, `exact` against plain decoding."""
    plan, report = bench.plan, bench.report
    report.attempt(PART, "kernels", partial(check_kernels, plan, report))
    for name in list(ARCHITECTURES)[: plan.architectures]:
        report.attempt(PART, name, partial(check_decoder, name, plan, report))
    report.attempt(PART, "exact", partial(check_exact, plan, report))


def check_kernels(plan: Plan, report: Report) -> None:
    """Every Triton kernel against float64, in a share of the part's time: the decoders matter as much."""
    if plan.dry:
        report.add(PART, what="kernels", skipped="no GPU; the tests run them through Triton's interpreter")
        return
    obstacle = why_not_triton(plan.device, plan.dtype)
    if obstacle:
        report.add(PART, what="kernels", skipped=obstacle)
        return
    from tools.gpu_bench.checks import correctness_cases
    from tools.gpu_bench.compile_ahead import compile_ahead

    cases = most_telling_first(list(correctness_cases(plan.device, small=False)))
    least = (1 - KERNEL_SHARE) * report.left()
    walked, failed = compile_ahead(cases, plan.device, COMPILE_SHARE * (report.left() - least))
    report.add(PART, what="kernels compiled side by side", cases=walked, of=len(cases), failed=failed)
    for number, (name, measure) in enumerate(cases):
        if report.left() < least:
            report.add(PART, what=f"kernels from case {number} of {len(cases)} on", skipped="their time was up")
            return
        report.attempt(PART, name, partial(check_kernel, name, measure, report))


def most_telling_first(cases: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Cases in the order of their use (bf16 before float16, 4 and 8 bits before 2 and 3), spread over the kernels."""

    def key(numbered: tuple[int, tuple[str, Any]]) -> tuple[int, int, int]:
        number, (name, _) = numbered
        rare = ("float16" in name.replace("bfloat16", "")) + 2 * name.startswith(("packed 2", "packed 3"))
        return rare, number % SPREAD, number

    return [case for _, case in sorted(enumerate(cases), key=key)]


def check_kernel(name: str, measure: Any, report: Report, part: str = PART) -> None:
    """A row of one case."""
    error, tolerance = measure()
    report.add(part, what=name, relative_error=float(error), tolerance=float(tolerance), ok=bool(error <= tolerance))


def check_decoder(name: str, plan: Plan, report: Report) -> None:
    """A tiny random model: our passes in 16 bits, and transformers', against transformers in float32 on the CPU."""
    sizes = DRY_PASSES if plan.dry else PASSES
    tokens = torch.randint(3, 512, (sum(sizes),), generator=torch.Generator().manual_seed(1)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(Path(folder), name)
        decoder = with_untuned_pass(load_target(Path(folder), plan.device, plan.dtype))
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        exact, paths = model(input_ids=ids, use_cache=False).logits[0], logits_of_paths(model, tokens)
        rounded = model.to(plan.device, plan.dtype)(input_ids=ids.to(plan.device), use_cache=False).logits[0]
    ours = in_passes(decoder, tokens, sizes)
    error, allowed = relative_error(ours, exact), MORE_ROUNDING * relative_error(rounded, exact)
    report.add(PART, what=f"decoder, {name}", relative_error=error, tolerance=allowed, ok=error <= allowed)
    error = relative_error(logits_of_tree(decoder, tokens), paths)
    report.add(PART, what=f"tree, {name}", relative_error=error, tolerance=allowed, ok=error <= allowed)
    if decoder.fast is not None:  # experts have no recorded pass without Triton
        wrong = wrong_choices(decoder, tokens[0])
        report.add(PART, what=f"choices, {name}", passes=len(DRAFTS) ** 2, wrong=wrong, ok=not wrong)
    verifier = small_verifier(decoder)
    recorded = in_passes(verifier, tokens, sizes)
    verifier.fast = None
    error = relative_error(recorded, in_passes(verifier, tokens, sizes))
    report.add(PART, what=f"verifier, {name}", relative_error=error, tolerance=allowed, ok=error <= allowed)
    if name == OVERLAPPED and not plan.dry:
        report.attempt(PART, "overlapping launches", partial(check_overlap, plan, decoder, report))


def logits_of_tree(decoder: LeanDecoder, tokens: Sequence[int]) -> torch.Tensor:
    """Logits of the nodes of TREE, which are the text's tokens behind the first few."""
    cache = decoder.new_cache(BEFORE + len(TREE))
    decoder.forward(tokens[:BEFORE], cache)
    return decoder.forward_tree(tokens[BEFORE : BEFORE + len(TREE)], TREE, cache)


def logits_of_paths(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """The same by transformers, each node's path as a text of its own."""
    rows, paths = [], list[list[int]]()
    for node, parent in enumerate(TREE):
        paths.append([*(paths[parent] if parent >= 0 else []), tokens[BEFORE + node]])
        rows.append(model(input_ids=torch.tensor([[*tokens[:BEFORE], *paths[-1]]]), use_cache=False).logits[0, -1])
    return torch.stack(rows)


def check_overlap(plan: Plan, target: LeanDecoder, report: Report) -> None:
    """Passes whose launches overlap, against the same launches one after the other: none may differ in any bit."""
    obstacle = why_not_triton(plan.device, plan.dtype)
    if obstacle:
        report.add(PART, what="overlapping launches", skipped=obstacle)
        return
    from quasar_core.kernels.triton.language import SWITCH, why_not_overlapping
    from quasar_core.models.cuda.triton_steps import TritonSteps

    obstacle = why_not_overlapping(plan.device)
    if obstacle:
        report.add(PART, what="overlapping launches", skipped=obstacle)
        return
    os.environ[SWITCH] = "0"  # for what is measured later, unless all is well here
    found = {}
    for name, decoder in {"target": target, "4-bit": small_verifier(target)}.items():
        joined = CudaPass(decoder, TritonSteps(overlaps=True))
        found[name] = differing_passes(decoder, TritonSteps(), joined, cache_at(decoder, POSITION))
    report.add(PART, what="overlapping launches", wrong=found, ok=not any(found.values()))
    if not any(found.values()):
        del os.environ[SWITCH]


def random_model(folder: Path, name: str) -> Any:
    """A transformers model whose every parameter is random, in a folder."""
    kind, options = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **options})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(0, 0.06)
            if "norm" in key:
                parameter += 1
    model.to(torch.bfloat16).save_pretrained(folder)
    return model.float()


def in_passes(decoder: LeanDecoder, tokens: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    """Logits of a text that is passed in pieces of these sizes."""
    cache = decoder.new_cache(len(tokens))
    logits = [decoder.forward(tokens[cache.length : cache.length + size], cache) for size in sizes]
    return torch.cat(logits)


def wrong_choices(decoder: LeanDecoder, first: int) -> int:
    """Passes whose choices, margins or count on the device are not those of their logits.

    Their drafts are the decoder's own text up to a place, so that every count occurs, in passes that are filled up too.
    """
    cache, text = decoder.new_cache(2 * max(DRAFTS)), [first]
    while len(text) < max(DRAFTS):
        text += choose_best(decoder.forward(text[-1:], cache).cpu()).tokens
    wrong = 0
    for count in DRAFTS:
        for right in DRAFTS:
            offered = [*text[:right], *(token ^ 1 for token in text[right:])][:count]
            cache.rollback(0)
            logits = decoder.forward(offered, cache).cpu()
            expected = choose_best(logits, MOST_LIKELIEST)
            cache.rollback(0)
            accepted, _ = accept_matching(expected.tokens, offered[1:])
            wrong += decoder.choose(offered, cache, MOST_LIKELIEST) != replace(expected, accepted=accepted)
    return wrong


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual − expected‖ ÷ ‖expected‖; infinite where anything is not a number."""
    difference = actual.double().cpu() - expected.double().cpu()
    error = float(difference.norm() / expected.double().norm())
    return error if error == error else float("inf")


def check_exact(plan: Plan, report: Report) -> None:
    """The demo model with a 4-bit copy: where `exact` leaves plain decoding, the target was near a tie."""
    target = with_untuned_pass(load_target(DEMO, plan.device, plan.dtype))
    pair = demo_pair(plan, target, small_verifier(target))
    with tempfile.TemporaryDirectory() as folder:
        config = BenchConfig(("vanilla", "ngram", "exact"), max_new_tokens=plan.new_tokens, limit=plan.questions)
        results = run_bench(pair, load_datasets("demo", plan.questions), config, Path(folder) / "rows.json")
    defects = [divergence for divergence in results.divergences if not divergence.near_tie]
    report.add(
        PART,
        what="exact against plain decoding, demo model",
        answers=len(results.rows),
        tokens=sum(len(row.token_ids) for row in results.rows),
        divergences=len(results.divergences),
        largest_gap=max((divergence.gap for divergence in results.divergences), default=0.0),
        failed_answers=[row.error for row in results.errors],
        ok=not defects and not results.errors,
    )


def demo_pair(
    plan: Plan, target: LeanDecoder, verifier: LeanDecoder | None, fidelity: FidelityReport | None = None
) -> Pair:
    """A target that computes the demo model's function, with its tokenizer."""
    tokenizer = load_tokenizer(DEMO)
    return Pair(
        tokenizer=tokenizer,
        target=target,
        verifier=verifier,
        target_name="demo",
        verifier_name="4-bit, rounded to nearest" if verifier else None,
        max_context=context_limit(DEMO),
        eos_ids=end_of_text_ids(DEMO, tokenizer),
        device=plan.device,
        dtype=plan.dtype,
        fidelity=fidelity,
    )
