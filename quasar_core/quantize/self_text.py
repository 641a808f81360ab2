"""Text that the model writes for its own calibration: rows in batches that march in step, at temperature 1.

A chat model writes conversations (`conversation.py`); a base model goes on from the tokens that its tokenizer puts
before every text, or where there are none, from a token drawn at random. Every draw has its own number, made from the
seed, the row and the position before anything is written: so neither the size of a batch nor an interruption changes
what is drawn. Letters: B rows of a batch, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from quasar_core.malloc import return_freed_memory
from quasar_core.models.base import refuse_odd_logits
from quasar_core.quantize.conversation import Conversations, text_opening, turn_tokens
from quasar_core.quantize.logit_rows import Likeliest, draw
from quasar_core.quantize.text_batch import CHANCES, HIDDEN, LIKELIEST, NOTHING, Asked, Batch
from quasar_core.quantize.text_log import TOKENS, TextLog, kept_batch
from quasar_core.quantize.text_writers import Writer, batch_rows
from quasar_core.records import Progress, no_progress

# Attention's copies grow by a token a step, and leave holes in the heap that no later one fits.
STEPS_BETWEEN_RETURNS = 16


@dataclass(frozen=True)
class Text:
    """Token ids [B, L], and what was asked for beside them: of the first rows what is likeliest behind each token.

    Of the others `hidden` [·, L − 1, ·], what all positions but the last have left behind the last block.
    """

    tokens: torch.Tensor
    likeliest: Likeliest | None = None
    hidden: torch.Tensor | None = None

    @classmethod
    def of_batches(cls, batches: Sequence[Mapping[str, torch.Tensor]]) -> "Text":
        """The batches below one another."""
        parts: dict[str, list[torch.Tensor]] = {}
        for batch in batches:
            for name, part in batch.items():
                parts.setdefault(name, []).append(part[:, : batch[TOKENS].shape[1] - 1] if name == HIDDEN else part)
        whole = {name: torch.cat(found) for name, found in parts.items()}
        found = Likeliest(whole[LIKELIEST], whole[CHANCES]) if LIKELIEST in whole else None
        return cls(whole[TOKENS], found, whole.get(HIDDEN))


@torch.inference_mode()
def write_self_text(
    writer: Writer,
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    length: int,
    seed: int,
    greedy_from: int | None = None,
    progress: Progress = no_progress,
    stage: str = "writing calibration text",
    kept: Path | None = None,
    asked: Asked = NOTHING,
) -> Text:
    """Write token ids [rows, length] at temperature 1; with `greedy_from`, greedy from that position on.

    In the folder `kept` it is kept as it is written: a call after one that was interrupted goes on, to the same text.
    Raises QuasarError where the model's logits are not numbers.
    """
    turns = turn_tokens(tokenizer)
    opening = turns.opening if turns else text_opening(tokenizer)
    chances = torch.rand(rows, length, dtype=torch.double, generator=torch.Generator().manual_seed(seed * 1_000_003))
    asked = replace(asked, hidden=asked.hidden and writer.knows_hidden)
    identity: dict[str, Any] = {"rows": rows, "length": length, "seed": seed, "greedy_from": greedy_from}
    identity |= {"writer": writer.name, "opening": opening, **asdict(asked)}
    batches = []
    at_once = _kept_rows_at_once(kept, seed, identity) or batch_rows(writer.room, writer.row_bytes(length), rows)
    for begin in range(0, rows, at_once):
        own = chances[begin : begin + at_once].to(writer.device)
        log = None
        if kept is not None:
            log = TextLog(kept, _batch_name(seed, begin), {**identity, "begin": begin, "count": len(own)})

        def report(tokens: int, begin: int = begin) -> None:
            progress(stage, begin * length + tokens, rows * length)

        finished = None if log is None else log.finished()
        if finished is None:
            batch = Batch(writer.begin(len(own), length), len(own), length, asked.from_row(begin), log)
            _write(batch, Conversations(turns, len(own)), _first_tokens(writer, opening, own), own, greedy_from, report)
            finished = batch.finish()
        batches.append(finished)
    return Text.of_batches(batches)


def _kept_rows_at_once(kept: Path | None, seed: int, identity: dict[str, Any]) -> int | None:
    """The rows of a batch as an earlier run of this text had them: with others, products may be rounded otherwise."""
    begun = None if kept is None else kept_batch(kept, _batch_name(seed, 0))
    same = begun is not None and {**begun, **identity} == begun
    return int(begun["count"]) if begun is not None and same else None


def _batch_name(seed: int, begin: int) -> str:
    return f"seed-{seed}-row-{begin}"


def _write(
    batch: Batch,
    conversation: Conversations,
    opening: list[torch.Tensor],
    chances: torch.Tensor,
    greedy_from: int | None,
    report: Callable[[int], None],
) -> None:
    """Write one batch to its end; every row gets a token a step, drawn by its own `chances` [B, L] or forced."""
    count, length = chances.shape
    logits: torch.Tensor | None = batch.begin(opening, conversation)
    while len(batch) < length:
        assert logits is not None
        refuse_odd_logits(logits)
        if greedy_from is not None and len(batch) >= greedy_from:
            chosen = logits.argmax(dim=-1)
        else:
            chosen = draw(logits, chances[:, len(batch)])
        logits = batch.add(conversation.direct(chosen))
        if len(batch) % STEPS_BETWEEN_RETURNS == 0:
            return_freed_memory()
        report(count * len(batch))


def _first_tokens(writer: Writer, opening: list[int], chances: torch.Tensor) -> list[torch.Tensor]:
    """What every row begins with, [B] each: these tokens, else one drawn at random."""
    if opening:
        return [torch.full((len(chances),), token, device=writer.device) for token in opening][: chances.shape[1]]
    return [(chances[:, 0] * writer.vocab_size).long()]
