"""Fidelity without either model in memory: the rows go through the blocks of one model, then of the other.

Both then answer `fidelity.measure_fidelity` as any model does, on those rows alone. Letters: T tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quasar_core.errors import QuasarError, UsageError
from quasar_core.kernels.linear import PackedLinear
from quasar_core.malloc import return_freed_memory
from quasar_core.models.base import CausalLM
from quasar_core.models.context import UNLIMITED, position_limit
from quasar_core.quantize.blocks.activations import (
    blocks_replaced_by,
    capture_first_inputs,
    embedding_device,
    output_form,
)
from quasar_core.quantize.blocks.streaming import StreamedModel, find_blocks
from quasar_core.quantize.calibration import (
    GREEDY_FROM,
    Calibration,
    calibration_name,
    cut_rows,
    encode,
    read_documents,
)
from quasar_core.quantize.conversation import text_opening
from quasar_core.quantize.fidelity import agreement_on, kernel_divergence, measure_fidelity, token_kinds
from quasar_core.records import FidelityReport, KernelPrice, Progress, no_progress

KERNEL_ROWS = 4
TEXT_LENGTH, TEXT_ROWS = 512, 64  # of a user's text


class RowsRead(CausalLM):
    """Runs passes over whole rows that the model has read."""

    def __init__(self, ends: PreTrainedModel, texts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Take texts [n, T] and what they leave behind the last block [n, T, hidden]."""
        self._ends, self._form = ends, output_form(ends)
        self._finished = {
            tuple(row.tolist()): hidden[index : index + 1] for rows, hidden in texts for index, row in enumerate(rows)
        }

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return int(self._ends.config.get_text_config().vocab_size)

    @property
    def device(self) -> torch.device:
        """Where the logits are computed."""
        return embedding_device(self._ends)

    def new_cache(self, capacity: int) -> "NoCache":
        """Return a cache that holds nothing, since every pass is a whole row."""
        return NoCache(capacity)

    @torch.inference_mode()
    def forward(self, tokens: Sequence[int], cache: "NoCache", last_only: bool = False) -> torch.Tensor:
        """Float32 logits [T, V] of a row ([1, V] with `last_only`); a defect where it was not read."""
        return next(self.pieces(tokens, len(tokens) - 1 if last_only else 0, len(tokens)))

    @torch.inference_mode()
    def pieces(self, tokens: Sequence[int], first: int, size: int) -> Iterator[torch.Tensor]:
        """Float32 logits [size, V] of a row, from position `first` on; the last piece may be shorter."""
        hidden = self._finished[tuple(tokens)].to(self.device, self._ends.dtype)
        blocks = find_blocks(self._ends)[1]

        def finished(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return hidden[:, begin : begin + size]

        for begin in range(first, len(tokens), size):
            ids = torch.tensor([list(tokens[begin : begin + size])], device=self.device)
            with blocks_replaced_by(blocks, finished, self._form):
                logits = self._ends(input_ids=ids, use_cache=False).logits[0]
            yield logits.float()


class NoCache:
    """A cache that holds nothing."""

    length = 0

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity

    def rollback(self, length: int) -> None:
        """Nothing was written."""


class Readable(Protocol):
    """A model that can be had block by block."""

    count: int
    device: torch.device

    def block(self, index: int) -> torch.nn.Module:
        """The block of that number."""
        ...

    def ends(self, device: torch.device | None = None) -> PreTrainedModel:
        """Embedding, final norm and head."""
        ...


def read_rows(model: Readable, texts: Sequence[torch.Tensor], stage: str, progress: Progress = no_progress) -> RowsRead:
    """Let every row of texts [n, T] pass through the blocks, each of which is in memory once."""
    states = read_states(model, texts, stage, progress)
    return RowsRead(model.ends(), list(zip(texts, states, strict=True)))


def read_unknown(
    target: Readable,
    texts: Sequence[torch.Tensor],
    known: Sequence[torch.Tensor | None],
    progress: Progress = no_progress,
) -> RowsRead:
    """The target with every row of texts [n, T]; those whose hidden states are not known pass through its blocks."""
    unread = [rows for rows, hidden in zip(texts, known, strict=True) if hidden is None]
    states = iter(read_states(target, unread, "measuring fidelity: target", progress) if unread else ())
    found = [next(states) if hidden is None else hidden for hidden in known]
    return RowsRead(target.ends(), list(zip(texts, found, strict=True)))


@torch.inference_mode()
def read_states(
    model: Readable, texts: Sequence[torch.Tensor], stage: str, progress: Progress = no_progress
) -> list[torch.Tensor]:
    """The outputs of the last block [n, T, hidden] for every row of texts [n, T]."""
    on_host = model.ends(torch.device("cpu"))
    states = [capture_first_inputs(on_host, rows, model.device) for rows in texts]
    for index in range(model.count):
        progress(stage, index, model.count)
        block = model.block(index)
        for activations in states:
            activations.advance(block)
        return_freed_memory()
    progress(stage, model.count, model.count)
    return [activations.hidden for activations in states]


@torch.inference_mode()
def read_beside(
    target: Readable, verifier: Readable, rows: torch.Tensor, stage: str, progress: Progress = no_progress
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """The outputs of both models' last blocks [n, T, hidden] for rows [n, T], which the verifier reads as `exact` does.

    That is, behind each window it reads the target's keys and values; and whether any block's attention let it.
    """
    activations = capture_first_inputs(target.ends(torch.device("cpu")), rows, target.device)
    activations.keep_reference()
    found = False
    for index in range(target.count):
        progress(stage, index, target.count)
        found |= activations.advance_both(verifier.block(index), target.block(index), windows=True)
        return_freed_memory()
    progress(stage, target.count, target.count)
    assert activations.reference is not None
    return activations.reference.hidden, activations.hidden, found


def measure(
    target: Readable,
    verifier: Readable,
    calibration: Calibration,
    progress: Progress = no_progress,
    kinds: torch.Tensor | None = None,
    in_use: Readable | None = None,
) -> FidelityReport:
    """Fidelity of a verifier on held-out rows and on the target's own greedy text; `kinds` [V]: the kind of a token.

    It reads both alone, and greedy text once more as `exact` reads it, beside the target. `in_use` is the same verifier
    with the kernel that decoding runs, whose price is measured too.
    """
    texts = [calibration.held_out[:, :-1], calibration.greedy[:, :-1]]  # the last token is only predicted
    stage = "measuring fidelity: verifier beside target"
    theirs, states, is_beside = read_beside(target, verifier, texts[1], stage, progress)
    p = read_unknown(target, texts, [calibration.held_out_hidden, theirs], progress)
    q = read_rows(verifier, texts, "measuring fidelity: verifier", progress)
    cache = p.new_cache(max(rows.shape[1] for rows in texts))
    held_out, greedy, name = calibration.held_out, calibration.greedy, calibration.name
    report = measure_fidelity(p, q, cache, held_out, greedy, GREEDY_FROM, name, progress, kinds)
    if is_beside:
        beside = RowsRead(verifier.ends(), [(texts[1], states)])
        agreement, margins = agreement_on(p, beside, cache, greedy, GREEDY_FROM, progress)
        report = replace(report, agreement_beside=agreement, margins=margins)
    return report if in_use is None else replace(report, in_use=measure_kernel(p, q, in_use, calibration, progress))


def measure_kernel(
    target: RowsRead, exact: RowsRead, in_use: Readable, calibration: Calibration, progress: Progress = no_progress
) -> KernelPrice | None:
    """What the kernel that decoding runs adds, on a few held-out rows; None where it is the dequantized product.

    Both other models have read the rows.
    """
    packed = [module for module in in_use.block(0).modules() if isinstance(module, PackedLinear)]
    names = sorted({module.choice.kernel.name for module in packed})
    if names == ["dense"]:
        return None
    rows = calibration.held_out[:KERNEL_ROWS]
    read = read_rows(in_use, [rows[:, :-1]], "measuring the kernel in use", progress)
    return kernel_divergence(target, exact, read, target.new_cache(rows.shape[1]), rows, ", ".join(names))


def measure_on_text(
    target: StreamedModel,
    verifier: StreamedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    progress: Progress = no_progress,
) -> FidelityReport:
    """Fidelity of a verifier, of any tool's making, on a user's text: a file, or a name that the hub serves.

    Raises UsageError for a text that is missing, unreadable or too short, QuasarError where the two models have
    vocabularies of different sizes.
    """
    if verifier.vocab_size != target.vocab_size:
        raise QuasarError(
            f"The checkpoint has {verifier.vocab_size} tokens and the model {target.vocab_size}: "
            "they do not belong together."
        )
    rows = _cut_rows(text, tokenizer, position_limit(target.skeleton.config.get_text_config()) or UNLIMITED)
    p = read_rows(target, [rows[:, :-1]], "measuring fidelity: target", progress)
    q = read_rows(verifier, [rows[:, :-1]], "measuring fidelity: verifier", progress)
    kinds = token_kinds(tokenizer, target.vocab_size)
    name = calibration_name(text)
    return measure_fidelity(p, q, p.new_cache(rows.shape[1]), rows, None, 1, name, progress, kinds)


def _cut_rows(text: str, tokenizer: PreTrainedTokenizerBase, context: int) -> torch.Tensor:
    """The text's first tokens in rows [n, L] of at most `TEXT_LENGTH`; a text of less is one row."""
    tokens: list[int] = []
    for document in read_documents(text, "--text"):
        tokens += encode(document, tokenizer)
        if len(tokens) >= TEXT_ROWS * TEXT_LENGTH:
            break
    if len(tokens) < 2:
        raise UsageError(f"--text {text} holds {len(tokens)} tokens; at least 2 are needed.")
    opening = text_opening(tokenizer)
    return cut_rows(tokens, opening, min(TEXT_LENGTH, context, len(opening) + len(tokens)))[:TEXT_ROWS]
