"""Decode a bench's questions in virtual time: `python -m tools.study.virtual_time MODEL VERIFIER DATASET-FOLDER`.

The engine, its drafters and its decisions are the real ones; only the clock is not: it goes on by what a table says of
each pass (`--costs`, as `quasar bench` measured them, and what a position before a row adds). So two policies are
compared on any machine, busy or not, to the last token and with no noise. The rows of both models are kept in a file
(`--memo`), by the text before them: a policy that is tried next runs a model only where no earlier one was.
"""

import argparse
import pickle
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from quasar_core.api import decoding
from quasar_core.bench.arms import ARMS, BenchConfig
from quasar_core.bench.datasets import Question, read_questions
from quasar_core.config import Request
from quasar_core.decode.costs.cost_records import CostRecord, Role
from quasar_core.decode.costs.pass_costs import PassCost
from quasar_core.decode.engine import Engine
from quasar_core.decode.generator import Generator
from quasar_core.decode.text import encode_prompt
from quasar_core.models.base import CausalLM, Choices
from quasar_core.models.pair import Pair
from quasar_core.records import Stats
from tools.study.draft_texts import kind_of
from tools.study.replay_drafts import parse_costs

TARGET = "1:6.7,2:6.75,3:7.2,4:7.35,5:7.75,6:8.7,8:10.6,9:12,16:20,17:22,33:42"  # milliseconds, by a pass's tokens
VERIFIER = "1:3.0,2:3.25,3:3.5,4:3.85,5:4.25,6:4.7,8:6.05,9:7.2,16:11.7,17:12.5,33:23"
POSITION = 1.0  # milliseconds for each row of a pass and 1000 positions before it
DRAFTING, OTHER = 0.25, 0.45  # milliseconds of asking the drafter, and of all else around a pass
KEPT = 8  # likeliest tokens of a row
CHUNK = 512

Row = tuple[int, float, tuple[int, ...]]  # the choice, its margin, the likeliest tokens


class Clock:
    """Time that passes tell."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        """The time."""
        return self.seconds


class VirtualCache:
    """The tokens that were passed, by whom, and a number for the text up to each."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.entries: list[tuple[int, str]] = []
        self.numbers: list[int] = []

    @property
    def length(self) -> int:
        """Positions written."""
        return len(self.entries)

    def rollback(self, length: int) -> None:
        """Forget what is behind."""
        del self.entries[length:], self.numbers[length:]

    def write(self, tokens: Sequence[int], role: str) -> None:
        """Positions go on."""
        for token in tokens:
            self.numbers.append(number_of(self.numbers[-1] if self.numbers else 0, token))
            self.entries.append((token, role))

    def keep(self, start: int, nodes: Sequence[int]) -> None:
        """A path of the tree that was passed at `start`."""
        kept = [self.entries[start + node] for node in nodes]
        self.rollback(start)
        for token, role in kept:
            self.write([token], role)


def number_of(before: int, token: int) -> int:
    """What stands for a text and a token behind it."""
    return hash((before, token))


@dataclass
class Memo:
    """Rows that were computed, by model and text; `changed` counts those of this run."""

    file: Path | None
    rows: dict[tuple[str, int], Row] = field(default_factory=dict)
    changed: int = 0

    @classmethod
    def read(cls, file: Path | None) -> "Memo":
        """Those of earlier runs."""
        return cls(file, pickle.loads(file.read_bytes()) if file and file.exists() else {})

    def write(self) -> None:
        """Keep them for later runs."""
        if self.file and self.changed:
            self.file.write_bytes(pickle.dumps(self.rows))
            self.changed = 0


class Real:
    """The models, and one cache that follows what is asked of them."""

    def __init__(self, pair: Pair) -> None:
        assert pair.target
        assert pair.verifier
        self.models: dict[str, CausalLM] = {"target": pair.target, "verifier": pair.verifier}
        self._pair, self._cache, self._entries = pair, pair.new_cache(1), list[tuple[int, str]]()

    def rows(self, role: str, cache: VirtualCache, tokens: Sequence[int], parents: Sequence[int] | None) -> list[Row]:
        """One pass behind what the cache holds."""
        self._follow(cache, len(tokens))
        if parents is None:
            choices = self.models[role].choose(tokens, self._cache, KEPT)
            self._entries += [(token, role) for token in tokens]
        else:
            choices = self.models[role].choose_tree(tokens, parents, self._cache, KEPT)
            self._cache.rollback(len(self._entries))
        return list(zip(choices.tokens, choices.margins, map(tuple, choices.likeliest), strict=True))

    def prompt(self, cache: VirtualCache, tokens: Sequence[int]) -> torch.Tensor:
        """A prompt's pass → logits [1, V]."""
        self._follow(cache, len(tokens))
        logits = self._pair.primary.pass_prompt(tokens, self._cache, CHUNK)
        self._entries += [(token, "prompt") for token in tokens]
        return logits

    def _follow(self, cache: VirtualCache, room: int) -> None:
        """Make the cache hold what the virtual one does, by the same models."""
        if self._cache.capacity < cache.capacity:
            self._cache, self._entries = self._pair.new_cache(cache.capacity), []
        common = 0
        for one, other in zip(self._entries, cache.entries, strict=False):
            if one != other:
                break
            common += 1
        if common < cache.length and cache.entries[common][1] == "prompt":
            common = 0  # a prompt is passed in the same pieces
        self._cache.rollback(common)
        while common < cache.length:
            role, end = cache.entries[common][1], common
            while end < cache.length and cache.entries[end][1] == role:
                end += 1
            tokens = [token for token, _ in cache.entries[common:end]]
            if role == "prompt":
                self._pair.primary.pass_prompt(tokens, self._cache, CHUNK)
            else:
                self.models[role].choose(tokens, self._cache, 0)
            common = end
        self._entries = list(cache.entries)


class VirtualModel(CausalLM):
    """A model whose passes take the time that a table says."""

    def __init__(self, role: Role, real: Real, memo: Memo, cost: PassCost, clock: Clock) -> None:
        self.role, self._real, self._memo, self._cost, self._clock = role, real, memo, cost, clock

    @property
    def vocab_size(self) -> int:
        """As the real model's."""
        return self._real.models[self.role].vocab_size

    @property
    def device(self) -> torch.device:
        """As the real model's."""
        return self._real.models[self.role].device

    @property
    def longest_tree(self) -> int:
        """As the real model's."""
        return self._real.models[self.role].longest_tree

    def new_cache(self, capacity: int) -> VirtualCache:
        """An empty cache."""
        return VirtualCache(capacity)

    def pass_prompt(self, tokens: Sequence[int], cache: Any, chunk: int, before_pass: Any = None) -> torch.Tensor:
        """A prompt takes no time; logits that choose and list as the real ones do."""
        numbers = VirtualCache(0)
        numbers.numbers = list(cache.numbers)
        numbers.write(tokens, "prompt")
        key = "prompt", numbers.numbers[-1]
        if key not in self._memo.rows:
            best = self._real.prompt(cache, tokens)[0].topk(KEPT).indices.tolist()
            self._memo.rows[key] = best[0], 0.0, tuple(best)
            self._memo.changed += 1
        cache.write(tokens, "prompt")
        logits = torch.full((1, self.vocab_size), -1e4)
        for place, token in enumerate(self._memo.rows[key][2]):
            logits[0, token] = float(KEPT - place)
        return logits

    def forward(self, tokens: Sequence[int], cache: Any, last_only: bool = False) -> torch.Tensor:
        """Logits of whole rows are not kept: greedy decoding asks for choices alone."""
        raise NotImplementedError("virtual time decodes greedily")

    def choose(self, tokens: Sequence[int], cache: Any, likeliest: int = 0) -> Choices:
        """A pass over a chain."""
        return self._pass(tokens, None, cache, likeliest)

    def choose_tree(self, tokens: Sequence[int], parents: Sequence[int], cache: Any, likeliest: int = 0) -> Choices:
        """A pass over a tree."""
        return self._pass(tokens, parents, cache, likeliest)

    def _pass(self, tokens: Sequence[int], parents: Sequence[int] | None, cache: Any, likeliest: int) -> Choices:
        self._clock.seconds += self._cost.at(cache.length)(len(tokens))
        numbers = list[int]()
        before = cache.numbers[-1] if cache.numbers else 0
        for place, token in enumerate(tokens):
            parent = parents[place] if parents else place - 1
            numbers.append(number_of(before if parent < 0 else numbers[parent], token))
        keys = [(str(self.role), number) for number in numbers]
        if any(key not in self._memo.rows for key in keys):
            for key, row in zip(keys, self._real.rows(self.role, cache, tokens, parents), strict=True):
                self._memo.changed += key not in self._memo.rows
                self._memo.rows.setdefault(key, row)
        cache.write(tokens, self.role)
        rows = [self._memo.rows[key] for key in keys]
        return Choices(
            [row[0] for row in rows],
            [row[1] for row in rows],
            likeliest=[list(row[2][:likeliest]) for row in rows] if likeliest else [],
        )


def virtual_pair(pair: Pair, memo: Memo, costs: dict[Role, PassCost], clock: Clock, flat: bool = False) -> Pair:
    """A pair whose passes tell the clock, and whose costs are known; `flat` keeps from it what positions add."""
    real = Real(pair)
    target, verifier = (VirtualModel(role, real, memo, costs[role], clock) for role in costs)
    known = {role: replace(cost, slope=None) if flat else cost for role, cost in costs.items()}
    measured: dict[str, Any] = {role: CostRecord(cost, {"role": role}, time.time()) for role, cost in known.items()}
    return replace(pair, target=target, verifier=verifier, measured=measured, notes=[])


class TimedGenerator(Generator):
    """A generator whose drafter takes time too, and so does what a text does with a pass's tokens."""

    drafting, other = DRAFTING / 1e3, OTHER / 1e3

    def _make_engine(self, *arguments: Any) -> Engine:
        engine, clock = super()._make_engine(*arguments), self._now
        assert isinstance(clock, Clock)
        for name, seconds in (("propose", self.drafting), ("observe", self.other)):
            setattr(engine.drafter, name, ticking(getattr(engine.drafter, name), clock, seconds))
        return engine


def ticking(method: Callable[..., Any], clock: Clock, seconds: float) -> Callable[..., Any]:
    """A method that takes so long."""

    def ticked(*arguments: Any) -> Any:
        clock.seconds += seconds
        return method(*arguments)

    return ticked


def answer_all(
    pair: Pair, arm: str, questions: Sequence[Question], tokens: int, clock: Clock, memo: Memo
) -> list[tuple[str, list[int], Stats]]:
    """The arm's answers: kind of text, tokens, stats."""
    pair.measured = dict(pair.measured)
    config = BenchConfig((arm,), max_new_tokens=tokens).generation(ARMS[arm], 0.0)
    generator = TimedGenerator(pair, config, now=clock)
    found = []
    for question in questions:
        generator.reset()
        messages: list[dict[str, str]] = []
        for turn in question.turns:
            messages.append({"role": "user", "content": turn})
            result = generator.generate(encode_prompt(pair.tokenizer, messages), request=Request(tokens, 0))
            messages.append({"role": "assistant", "content": result.text})
            found.append((kind_of(question.category), list(result.token_ids), result.stats))
        memo.write()
    return found


def speeds(answers: Sequence[tuple[str, list[int], Stats]]) -> dict[str, float]:
    """Tokens per second of each kind, and of all."""
    tokens, seconds = defaultdict[str, int](int), defaultdict[str, float](float)
    for kind, _, stats in answers:
        for name in (kind, "all"):
            tokens[name] += stats.new_tokens - stats.prefill_tokens
            seconds[name] += stats.decode_s
    return {name: tokens[name] / seconds[name] for name in tokens}


def describe(answers: Sequence[tuple[str, list[int], Stats]]) -> str:
    """What the passes were."""
    steps = [step for _, _, stats in answers for step in stats.step_log]
    confirms = [confirm for _, _, stats in answers for confirm in stats.confirm_log]
    verifies, direct = [step for step in steps if not step.by_target], [s for s in steps if s.by_target and s.seconds]
    kept = sum(c.accepted for c in confirms) / max(sum(c.window for c in confirms), 1)
    return (
        f"verifies {len(verifies)} ({sum(s.seconds for s in verifies):.1f} s), confirms {len(confirms)} "
        f"({sum(c.seconds for c in confirms):.1f} s; {sum(c.window for c in confirms) / max(len(confirms), 1):.2f} "
        f"tokens, {kept:.2f} kept), direct {len(direct)} ({sum(s.seconds for s in direct):.1f} s)"
    )


def main() -> None:
    """Print the speeds of each arm by kind of text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("verifier")
    parser.add_argument("questions", type=Path, help="a file of questions, as of MT-bench and Spec-Bench")
    parser.add_argument("--arms", default="vanilla,full,exact,quantized")
    parser.add_argument("--limit", type=int, default=48, help="questions, spread over the file")
    parser.add_argument("--odd", action="store_true", help="those between them: to tune on others than one measures on")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--target-costs", default=TARGET, help="milliseconds of passes, by their tokens")
    parser.add_argument("--verifier-costs", default=VERIFIER)
    parser.add_argument("--position", type=float, default=POSITION, help="ms of a row for 1000 positions before it")
    parser.add_argument("--flat", action="store_true", help="decisions begin without what positions add")
    parser.add_argument("--memo", type=Path, help="a file that keeps the models' rows")
    arguments = parser.parse_args()
    pair = decoding.load_pair(arguments.model, arguments.verifier)
    row = arguments.position / 1e6
    given: dict[Role, str] = {"target": arguments.target_costs, "verifier": arguments.verifier_costs}
    slope = PassCost((1, 33), (row, 33 * row))
    costs = {role: replace(parse_costs(text), slope=slope) for role, text in given.items()}
    memo, clock = Memo.read(arguments.memo), Clock()
    virtual = virtual_pair(pair, memo, costs, clock, arguments.flat)
    everything = read_questions(arguments.questions)
    shift = len(everything) // arguments.limit // 2 if arguments.odd else 0
    questions = [everything[i * len(everything) // arguments.limit + shift] for i in range(arguments.limit)]
    texts, base = None, None
    for arm in arguments.arms.split(","):
        answers = answer_all(virtual, arm, questions, arguments.max_new_tokens, clock, memo)
        found = speeds(answers)
        base, texts = base or found, texts or [tokens for _, tokens, _ in answers]
        same = sum(tokens == other for (_, tokens, _), other in zip(answers, texts, strict=True))
        columns = "  ".join(f"{kind} {rate / base[kind]:.3f}" for kind, rate in sorted(found.items()))
        print(f"{arm:10} {found['all']:6.1f} tokens/s  {columns}  equal {same}/{len(texts)}")
        print(f"           {describe(answers)}", flush=True)


if __name__ == "__main__":
    main()
