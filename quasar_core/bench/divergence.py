"""Find where an arm that promises the target's output left vanilla's, and whether the target was near a tie there.

In 16 bits a pass over several tokens and a pass over one may differ in the last bits, so the better of two tokens may
change where their logits lie within the rounding of the dtype; anywhere else a difference is a defect.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from quasar_core.bench.arms import ARMS, BASELINE
from quasar_core.bench.datasets import Dataset
from quasar_core.bench.metrics.quality import first_difference
from quasar_core.bench.results import Divergence, Key, Row
from quasar_core.decode.text import encode_prompt
from quasar_core.models.pair import Pair
from quasar_core.models.rope import begin_text


@dataclass(frozen=True)
class _Split:
    """The first turn of a conversation in which an arm's answer is not vanilla's, and the place of the difference."""

    row: Row
    vanilla: list[Row]  # the turns up to this one
    position: int


def find_divergences(pair: Pair, datasets: Sequence[Dataset], rows: Sequence[Row]) -> list[Divergence]:
    """Every conversation of a greedy run in which an arm that promises the target's output left vanilla's."""
    turns = {
        (dataset.name, question.question_id): question.turns for dataset in datasets for question in dataset.questions
    }
    return [_judge(pair, split, turns[split.row.dataset, split.row.question_id]) for split in _splits(rows)]


def _splits(rows: Sequence[Row]) -> Iterator[_Split]:
    conversations: dict[Key, list[Row]] = {}
    for row in rows:
        conversations.setdefault(row.conversation, []).append(row)
    for (dataset, question, repeat, arm, temperature), answers in conversations.items():
        vanilla = conversations.get((dataset, question, repeat, BASELINE, temperature))
        if vanilla and arm != BASELINE and not ARMS[arm].is_peer and ARMS[arm].verify in ("full", "exact"):
            for turn, (row, own) in enumerate(zip(answers, vanilla, strict=False)):
                if row.error is not None or own.error is not None:
                    break
                if row.token_ids != own.token_ids:
                    yield _Split(row, vanilla[: turn + 1], first_difference(row.token_ids, own.token_ids))
                    break


def _judge(pair: Pair, split: _Split, turns: Sequence[str]) -> Divergence:
    """Pass the text up to the difference through the target and read its two best logits."""
    messages = []
    for row, text in zip(split.vanilla, turns, strict=False):
        messages.append({"role": "user", "content": text})
        if row is not split.vanilla[-1]:
            messages.append({"role": "assistant", "content": row.text})
    prompt = encode_prompt(pair.tokenizer, messages)
    tokens = prompt + split.vanilla[-1].token_ids[: split.position]
    cache = pair.new_cache(len(tokens))
    begin_text(cache, len(prompt), 0)
    logits = pair.primary.forward(tokens, cache, last_only=True)[0]
    best = logits.topk(2).values.tolist()
    return Divergence(
        dataset=split.row.dataset,
        question_id=split.row.question_id,
        repeat=split.row.repeat,
        arm=split.row.arm,
        turn=split.row.turn,
        position=split.position,
        gap=best[0] - best[1],
        rounding=torch.finfo(pair.dtype).eps * abs(best[0]),
    )
