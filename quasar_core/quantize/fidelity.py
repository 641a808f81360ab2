"""How faithful a verifier is: agreement, divergence, perplexity, P(agree | margin). Letters: T rows, V vocabulary."""

import math
from dataclasses import dataclass, field

import torch

from quasar_core.models.base import CausalLM, KVCache
from quasar_core.records import FidelityReport, MarginTable, Progress, no_progress

MARGIN_BINS = 16


def kl_divergence(target: torch.Tensor, verifier: torch.Tensor) -> torch.Tensor:
    """KL(target ‖ verifier) in nats, per row of logits [T, V] → [T]."""
    log_p, log_q = target.log_softmax(dim=-1), verifier.log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def overlap(target: torch.Tensor, verifier: torch.Tensor) -> torch.Tensor:
    """Σ min(p, q) per row: the chance that a token drawn from the verifier passes a confirm at temperature 1."""
    return torch.minimum(target.softmax(dim=-1), verifier.softmax(dim=-1)).sum(dim=-1)


def margins(logits: torch.Tensor) -> torch.Tensor:
    """Difference of the two best logits per row → [T]."""
    best = logits.topk(2, dim=-1).values
    return best[:, 0] - best[:, 1]


def margin_table(margin: torch.Tensor, agreed: torch.Tensor, bins: int = MARGIN_BINS) -> MarginTable:
    """Count agreement in bins whose populations grow with the margin: disagreements sit at the smallest margins."""
    levels = torch.linspace(0, 1, bins + 1, dtype=torch.double)[1:-1] ** 2
    edges = torch.quantile(margin.double(), levels).unique()
    index = torch.searchsorted(edges, margin.double(), right=True)
    counts = torch.bincount(index, minlength=len(edges) + 1)
    hits = torch.bincount(index, weights=agreed.double(), minlength=len(edges) + 1)
    return MarginTable(edges.tolist(), counts.tolist(), [round(h) for h in hits.tolist()])


@dataclass
class _Tally:
    """Per-position values of all rows read so far."""

    kl: list[torch.Tensor] = field(default_factory=list)
    overlap: list[torch.Tensor] = field(default_factory=list)
    agreed: list[torch.Tensor] = field(default_factory=list)
    margin: list[torch.Tensor] = field(default_factory=list)
    target_nll: float = 0.0
    verifier_nll: float = 0.0

    def add(self, target: torch.Tensor, verifier: torch.Tensor, tokens: torch.Tensor) -> None:
        """Logits [T, V] of both at positions that precede `tokens` [T]."""
        self.kl.append(kl_divergence(target, verifier).cpu())
        self.overlap.append(overlap(target, verifier).cpu())
        self.agreed.append((target.argmax(dim=-1) == verifier.argmax(dim=-1)).cpu())
        self.margin.append(margins(verifier).cpu())
        nll = torch.nn.functional.cross_entropy
        self.target_nll += nll(target, tokens, reduction="sum").item()
        self.verifier_nll += nll(verifier, tokens, reduction="sum").item()


@torch.inference_mode()
def measure_fidelity(
    target: CausalLM,
    verifier: CausalLM,
    cache: KVCache,
    held_out: torch.Tensor,
    greedy: torch.Tensor,
    greedy_from: int,
    text_name: str,
    progress: Progress = no_progress,
) -> FidelityReport:
    """Compare both models on held-out rows [n, L] and on greedy rows, whose first `greedy_from` tokens do not count.

    `agreement` and the margin table come from the greedy rows (the target's own greedy text), everything else from
    the held-out ones.
    """
    sampled, own = _Tally(), _Tally()
    total = len(held_out) + len(greedy)
    for done, row in enumerate([*held_out, *greedy]):
        progress("measuring fidelity", done, total)
        tokens = row.tolist()
        cache.rollback(0)
        p = target.forward(tokens[:-1], cache)
        cache.rollback(0)
        q = verifier.forward(tokens[:-1], cache)
        first = 0 if done < len(held_out) else greedy_from - 1
        tally = sampled if done < len(held_out) else own
        tally.add(p[first:], q[first:], row[first + 1 :].to(p.device))
    progress("measuring fidelity", total, total)
    kl = torch.cat(sampled.kl)
    return FidelityReport(
        text=text_name,
        tokens=kl.numel(),
        agreement=_share(own.agreed),
        agreement_sampled=_share(sampled.agreed),
        overlap=torch.cat(sampled.overlap).mean().item(),
        kl_mean=kl.double().mean().item(),
        kl_p99=torch.quantile(kl.double(), 0.99).item(),
        perplexity_target=math.exp(sampled.target_nll / kl.numel()),
        perplexity_verifier=math.exp(sampled.verifier_nll / kl.numel()),
        margins=margin_table(torch.cat(own.margin), torch.cat(own.agreed)),
    )


def _share(parts: list[torch.Tensor]) -> float:
    return torch.cat(parts).double().mean().item()
