"""Confirm a window token by token: what `confirm_block` is compared with."""

from collections.abc import Sequence

import torch

from quasar_core.decode.sampling import draw, residual


def confirm_by_token(
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
