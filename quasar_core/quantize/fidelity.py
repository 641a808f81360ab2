"""Compute how faithful a verifier is: agreement, divergence, perplexity, P(agree | margin); by position and kind.

Letters: T rows, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from transformers import PreTrainedTokenizerBase

from quasar_core.malloc import return_freed_memory
from quasar_core.models.base import CausalLM, KVCache, refuse_odd_logits
from quasar_core.quantize.solve import cpp
from quasar_core.records import FidelityReport, FidelitySlice, KernelPrice, MarginTable, Progress, no_progress

KINDS = ("letters", "digits", "punctuation", "whitespace", "part of a character", "special")


def token_kinds(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> torch.Tensor:
    """For each of `vocab_size` ids an index into `KINDS`; ids that the tokenizer does not know count as special."""
    known = min(vocab_size, len(tokenizer))
    texts = tokenizer.batch_decode([[token] for token in range(known)], clean_up_tokenization_spaces=False)
    special = set(tokenizer.all_special_ids)
    names = ["special" if token in special else kind_of(text) for token, text in enumerate(texts)]
    return torch.tensor([KINDS.index(name) for name in names + ["special"] * (vocab_size - known)])


def kind_of(text: str) -> str:
    """A token with a letter counts as letters, else one with a digit as digits."""
    if "\ufffd" in text:
        return "part of a character"
    if any(character.isalpha() for character in text):
        return "letters"
    if any(character.isdigit() for character in text):
        return "digits"
    return "punctuation" if text.strip() else "whitespace"


MARGIN_BINS = 16
# Tokens whose logits are held at once: at least, at most, and between these as many as make so many logits.
PIECE, LARGEST_PIECE, PIECE_LOGITS = 64, 256, 128 * 49_152
COMPARED_VALUES = 2**18  # logits that are compared at once, with their copies in a processor's caches


@runtime_checkable
class ReadsInPieces(Protocol):
    """A model that need not hold all logits of a row at once."""

    def pieces(self, tokens: Sequence[int], first: int, size: int) -> Iterator[torch.Tensor]:
        """Float32 logits [size, V] of a row, from position `first` on; the last piece may be shorter."""
        ...


def piece_of(vocabulary: int) -> int:
    """How many tokens' logits are held at once: fewer where the vocabulary is large."""
    return max(PIECE, min(LARGEST_PIECE, PIECE_LOGITS // vocabulary))


def kl_divergence(target: torch.Tensor, verifier: torch.Tensor) -> torch.Tensor:
    """KL(target ‖ verifier) in nats, per row of logits [T, V] → [T]."""
    log_p, log_q = target.log_softmax(dim=-1), verifier.log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def margins(logits: torch.Tensor, best: torch.Tensor | None = None) -> torch.Tensor:
    """Difference of the two best logits per row → [T]; `best` [T] are the places of the first of them."""
    first = (logits.argmax(dim=-1) if best is None else best)[:, None]
    others = logits.scatter(1, first, -torch.inf)  # PyTorch's topk takes ten times as long on a CPU
    return logits.gather(1, first)[:, 0] - others.amax(dim=-1)


def margin_table(margin: torch.Tensor, agreed: torch.Tensor, bins: int = MARGIN_BINS) -> MarginTable:
    """Count agreement in bins whose populations grow with the margin: disagreements sit at the smallest margins.

    In 16 bits two logits may tie: no margin lies below 0, so an edge there would have an empty bin.
    """
    levels = torch.linspace(0, 1, bins + 1, dtype=torch.double)[1:-1] ** 2
    edges = torch.quantile(margin.double(), levels).unique()
    edges = edges[edges > 0]
    index = torch.searchsorted(edges, margin.double(), right=True)
    counts = torch.bincount(index, minlength=len(edges) + 1)
    hits = torch.bincount(index, weights=agreed.double(), minlength=len(edges) + 1)
    return MarginTable(edges.tolist(), counts.tolist(), [round(h) for h in hits.tolist()])


@dataclass
class Tally:
    """Values of all tokens predicted so far, and of their positions in the row."""

    kl: list[torch.Tensor] = field(default_factory=list)
    # Σ min(p, q) per row: the chance that a token drawn from the verifier passes a confirm at temperature 1.
    overlap: list[torch.Tensor] = field(default_factory=list)
    agreed: list[torch.Tensor] = field(default_factory=list)
    margin: list[torch.Tensor] = field(default_factory=list)
    tokens: list[torch.Tensor] = field(default_factory=list)
    positions: list[torch.Tensor] = field(default_factory=list)
    target_nll: float = 0.0
    verifier_nll: float = 0.0

    def add(self, target: torch.Tensor, verifier: torch.Tensor, tokens: torch.Tensor, first: int) -> None:
        """Logits [T, V] of both at positions that precede `tokens` [T], the first of which is at position `first`.

        Raises QuasarError where they are not numbers.
        """
        refuse_odd_logits(target)
        refuse_odd_logits(verifier)
        if cpp.runs(target) and cpp.runs(verifier):
            self._add_compared(cpp.compare_logits(target, verifier, tokens))
        else:
            rows = max(1, COMPARED_VALUES // target.shape[-1])
            for part in zip(target.split(rows), verifier.split(rows), tokens.split(rows), strict=True):
                self._add(*part)
        self.tokens.append(tokens.cpu())
        self.positions.append(torch.arange(first, first + len(tokens)))

    def _add(self, target: torch.Tensor, verifier: torch.Tensor, tokens: torch.Tensor) -> None:
        """Add a few rows, each of whose logarithms is taken once."""
        log_p, log_q = target.log_softmax(dim=-1), verifier.log_softmax(dim=-1)
        p, q = log_p.exp(), log_q.exp()
        self.target_nll -= log_p.gather(1, tokens[:, None]).sum().item()
        self.verifier_nll -= log_q.gather(1, tokens[:, None]).sum().item()
        self.kl.append(log_p.sub_(log_q).mul_(p).sum(dim=-1).cpu())
        self.overlap.append(torch.minimum(p, q, out=q).sum(dim=-1).cpu())
        best = verifier.argmax(dim=-1)
        self.agreed.append((target.argmax(dim=-1) == best).cpu())
        self.margin.append(margins(verifier, best).cpu())

    def _add_compared(self, found: cpp.Compared) -> None:
        """Add rows that C++ has compared."""
        self.target_nll += found.target_nll.double().sum().item()
        self.verifier_nll += found.verifier_nll.double().sum().item()
        self.kl.append(found.kl.clone())
        self.overlap.append(found.overlap.clone())
        self.agreed.append(found.target_best == found.verifier_best)
        self.margin.append(found.margin.clone())

    def slices(self, names: list[str], index: torch.Tensor) -> list[FidelitySlice]:
        """One slice for each name that a token's `index` [n] points to."""
        kl, agreed = torch.cat(self.kl).double(), torch.cat(self.agreed).double()
        chosen = [(name, index == i) for i, name in enumerate(names)]
        return [
            FidelitySlice(name, int(mask.sum()), agreed[mask].mean().item(), kl[mask].mean().item())
            for name, mask in chosen
            if mask.any()
        ]

    def by_position(self) -> list[FidelitySlice]:
        """Bands of positions that double in length: from 1 to 15, from 16 to 31, and so on."""
        bands = torch.cat(self.positions).double().log2().floor().long().clamp_min(3) - 3
        names = [f"{8 << i if i else 1} to {(16 << i) - 1}" for i in range(int(bands.max()) + 1)]
        return self.slices(names, bands)

    def by_kind(self, kinds: torch.Tensor) -> list[FidelitySlice]:
        """Slices by the kind of the token that is predicted; `kinds` [V] are indices into `KINDS`."""
        return self.slices(list(KINDS), kinds[torch.cat(self.tokens)])


@torch.inference_mode()
def measure_fidelity(
    target: CausalLM,
    verifier: CausalLM,
    cache: KVCache,
    held_out: torch.Tensor,
    greedy: torch.Tensor | None,
    greedy_from: int,
    text_name: str,
    progress: Progress = no_progress,
    kinds: torch.Tensor | None = None,
) -> FidelityReport:
    """Compare both models on held-out rows [n, L] and on greedy rows, whose first `greedy_from` tokens do not count.

    `agreement` and the margin table come from the greedy rows (the target's own greedy text), everything else from
    the held-out ones; without greedy rows, all does. `kinds` [V] is the kind of each token.
    """
    sampled, own = Tally(), Tally()
    total = len(held_out) + (0 if greedy is None else len(greedy))

    def report(done: int) -> None:
        progress("measuring fidelity", done, total)

    _compare(target, verifier, cache, held_out, 1, sampled, report)
    if greedy is None:
        own = sampled
    else:
        _compare(target, verifier, cache, greedy, greedy_from, own, lambda done: report(len(held_out) + done))
    report(total)
    kl = torch.cat(sampled.kl)
    return FidelityReport(
        text=text_name,
        tokens=kl.numel(),
        agreement=share(own.agreed),
        agreement_sampled=share(sampled.agreed),
        overlap=torch.cat(sampled.overlap).mean().item(),
        kl_mean=kl.double().mean().item(),
        kl_p99=torch.quantile(kl.double(), 0.99).item(),
        perplexity_target=math.exp(sampled.target_nll / kl.numel()),
        perplexity_verifier=math.exp(sampled.verifier_nll / kl.numel()),
        margins=margin_table(torch.cat(own.margin), torch.cat(own.agreed)),
        by_position=sampled.by_position(),
        by_kind=[] if kinds is None else sampled.by_kind(kinds),
    )


def _compare(
    target: CausalLM,
    verifier: CausalLM,
    cache: KVCache,
    rows: torch.Tensor,
    first: int,
    tally: Tally,
    report: Callable[[int], None],
) -> None:
    """Take every row's tokens from position `first` on into the tally."""
    for done, row in enumerate(rows):
        report(done)
        tokens = row.tolist()
        p = logit_pieces(target, cache, tokens[:-1], first - 1)
        q = logit_pieces(verifier, cache, tokens[:-1], first - 1)
        begin = first
        for own, other in zip(p, q, strict=True):
            tally.add(own, other, row[begin : begin + len(own)].to(own.device), begin)
            begin += len(own)
        return_freed_memory()  # what the tally holds lies among freed logits, which would add up


def logit_pieces(model: CausalLM, cache: KVCache, tokens: list[int], first: int) -> Iterator[torch.Tensor]:
    """Logits of a row from position `first` on, a piece at a time; the cache serves one row and one model."""
    size = piece_of(model.vocab_size)
    if isinstance(model, ReadsInPieces):
        return model.pieces(tokens, first, size)
    cache.rollback(0)
    return iter(model.forward(tokens, cache)[first:].split(size))


@torch.inference_mode()
def agreement_on(
    target: CausalLM,
    verifier: CausalLM,
    cache: KVCache,
    rows: torch.Tensor,
    first: int,
    progress: Progress = no_progress,
) -> tuple[float, MarginTable]:
    """Agreement on rows [n, L] from position `first` on, and P(agree | margin)."""
    tally = Tally()

    def report(done: int) -> None:
        progress("measuring fidelity in exact", done, len(rows))

    _compare(target, verifier, cache, rows, first, tally, report)
    report(len(rows))
    return share(tally.agreed), margin_table(torch.cat(tally.margin), torch.cat(tally.agreed))


@torch.inference_mode()
def kernel_divergence(
    target: CausalLM, exact: CausalLM, in_use: CausalLM, cache: KVCache, rows: torch.Tensor, kernel: str
) -> KernelPrice:
    """Measure KL on rows [n, L] with dequantized weights (`exact`), and with the kernel of decoding (`in_use`)."""
    dequantized, packed = Tally(), Tally()
    _compare(target, exact, cache, rows, 1, dequantized, lambda done: None)
    _compare(target, in_use, cache, rows, 1, packed, lambda done: None)
    kl_exact, kl = torch.cat(dequantized.kl).double(), torch.cat(packed.kl).double()
    return KernelPrice(
        kernel, kl.numel(), kl_exact.mean().item(), kl.mean().item(), share(dequantized.agreed), share(packed.agreed)
    )


def share(parts: list[torch.Tensor]) -> float:
    """The share of what is true."""
    return torch.cat(parts).double().mean().item()
