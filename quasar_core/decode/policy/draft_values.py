"""What a draft is worth to the target: in one pass, and in those that follow.

A draft that a pass does not check to its end is there for the next one, where the pass's own token is the draft's. So
copied text comes in runs: while one lasts, tokens ÷ seconds of its passes is what counts, and a token more in this pass
has to beat what it would bring in the next, not the rate at which text without drafts goes on.
"""

from collections.abc import Sequence

from quasar_core.decode.costs.pass_costs import Cost


def worths_at_target(
    window: int,
    survival: float,
    chances: Sequence[float],
    confirm: Cost,
    rate: float,
    rests: Sequence[float] | None = None,
) -> list[float]:
    """What a target pass is worth, in tokens, by how many of the draft's tokens stand behind the window.

    1 + s·Σ_{i≤j} a_1⋯a_i − rate·confirm(W + 1 + j) + s·a_1⋯a_{j+1}·R_{j+1}, for a window of W tokens that are right
    with probability s, and draft tokens that are right with chances a_i, each if those before are. The `rests` R_m
    depend on neither W nor s, and may be given.
    """
    rests = rests or worths_of_rest(chances, confirm, rate)
    tokens, worths = 1.0, []
    for length, chance in enumerate((*chances, 0.0)):
        survival *= chance  # that the token behind these is the draft's too: passed or not, it becomes text
        worths.append(tokens - rate * confirm(window + 1 + length) + survival * rests[length + 1])
        tokens += survival
    return worths


def worths_of_rest(chances: Sequence[float], confirm: Cost, rate: float) -> list[float]:
    """R_m for m from 0 to k + 1: what is left of a draft of k tokens is worth once its first m are text.

    The best of target passes over it, R_m = max_j (1 + Σ_{i≤j} a_{m+1}⋯a_{m+i} − rate·confirm(1 + j) +
    a_{m+1}⋯a_{m+j+1}·R_{m+j+1}), and 0 where that is less: other drafts turn up too.
    """
    padded, count = (*chances, 0.0), len(chances)
    spent = [rate * confirm(1 + length) for length in range(count + 1)]
    rests = [0.0] * (count + 2)
    for done in range(count - 1, 0, -1):
        tokens, alive, best = 1.0, 1.0, 0.0
        for length in range(count - done + 1):
            alive *= padded[done + length]
            best = max(best, tokens - spent[length] + alive * rests[done + length + 1])
            tokens += alive
        rests[done] = best
    return rests
