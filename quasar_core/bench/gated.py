"""Measure how many tokens of an arm that leaves some unchecked are the target's own choice, given the text before.

The target passes each finished answer by itself, as it decodes: a token agrees where it is the target's best, given
everything before it. The text is the bench's, which no margin table was fitted on.
"""

from collections.abc import Iterator, Sequence

from quasar_core.bench.arms import ARMS
from quasar_core.bench.datasets import Dataset
from quasar_core.bench.results import Achieved, Key, Row
from quasar_core.decode.engine import prompt_chunk
from quasar_core.decode.prefixes import Prefixes
from quasar_core.decode.text import encode_prompt
from quasar_core.models.pair import Pair
from quasar_core.records import Progress, no_progress

PIECE = 32  # tokens of a pass


def measure_achieved(
    pair: Pair, datasets: Sequence[Dataset], rows: Sequence[Row], fidelity: float, progress: Progress = no_progress
) -> list[Achieved]:
    """For each dataset and arm of `gated`, over its greedy answers."""
    turns = {
        (dataset.name, question.question_id): question.turns for dataset in datasets for question in dataset.questions
    }
    counts: dict[tuple[str, str], list[int]] = {}
    conversations = list(_gated(rows))
    for done, answers in enumerate(conversations):
        progress("checking what was not confirmed", done, len(conversations))
        first = answers[0]
        count = counts.setdefault((first.dataset, first.arm), [0, 0])
        prefixes = Prefixes(pair)
        for prompt, answer in _texts(pair, answers, turns[first.dataset, first.question_id]):
            count[0] += max(len(answer) - 1, 0)
            count[1] += count_agreed(pair, prompt, answer, prefixes)
    return [Achieved(dataset, arm, tokens, agreed, fidelity) for (dataset, arm), (tokens, agreed) in counts.items()]


def count_agreed(pair: Pair, prompt: Sequence[int], answer: Sequence[int], prefixes: Prefixes | None = None) -> int:
    """How many tokens behind the answer's first are the target's best, each given the text before it.

    By the passes that decoding makes of a prompt, behind the turns before it, and of an answer: in 16 bits others round
    otherwise, and where two tokens are about equally good, choose otherwise.
    """
    prefixes = prefixes or Prefixes(pair)
    prefix, cached = prefixes.take(prompt, len(prompt) + len(answer))
    target, cache = pair.primary, prefix.cache
    target.pass_prompt(prompt[cached:], cache, prompt_chunk(pair, len(prompt)))
    agreed = 0
    for begin in range(0, len(answer) - 1, PIECE):
        end = min(begin + PIECE, len(answer) - 1)
        best = target.choose(answer[begin:end], cache).tokens
        agreed += sum(one == other for one, other in zip(best, answer[begin + 1 : end + 1], strict=True))
    prefixes.keep(prefix, [*prompt, *answer[:-1]])
    return agreed


def _gated(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """The turns of each conversation of such an arm, as far as they were answered."""
    conversations: dict[Key, list[Row]] = {}
    for row in rows:
        if ARMS[row.arm].verify == "gated":
            conversations.setdefault(row.conversation, []).append(row)
    for answers in conversations.values():
        whole = [row for row in answers if row.error is None]
        if len(whole) == len(answers):
            yield whole


def _texts(pair: Pair, answers: Sequence[Row], turns: Sequence[str]) -> Iterator[tuple[list[int], list[int]]]:
    """Prompt and answer of each turn."""
    messages: list[dict[str, str]] = []
    for row, text in zip(answers, turns, strict=False):
        messages.append({"role": "user", "content": text})
        yield encode_prompt(pair.tokenizer, messages), row.token_ids
        messages.append({"role": "assistant", "content": row.text})
