"""Count what the target says behind the last few tokens, over the calibration text, for drafts to begin with.

Letters: N texts of L tokens, K likeliest tokens of a row.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from quasar_core.draft.successor_file import write_successors
from quasar_core.draft.successors import MOST_TOKENS, WIDTH, KnownSuccessors, count_successors
from quasar_core.errors import QuasarError, UsageError, foreign_errors
from quasar_core.models.base import CausalLM
from quasar_core.models.context import UNLIMITED, position_limit
from quasar_core.quantize.blocks.streaming import StreamedModel
from quasar_core.quantize.calibration import load_calibration
from quasar_core.quantize.fidelity import logit_pieces
from quasar_core.quantize.job import Job
from quasar_core.quantize.measure_fidelity import read_rows
from quasar_core.quantize.solve import cpp
from quasar_core.quantize.text_plan import Free, free_on, open_writer, plan_text
from quasar_core.records import Progress, no_progress
from quasar_core.store.folders import read_card
from quasar_core.system import free_memory

MOST_READ = 1 << 17  # tokens whose rows are computed; of a longer text the first


@torch.inference_mode()
def known_successors(model: CausalLM, samples: torch.Tensor, progress: Progress = no_progress) -> KnownSuccessors:
    """The successors of the contexts in samples [N, L], which the model has read or can read."""
    rows = samples[: rows_to_count(samples)]
    best, odds = list[torch.Tensor](), list[torch.Tensor]()
    cache = model.new_cache(samples.shape[1])
    for done, row in enumerate(rows.tolist()):
        progress("counting successors", done, len(rows))
        for logits in logit_pieces(model, cache, row, 0):
            tokens, chances = likeliest(logits, min(WIDTH, logits.shape[-1]))
            best.append(tokens)
            odds.append(chances)
    progress("counting successors", len(rows), len(rows))
    shape = (*rows.shape, -1)
    return count_successors(
        rows.numpy().astype(np.int64),
        torch.cat(best).view(shape).numpy().astype(np.int64),
        torch.cat(odds).view(shape).numpy(),
    )


def likeliest(logits: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the `width` likeliest tokens of rows of logits [T, V], best first, and their chances, on the CPU."""
    if cpp.runs(logits):
        return cpp.likeliest(logits, width)
    chances, tokens = logits.softmax(dim=-1).topk(width, dim=-1)
    return tokens.cpu(), chances.float().cpu()


def can_be_counted(vocabulary: int) -> bool:
    """Whether a vocabulary of so many tokens fits the file's keys."""
    return vocabulary <= MOST_TOKENS


def rows_to_count(samples: torch.Tensor) -> int:
    """How many of the samples [N, L] are read, one at least."""
    return min(max(MOST_READ // samples.shape[1], 1), len(samples))


def add_successors(
    job: Job, target: StreamedModel, tokenizer: PreTrainedTokenizerBase, progress: Progress = no_progress
) -> Path:
    """Count successors for a verifier that was made before, on the text that the job's config names; return the file.

    Raises UsageError where the output is no verifier of this target, or the vocabulary is too large for the file.
    """
    made_from = (read_card(job.output) or {}).get("target")
    if not isinstance(made_from, dict) or made_from.get("fingerprint") != job.fingerprint:
        raise UsageError(f"{job.output} is no verifier of {job.target_name}: name it with --output, or make one first.")
    if not can_be_counted(target.vocab_size):
        raise QuasarError(f"A vocabulary of {target.vocab_size:,} tokens is too large for a file of successors.")
    limit = position_limit(target.skeleton.config.get_text_config()) or UNLIMITED
    writer = open_writer(job.source, target, plan_text(job.source, target, Free(free_memory(), free_on(target.device))))
    config = replace(job.config, rounding="gptq")  # which reads text
    samples = load_calibration(writer, tokenizer, config, limit, progress).samples
    del writer
    samples = samples[: rows_to_count(samples)]
    read = read_rows(target, [samples], "reading the text", progress)
    with foreign_errors(f"{job.output} cannot be written to"):
        return write_successors(job.output, known_successors(read, samples, progress), job.config.calibration)
