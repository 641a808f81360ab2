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
    for i, token in enumerate(window):
        luck = torch.rand((), generator=generator, device=p.device)
        if luck * q[i, token] >= p[i, token]:
            return i, int(draw(residual(p[i], q[i])[None], generator))
    return len(window), int(draw(p[-1:], generator))


def residual(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The normalised positive part of p − q [V]; p itself where rounding leaves nothing of it."""
    rest = (p - q).clamp_min(0)
    total = rest.sum()
    return rest / total if total > 0 else p
