"""Which tokens a pass accepts; pure. Letters: k draft tokens, W window tokens, V vocabulary.

Each function returns how many of the offered tokens are accepted, and the bonus token that follows them: the
correction where one was refused, the next token where none was.
"""

from collections.abc import Sequence

import torch

from quasar_core.decode.sampling import draw


def accept_matching(choices: Sequence[int], offered: Sequence[int]) -> tuple[int, int]:
    """Accept offered tokens while they equal the model's own choices (k + 1 of them).

    Greedy decoding, and sampling from one-hot drafts: where the choices were drawn from the pass's distribution, the
    accepted tokens and the bonus are draws from it (Leviathan et al., 2023, with a one-hot proposal).
    """
    accepted = 0
    while accepted < len(offered) and choices[accepted] == offered[accepted]:
        accepted += 1
    return accepted, choices[accepted]


def confirm_sampled(
    p: torch.Tensor, q: torch.Tensor, window: Sequence[int], generator: torch.Generator
) -> tuple[int, int]:
    """Accept window token x with probability min(1, p(x) / q(x)); at the first refusal draw from (p − q)+.

    p [W + 1, V] are the target's distributions, q [W, V] the verifier's, from which the window was drawn.
    (Leviathan et al., 2023, Theorem 1; the accepted tokens and the bonus are draws from p.)
    """
    offered = torch.tensor(window, dtype=torch.long, device=p.device)[:, None]
    luck = torch.rand(len(window), generator=generator, device=p.device)
    passed = luck * q.gather(1, offered)[:, 0] < p.gather(1, offered)[:, 0]
    accepted = passed.cumprod(0).sum()[None]  # those before the first refusal; on the device, so nothing waits for it
    refusing_q = q.index_select(0, accepted.clamp_max(len(window) - 1)) * (accepted < len(window))
    bonus = draw(residual(p.index_select(0, accepted), refusing_q), generator)
    count, token = torch.cat((accepted, bonus)).tolist()
    return count, token


def residual(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The normalised positive part of p − q [..., V]; p itself where rounding leaves nothing of it."""
    rest = (p - q).clamp_min(0)
    total = rest.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, rest / total, p)
