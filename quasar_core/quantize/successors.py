"""Count the target's likeliest successors of the last few tokens over the calibration text, for early drafts.

Letters: N texts of L tokens, K likeliest tokens of a row.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from quasar_core.draft.successor_file import write_successors
from quasar_core.draft.successors import KnownSuccessors, count_successors, width_of
from quasar_core.errors import QuasarError, UsageError, foreign_errors
from quasar_core.models.base import CausalLM
from quasar_core.models.context import UNLIMITED, position_limit
from quasar_core.quantize.blocks.streaming import StreamedModel
from quasar_core.quantize.calibration import load_calibration
from quasar_core.quantize.fidelity import logit_pieces
from quasar_core.quantize.job import Job
from quasar_core.quantize.logit_rows import Likeliest, likeliest
from quasar_core.quantize.measure_fidelity import read_rows
from quasar_core.quantize.text_plan import Free, free_on, open_writer, plan_text
from quasar_core.records import Progress, no_progress
from quasar_core.store.folders import read_card
from quasar_core.system import free_memory

MOST_READ = 1 << 17  # tokens whose rows are computed; of a longer text the first


@torch.inference_mode()
def read_likeliest(model: CausalLM, samples: torch.Tensor, progress: Progress = no_progress) -> Likeliest:
    """The likeliest tokens behind those of samples [N, L], which the model has read or can read."""
    tokens, chances = list[torch.Tensor](), list[torch.Tensor]()
    cache = model.new_cache(samples.shape[1])
    for done, row in enumerate(samples.tolist()):
        progress("counting successors", done, len(samples))
        for logits in logit_pieces(model, cache, row, 0):
            found, own = likeliest(logits, width_of(logits.shape[-1]))
            tokens.append(found)
            chances.append(own)
    progress("counting successors", len(samples), len(samples))
    shape = (*samples.shape, -1)
    return Likeliest(torch.cat(tokens).view(shape), torch.cat(chances).view(shape))


def known_successors(samples: torch.Tensor, found: Likeliest) -> KnownSuccessors:
    """The successors of the contexts in samples [N, L]; of more rows, what is likeliest behind the first N counts."""
    best, odds = found.tokens[: len(samples)], found.chances[: len(samples)]
    return count_successors(samples.numpy().astype(np.int64), best.numpy().astype(np.int64), odds.numpy())


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
    if not width_of(target.vocab_size):
        raise QuasarError(f"A vocabulary of {target.vocab_size:,} tokens is too large for a file of successors.")
    limit = position_limit(target.skeleton.config.get_text_config()) or UNLIMITED
    writer = open_writer(job.source, target, plan_text(job.source, target, Free(free_memory(), free_on(target.device))))
    config = replace(job.config, rounding="gptq")  # which reads text
    calibration = load_calibration(writer, tokenizer, config, limit, progress, by_target=True)
    del writer
    samples, found = calibration.samples[: rows_to_count(calibration.samples)], calibration.likeliest
    if found is None:
        read = read_rows(target, [samples], "reading the text", progress)
        found = read_likeliest(read, samples, progress)
    with foreign_errors(f"{job.output} cannot be written to"):
        return write_successors(job.output, known_successors(samples, found), job.config.calibration)
