"""Many generations by tiny random models: `full` and `exact` write what plain decoding writes, whatever is guessed.

In float32 plain decoding is transformers' greedy `generate`; in bfloat16 it is one token a pass through the C++ kernel,
greedy or sampled by a seed, and windows and drafts are longer than a part of that pass. Every drafter meets every mode,
window and length of drafts, with trees and without: in trees likely and unlikely tokens stand beside the draft's. A few
generations run by default; among the slow tests 6,000 in float32 and 4,000 in bfloat16.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.decoder_cases import CASES, CPU, SIZES
from helpers.drafters import SOURCES, Forking, source_factory
from helpers.quantized_decoder import quantize_layers
from helpers.tiny_models import OracleDrafter, make_pair

from quasar_core.config import Auto, GenerationConfig, SamplingConfig
from quasar_core.decode.costs.pass_costs import PassCost
from quasar_core.decode.generator import Generator
from quasar_core.decode.passes import Passes
from quasar_core.draft.base import Drafter
from quasar_core.draft.ngram import NgramDrafter
from quasar_core.draft.recycle import RecycleDrafter
from quasar_core.kernels.cpu import library
from quasar_core.models import loading
from quasar_core.models.weights.lean_weights import attach_verifier, load_target

OF_ONE_PROMPT = 5
CONTEXT, VOCABULARY = 320, 96
INNER = (32, 96, 160)
# Nearer to a tie, in nats, another order of summation may choose another token.
NEAR_TIE = 1e-4
VERIFIERS = ("2 bits", "4 bits", "8 bits", "mixed", "the target", "another model")
DRAFTERS = ("ngram", "oracle", "wrong", "mixed", "recycle", *SOURCES)


@dataclass(frozen=True)
class Case:
    """One generation; where the length of drafts is `auto`, costs decide it, and trees are grown."""

    prompt: tuple[int, ...]
    length: int
    verify: str
    window: int | Auto
    drafts: int | Auto
    drafter: str
    costs: tuple[float, float] = (1.0, 1.0)  # seconds of a verifier's pass, and a token's share of any pass
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass(frozen=True)
class Known:
    """In the place of measured costs."""

    cost: PassCost
    remembered: bool = False

    def describe(self) -> str:
        return "made up"


class MixedDrafter(OracleDrafter):
    """Right up to a random place of each draft, wrong behind it."""

    def __init__(self, text: Sequence[int], seed: int) -> None:
        super().__init__(text, vocabulary=VOCABULARY)
        self.random = random.Random(seed)

    def propose(self, limit: int, after: Sequence[int] = ()) -> Any:
        draft = super().propose(limit, after)
        right = self.random.randint(0, len(draft.tokens))
        wrong = tuple((token + 1) % VOCABULARY for token in draft.tokens[right:])
        return type(draft)(draft.tokens[:right] + wrong, draft.pieces)


def drafter_of(kind: str, text: Sequence[int], seed: int) -> Callable[[], Drafter]:
    if kind in ("ngram", "recycle"):
        return NgramDrafter if kind == "ngram" else RecycleDrafter
    if kind in SOURCES:
        return source_factory(kind, text, seed, VOCABULARY)
    if kind == "mixed":
        return lambda: MixedDrafter(text, seed)
    return lambda: OracleDrafter(text, int(kind == "wrong"), VOCABULARY)


def save_random_model(folder: Path, case: str, inner: int, dice: random.Random) -> Any:
    """A model of one architecture with an MLP of `inner`, of random weights, that ends no text; transformers' model."""
    name, options = CASES[case]
    shape = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "eos_token_id": None}
    shape |= {"intermediate_size": inner, "initializer_range": dice.choice([0.1, 0.2])}
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **shape, **options})
    torch.manual_seed(dice.randrange(2**31))
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or "bias" in key:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return model


def verifier_of(kind: str, folder: Path, target: Any, case: str, dice: random.Random, kernel: str) -> Any:
    """A verifier over the target; of "another model", the codes of a stranger of the same shape."""
    if kind == "the target":
        return target
    bits = {"2 bits": (2,), "4 bits": (4,), "8 bits": (8,)}.get(kind, (2, 3, 4, 8))
    source = folder
    if kind == "another model":
        source = folder / "another"
        save_random_model(source, case, target.config.intermediate_size, dice)
    widths = cycle(bits)
    checkpoint = quantize_layers(source, folder / kind.replace(" ", "-"), lambda name: next(widths))
    return attach_verifier(target, checkpoint, kernel)


def random_prompt(dice: random.Random) -> tuple[int, ...]:
    """Text that repeats itself, so that n-grams match."""
    pattern = [dice.randrange(3, VOCABULARY) for _ in range(dice.randint(1, 30))]
    return tuple((pattern * 3)[: dice.randint(1, 60)])


def random_case(dice: random.Random, prompt: tuple[int, ...], longest: int, modes: Sequence[str]) -> Case:
    length, window = dice.randint(1, longest), dice.choice(["auto", 1, 2, 7, 31, 63, 64, 65, 100, 150, 200])
    drafts = dice.choice([1, 3, 8, 16, 33, 63, 64, *["auto"] * 7])
    costs = dice.choice([0.2, 0.5, 2.0]), dice.choice([0.0, 0.0, 0.02, 0.3])
    return Case(prompt, length, dice.choice(modes), window, drafts, dice.choice(DRAFTERS), costs)  # type: ignore[arg-type]


def random_sampling(dice: random.Random) -> SamplingConfig:
    """Greedy, or sampled by one of many rules and seeds."""
    if dice.random() < 0.5:
        return SamplingConfig()
    rules = dice.choice([{}, {}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.05}, {"repetition_penalty": 1.2}])
    return SamplingConfig(dice.choice([0.3, 0.7, 1.0, 1.5]), seed=dice.randrange(-(2**61), 2**61), **rules)  # type: ignore[arg-type]


def longest_answer(verifier: str, dice: random.Random, of_faithful: int, of_others: int) -> int:
    """Tokens; a verifier that is mostly wrong verifies a whole window for each of them."""
    return of_faithful if verifier in ("the target", "8 bits") else dice.choice([of_others, of_others // 4])


class Clock:
    """Goes by what passes cost, and by nothing else."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.seconds, self.costs = 0.0, (1.0, 0.0)
        for name in ("verify", "verify_tree", "confirm", "confirm_tree"):
            patch.setattr(Passes, name, self._timed(name, getattr(Passes, name)))

    def __call__(self) -> float:
        return self.seconds

    def _timed(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def timed(passes: Passes, *tokens: Sequence[int]) -> Any:
            whole = 1.0 if name.startswith("confirm") else self.costs[0]
            self.seconds += whole + self.costs[1] * len(tokens[1])
            return run(passes, *tokens)

        return timed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def answer(pair: Any, case: Case, text: Sequence[int], seed: int, ends: frozenset[int], clock: Clock) -> Any:
    """The result."""
    pair.eos_ids = ends
    clock.costs = pass_s, token_s = case.costs
    passes = {"verifier": (pass_s, pass_s + 63 * token_s), "target": (1.0, 1.0 + 63 * token_s)}
    pair.measured = {role: Known(PassCost((1, 64), seconds)) for role, seconds in passes.items()}
    options = {"num_draft_tokens": case.drafts, "window": case.window, "sampling": case.sampling}
    config = GenerationConfig(case.length, case.verify, **options)  # type: ignore[arg-type]
    whole = [*case.prompt, *text]
    make = drafter_of(case.drafter, whole, seed)

    def forking() -> Drafter:
        return Forking(make(), whole, seed, VOCABULARY)

    return Generator(pair, config, forking if case.drafts == "auto" else make, now=clock).generate(case.prompt)


def branches_of(result: Any) -> int:
    """How many nodes of trees stood beside drafts."""
    pieces = (piece for step in result.stats.step_log for piece in step.pieces)
    return sum(piece.length for piece in pieces if piece.source == "branch")


def until(text: Sequence[int], ends: frozenset[int]) -> list[int]:
    """The text up to its first token of `ends`, that one included."""
    for place, token in enumerate(text):
        if token in ends:
            return list(text[: place + 1])
    return list(text)


def some_ends(dice: random.Random, text: Sequence[int]) -> frozenset[int]:
    """A token that ends a text, from the middle of this one, for a third of the cases."""
    return frozenset([dice.choice(text)]) if dice.random() < 1 / 3 else frozenset()


def prompt_far_from_ties(model: Any, length: int, dice: random.Random) -> tuple[tuple[int, ...], list[int]]:
    """A prompt, and what transformers' greedy `generate` writes behind it, nowhere near a tie."""
    while True:
        prompt = random_prompt(dice)
        text, nearest = reference(model, prompt, length)
        if nearest > NEAR_TIE:
            return prompt, text


def reference(model: Any, prompt: Sequence[int], length: int) -> tuple[list[int], float]:
    """What transformers' greedy `generate` writes, and the smallest margin of a token."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=length,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.cat(output.logits).float().topk(2, dim=-1).values
    return output.sequences[0, len(prompt) :].tolist(), float((best[:, 0] - best[:, 1]).min())


def models(count: int, seed: int) -> Iterator[tuple[str, str, random.Random]]:
    """Architecture, verifier and dice of each of `count` models."""
    kinds = zip(cycle(CASES), cycle([*VERIFIERS, *VERIFIERS[::-1], VERIFIERS[0]]), strict=False)
    for number, (case, verifier) in zip(range(count), kinds, strict=False):
        yield case, verifier, random.Random(1000 * seed + number)


@pytest.mark.parametrize(("count", "runs"), [(12, 5), pytest.param(300, 20, marks=pytest.mark.slow)])
def test_float32_equals_transformers(tmp_path: Path, clock: Clock, count: int, runs: int) -> None:
    """So many models, each with so many runs."""
    branches = 0
    for number, (case, kind, dice) in enumerate(models(count, seed=1)):
        folder = tmp_path / str(number)
        model = save_random_model(folder, case, dice.choice(INNER), dice)
        target = load_target(folder, CPU, torch.float32)
        fast = dice.random() < 0.7 and library.why_not_here() is None
        verifier = verifier_of(kind, folder, target, case, dice, "vnni" if fast else "dense")
        if fast:
            loading.attach(target), loading.attach(verifier)
        pair = make_pair(target, verifier, max_context=CONTEXT)
        for run in range(runs):
            if run % OF_ONE_PROMPT == 0:
                longest = longest_answer(kind, dice, 32, 16)
                prompt, text = prompt_far_from_ties(model, longest, dice)
            drawn = random_case(dice, prompt, longest, ("full", "exact", "exact"))
            expected = text[: drawn.length]
            ends = some_ends(dice, expected)
            found = answer(pair, drawn, expected, run, ends, clock)
            assert found.token_ids == until(expected, ends), (case, kind, fast, drawn, ends)
            branches += branches_of(found)
    assert branches > count


@pytest.mark.usefixtures("cpp_pass")
@pytest.mark.parametrize(("count", "runs"), [(8, 5), pytest.param(200, 20, marks=pytest.mark.slow)])
def test_bfloat16_equals_plain_decoding(tmp_path: Path, clock: Clock, count: int, runs: int) -> None:
    """So many models, each with so many runs."""
    longest_window = branches = 0
    for number, (case, kind, dice) in enumerate(models(count, seed=2)):
        folder = tmp_path / str(number)
        save_random_model(folder, case, dice.choice(INNER), dice)
        target = load_target(folder, CPU, torch.bfloat16)
        verifier = verifier_of(kind, folder, target, case, dice, "vnni")
        loading.attach(target), loading.attach(verifier)
        assert target.fast is not None
        assert verifier.fast is not None
        target.fast.longest = 320 if number % 2 else 64  # long windows pass at once, and in parts
        pair = make_pair(target, verifier, max_context=CONTEXT, dtype=torch.bfloat16)
        for run in range(runs):
            longest = longest_answer(kind, dice, 250, 88)
            drawn = random_case(dice, random_prompt(dice), longest, ("full", "exact", "exact", "quantized"))
            drawn = replace(drawn, sampling=random_sampling(dice))
            mode = "quantized" if drawn.verify == "quantized" else "full"
            plain = GenerationConfig(drawn.length, mode, "none", sampling=drawn.sampling)  # type: ignore[arg-type]
            pair.eos_ids = frozenset()
            expected = Generator(pair, plain).generate(drawn.prompt).token_ids
            ends = some_ends(dice, expected)
            found = answer(pair, drawn, expected, run, ends, clock)
            assert found.token_ids == until(expected, ends), (case, kind, drawn, ends)
            branches += branches_of(found)
            if drawn.window != "auto":
                longest_window = max(longest_window, min(drawn.window, drawn.length))
    assert longest_window > 64
    assert branches > 10 * count
