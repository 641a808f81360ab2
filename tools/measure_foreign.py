"""Plain decoding of models that run through transformers, beside transformers' own greedy `generate`.

    python -m tools.measure_foreign [MODEL ...] [--families gpt2,bloom] [--dtypes bfloat16,float32] [--rounds 7]

Each model is a folder, or one of random weights that is made for it (`tools/foreign_families.py`). It is loaded once,
and both ways pass through the same object with the same threads: transformers by `generate(do_sample=False)`, quasar by
`--verify full --draft none`. They take turns, in the other order every second round. Printed are milliseconds a token
behind the first (medians), what quasar takes ÷ what transformers takes in the same round (median, and the middle half
of the rounds), the same of whole answers with their prompts, and whether all answers had the same tokens. Run it on a
machine that does nothing else.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from quasar_core.api import decoding
from quasar_core.config import GenerationConfig
from quasar_core.files import write_json
from quasar_core.models.hf.causal_lm import TransformersLM
from quasar_core.models.pair import Pair
from quasar_core.system import LoadMeter
from tools.foreign_families import FAMILIES, save_family

OURS, THEIRS = "quasar", "transformers"


@dataclass(frozen=True)
class Answer:
    """New tokens; seconds up to the first of them, and of all others."""

    tokens: list[int]
    first_s: float
    decode_s: float

    @property
    def per_token(self) -> float:
        """Seconds a token behind the first."""
        return self.decode_s / (len(self.tokens) - 1)

    @property
    def whole(self) -> float:
        """Seconds of the answer with its prompt."""
        return self.first_s + self.decode_s


@dataclass(frozen=True)
class Ratio:
    """What quasar takes ÷ what transformers takes, round by round: the median, and the quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> "Ratio":
        """Of times in the order of the rounds, at least two."""
        ratios = [own / other for own, other in zip(ours, theirs, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return cls(middle, low, high)

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}–{self.high:.3f})"


@dataclass(frozen=True)
class Comparison:
    """One model in one precision."""

    model: str
    dtype: str
    parameters: int
    attention: str
    ours_s: float  # a token, median of the rounds
    theirs_s: float
    per_token: Ratio
    whole: Ratio
    same_tokens: bool
    load: str  # of other processes meanwhile


class FirstToken(BaseStreamer):
    """Notes when transformers' `generate` has the first new token; it is given the prompt before."""

    def __init__(self) -> None:
        self.calls, self.time = 0, 0.0

    def put(self, value: Any) -> None:
        """Take in the prompt, and then each token."""
        self.calls += 1
        if self.calls == 2:
            self.time = time.perf_counter()

    def end(self) -> None:
        """Nothing is left to do."""


def answer_by_quasar(pair: Pair, prompt: Sequence[int], tokens: int) -> Answer:
    """Plain decoding; the text is made as well, as for everyone."""
    generator = decoding.Generator(pair, GenerationConfig(tokens, "full", "none", ignore_eos=True))
    start = time.perf_counter()
    result = generator.generate(prompt)
    seconds = time.perf_counter() - start
    generator.release()
    return Answer(list(result.token_ids), result.stats.ttft_s, seconds - result.stats.ttft_s)


def answer_by_transformers(model: Any, prompt: Sequence[int], tokens: int) -> Answer:
    """Its own greedy decoding, without text."""
    ids, first = torch.tensor([list(prompt)]), FirstToken()
    start = time.perf_counter()
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, streamer=first
    )
    end = time.perf_counter()
    return Answer(output[0, len(prompt) :].tolist(), first.time - start, end - first.time)


def compare(name: str, pair: Pair, prompt: Sequence[int], tokens: int, rounds: int) -> Comparison:
    """Interleaved answers of both; a first round is not counted."""
    model = foreign_model(pair)
    model.generation_config = transformers.GenerationConfig(eos_token_id=None, pad_token_id=0)
    answers: dict[str, list[Answer]] = {OURS: [], THEIRS: []}
    load = LoadMeter()
    for turn in range(rounds + 1):
        for arm in (OURS, THEIRS) if turn % 2 else (THEIRS, OURS):
            if arm == OURS:
                answers[arm].append(answer_by_quasar(pair, prompt, tokens))
            else:
                answers[arm].append(answer_by_transformers(model, prompt, tokens))
    texts = {tuple(answer.tokens) for taken in answers.values() for answer in taken}
    ours, theirs = answers[OURS][1:], answers[THEIRS][1:]
    own_s, other_s = ([answer.per_token for answer in taken] for taken in (ours, theirs))
    return Comparison(
        name,
        str(pair.dtype).removeprefix("torch."),
        sum(parameter.numel() for parameter in model.parameters()),
        model.config._attn_implementation,
        statistics.median(own_s),
        statistics.median(other_s),
        Ratio.of(own_s, other_s),
        Ratio.of([answer.whole for answer in ours], [answer.whole for answer in theirs]),
        len(texts) == 1,
        load.read().describe(),
    )


def foreign_model(pair: Pair) -> Any:
    """The model of a pair as transformers has it; ends the program where our own decoder runs it."""
    if not isinstance(pair.target, TransformersLM):
        sys.exit(f"{pair.target_name} does not run through transformers: {'; '.join(pair.notes)}")
    return pair.target.model


@contextmanager
def folders(options: argparse.Namespace) -> Iterator[Iterator[tuple[str, Path]]]:
    """The models by name; those that are made are there one at a time, and gone at the end."""
    with tempfile.TemporaryDirectory() as place:
        yield _made_or_given(options, Path(place))


def _made_or_given(options: argparse.Namespace, place: Path) -> Iterator[tuple[str, Path]]:
    for folder in options.models:
        yield folder.name, folder
    for family in options.families:
        with tempfile.TemporaryDirectory(dir=place) as folder:
            yield family, save_family(Path(folder), family)


HEADER = f"{'model':<12}{'dtype':<10}{'M params':>9}{'attention':>11}{'quasar':>9}{'transf.':>9}"


def line(found: Comparison) -> str:
    """A comparison as the table has it."""
    texts = "equal" if found.same_tokens else "DIFFER"
    return (
        f"{found.model:<12}{found.dtype:<10}{found.parameters / 1e6:>9.0f}{found.attention:>11}"
        f"{1000 * found.ours_s:>9.2f}{1000 * found.theirs_s:>9.2f}  {found.per_token!s:<22}{found.whole!s:<22}{texts}"
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*", help="folders; without any, families of random weights")
    parser.add_argument("--families", type=_names, help=f"of {', '.join(FAMILIES)}; default: all")
    parser.add_argument("--dtypes", type=_names, default=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, help="default: PyTorch's own number")
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="a file for all figures")
    options = parser.parse_args()
    if options.families is None:
        options.families = [] if options.models else list(FAMILIES)
    if unknown := set(options.families) - set(FAMILIES):
        parser.error(f"no family {min(unknown)}: there are {', '.join(FAMILIES)}")
    if options.rounds < 2 or options.tokens < 2:
        parser.error("at least two rounds and two tokens are needed")
    return options


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def measure(options: argparse.Namespace, folder: Path, name: str, dtype: str) -> Comparison:
    """One model in one precision, with a prompt of random tokens."""
    pair = decoding.load_pair(str(folder), verify="full", draft="none", device="cpu", dtype=dtype)
    luck = random.Random(0)
    prompt = [luck.randrange(1, pair.primary.vocab_size) for _ in range(options.prompt_tokens)]
    return compare(name, pair, prompt, options.tokens, options.rounds)


def main() -> None:
    """Measure and print a table."""
    options = parse()
    decoding.use_threads(options.threads or "auto", steer=False)
    print(f"{decoding.describe_threads()}; torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"prompt {options.prompt_tokens} tokens, {options.tokens} new, {options.rounds} rounds; ms a token, ratios")
    print(f"{HEADER}  {'÷ transf., a token':<22}{'÷ transf., whole':<22}tokens")
    found: list[Comparison] = []
    with folders(options) as models:
        for name, folder in models:
            for dtype in options.dtypes:
                found.append(measure(options, folder, name, dtype))
                print(line(found[-1]), flush=True)
    print(f"other processes: {'; '.join(sorted({one.load for one in found}))}")
    if options.json:
        figures = {name: getattr(options, name) for name in ("prompt_tokens", "tokens", "rounds")}
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        threads = {"threads": torch.get_num_threads()}
        write_json(options.json, {**figures, **versions, **threads, "models": [asdict(one) for one in found]})


if __name__ == "__main__":
    main()
