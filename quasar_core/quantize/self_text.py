"""Text that the model writes for its own calibration: rows in batches that march in step, at temperature 1.

A chat model writes conversations (`conversation.py`); a base model goes on from the tokens that its tokenizer puts
before every text, or where there are none, from a token drawn at random. Every draw has its own number, made from the
seed, the row and the position before anything is written: so neither the size of a batch nor an interruption changes
what is drawn. Letters: B rows of a batch, V vocabulary.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from quasar_core.malloc import return_freed_memory
from quasar_core.models.base import refuse_odd_logits
from quasar_core.quantize.conversation import Conversations, TurnTokens, text_opening, turn_tokens
from quasar_core.quantize.text_log import TextLog, kept_batch
from quasar_core.quantize.text_writers import Rows, Writer, batch_rows
from quasar_core.records import Progress, no_progress

# Attention's copies grow by a token a step, and leave holes in the heap that no later one fits.
STEPS_BETWEEN_RETURNS = 16
# Tokens whose chances are summed by themselves, and rows that are drawn for at once.
SPAN, DRAWN = 256, 16


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
) -> torch.Tensor:
    """Write token ids [rows, length] at temperature 1; with `greedy_from`, greedy from that position on.

    In the folder `kept` it is kept as it is written: a call after one that was interrupted goes on, to the same text.
    Raises QuasarError where the model's logits are not numbers.
    """
    turns = turn_tokens(tokenizer)
    opening = turns.opening if turns else text_opening(tokenizer)
    chances = torch.rand(rows, length, dtype=torch.double, generator=torch.Generator().manual_seed(seed * 1_000_003))
    identity: dict[str, Any] = {"rows": rows, "length": length, "seed": seed, "greedy_from": greedy_from}
    identity |= {"writer": writer.name, "opening": opening}
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
            finished = _write_batch(writer, turns, opening, own, greedy_from, log, report)
        batches.append(finished)
    return torch.cat(batches)


def _kept_rows_at_once(kept: Path | None, seed: int, identity: dict[str, Any]) -> int | None:
    """The rows of a batch as an earlier run of this text had them: with others, products may be rounded otherwise."""
    begun = None if kept is None else kept_batch(kept, _batch_name(seed, 0))
    same = begun is not None and {**begun, **identity} == begun
    return int(begun["count"]) if begun is not None and same else None


def _batch_name(seed: int, begin: int) -> str:
    return f"seed-{seed}-row-{begin}"


def _write_batch(
    writer: Writer,
    turns: TurnTokens | None,
    opening: list[int],
    chances: torch.Tensor,
    greedy_from: int | None,
    log: TextLog | None,
    report: Callable[[int], None],
) -> torch.Tensor:
    """Write one batch and keep it; every row gets a token a step, drawn by its own `chances` [B, length] or forced."""
    count, length = chances.shape
    conversation = Conversations(turns, count)
    rows = writer.begin(count, length)
    written, logits = _begin_batch(_first_tokens(writer, opening, chances), rows, conversation, log, writer.device)
    while len(written) < length:
        refuse_odd_logits(logits)
        if greedy_from is not None and len(written) >= greedy_from:
            chosen = logits.argmax(dim=-1)
        else:
            chosen = draw(logits, chances[:, len(written)])
        written.append(conversation.direct(chosen))
        if len(written) < length:
            logits = rows.next_logits(written[-1])
            if log:
                log.keep(written, rows)
        if len(written) % STEPS_BETWEEN_RETURNS == 0:
            return_freed_memory()
        report(count * len(written))
    tokens = torch.stack(written, dim=1).cpu()
    if log is not None:
        log.finish(tokens)
    return tokens


def _begin_batch(
    opening: list[torch.Tensor],
    rows: Rows,
    conversation: Conversations,
    log: TextLog | None,
    device: torch.device,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Tokens [B] of the first positions, as kept or as every row begins, and the logits [B, V] behind them."""
    written = log.resume(rows, device) if log else []
    if written:
        for tokens in written[len(opening) :]:
            conversation.direct(tokens)
        rows.rollback(len(written) - 1)
        return written, rows.next_logits(written[-1])
    for tokens in opening:
        logits = rows.next_logits(tokens)
    return opening, logits


def _first_tokens(writer: Writer, opening: list[int], chances: torch.Tensor) -> list[torch.Tensor]:
    """What every row begins with, [B] each: these tokens, else one drawn at random."""
    if opening:
        return [torch.full((len(chances),), token, device=writer.device) for token in opening][: chances.shape[1]]
    return [(chances[:, 0] * writer.vocab_size).long()]


def draw(logits: torch.Tensor, chances: torch.Tensor) -> torch.Tensor:
    """Draw a token of each row from the softmax of logits [B, V]: where its running sum passes a chance in [0, 1)."""
    drawn = (_draw(*part) for part in zip(logits.split(DRAWN), chances.split(DRAWN), strict=True))
    return torch.cat(list(drawn))


def _draw(logits: torch.Tensor, chances: torch.Tensor) -> torch.Tensor:
    """A span of tokens first, then a token within it: a running sum over all of them would cost the most."""
    weights = pad((logits - logits.amax(dim=-1, keepdim=True)).exp_(), (0, -logits.shape[1] % SPAN))
    spans = weights.view(len(weights), -1, SPAN)
    sums = spans.sum(dim=-1).double().cumsum(dim=-1)
    goals = chances * sums[:, -1]
    span = _passing(sums, goals)
    row = torch.arange(len(spans), device=spans.device)
    before = torch.where(span > 0, sums[row, (span - 1).clamp_min(0)], 0.0)
    return span * SPAN + _passing(spans[row, span].double().cumsum(dim=-1), goals - before)


def _passing(sums: torch.Tensor, goals: torch.Tensor) -> torch.Tensor:
    """Where running sums [B, n] pass the goals [B]; no further than the last place that adds something."""
    last = (sums < sums[:, -1:]).sum(dim=-1)
    return torch.minimum(torch.searchsorted(sums, goals[:, None], right=True)[:, 0], last)
