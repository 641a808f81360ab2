"""Write the texts that drafters are studied on: `python -m tools.study.draft_texts MODEL OUTPUT --dataset NAMES`.

A model answers a bench's questions greedily; each answer becomes a line of OUTPUT with its prompt, its tokens and the
likeliest successors of each token, so that drafters can be replayed over them without a model
(`tools/study/replay_drafts.py`).
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from quasar_core.api import decoding
from quasar_core.bench.datasets import MT_BENCH_CATEGORIES, Question, load_datasets
from quasar_core.config import GenerationConfig
from quasar_core.decode.generator import Generator
from quasar_core.decode.text import encode_prompt
from quasar_core.models.pair import Pair

BEST = 8  # successors recorded of each token


@dataclass(frozen=True)
class Recording:
    """One answer: `best[i]` are the likeliest tokens where `answer[i]` stands, best first."""

    kind: str
    question_id: int | str
    turn: int
    prompt: list[int]
    answer: list[int]
    best: list[list[int]]


def kind_of(category: str) -> str:
    """Spec-Bench's six kinds of text: MT-bench's eight categories are one."""
    return "mt_bench" if category in MT_BENCH_CATEGORIES else category


def record(pair: Pair, question: Question, tokens: int) -> Iterator[Recording]:
    """The answers of one conversation."""
    generator = Generator(pair, GenerationConfig(tokens, "full", "ngram"))
    messages: list[dict[str, str]] = []
    for turn, text in enumerate(question.turns):
        messages.append({"role": "user", "content": text})
        prompt = encode_prompt(pair.tokenizer, messages)
        result = generator.generate(prompt)
        answer = list(result.token_ids)
        messages.append({"role": "assistant", "content": result.text})
        best = likeliest(pair, prompt, answer)
        yield Recording(kind_of(question.category), question.question_id, turn, prompt, answer, best)


def likeliest(pair: Pair, prompt: Sequence[int], answer: Sequence[int]) -> list[list[int]]:
    """The best few tokens where each token of the answer stands."""
    cache = pair.new_cache(len(prompt) + len(answer))
    if prompt[:-1]:
        pair.primary.forward(prompt[:-1], cache, last_only=True)
    logits = pair.primary.forward([prompt[-1], *answer[:-1]], cache)
    best: list[list[int]] = logits.float().topk(BEST, dim=-1).indices.tolist()
    return best


def read_recordings(paths: Sequence[Path]) -> list[Recording]:
    """The answers of some files."""
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    return [Recording(**json.loads(line)) for line in lines]


def main() -> None:
    """Append the answers to the output, one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--dataset", default="spec-bench", help="as of `quasar bench`")
    parser.add_argument("--limit", type=int, help="questions of each dataset, spread over it")
    parser.add_argument("--kind", help="only questions of this kind")
    parser.add_argument("--odd", action="store_true", help="only every second question: to tune on other ones")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    arguments = parser.parse_args()
    pair = decoding.load_pair(arguments.model, verify="full")
    questions = [question for dataset in load_datasets(arguments.dataset) for question in dataset.questions]
    if arguments.kind:
        questions = [question for question in questions if kind_of(question.category) == arguments.kind]
    if arguments.odd:
        questions = questions[1::2]
    count = min(arguments.limit or len(questions), len(questions))
    with arguments.output.open("a", encoding="utf-8") as file:
        for i in range(count):
            for recording in record(pair, questions[i * len(questions) // count], arguments.max_new_tokens):
                file.write(json.dumps(asdict(recording)) + "\n")


if __name__ == "__main__":
    main()
