"""Which layer gets how many bits: the least sum of costs that a budget of bytes allows. Pure.

Costs are measured one layer at a time and taken to add up. On each layer's lower convex hull of cost over bytes, steps
are taken in the order of what a byte saves; this is optimal up to the last step (Shoham and Gersho, 1988).
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """One way to store a layer (or layers that must be stored alike): its bits, group size and bytes, and its cost."""

    bits: int
    group_size: int
    size: int
    cost: float


def allocate(choices: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, Choice]:
    """A choice for every name, in at most `budget` bytes; ValueError where the smallest choices exceed it."""
    hulls = {name: lower_hull(options) for name, options in choices.items()}
    taken = {name: hull[0] for name, hull in hulls.items()}
    left = budget - sum(choice.size for choice in taken.values())
    if left < 0:
        raise ValueError(f"the smallest choices take {budget - left} bytes, and the budget is {budget}")
    steps = [(_slope(hull[0], hull[1]), name, 1) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, name, index = heapq.heappop(steps)
        hull = hulls[name]
        growth = hull[index].size - hull[index - 1].size
        if growth > left:
            continue  # a later, smaller step of another layer may still fit
        taken[name], left = hull[index], left - growth
        if index + 1 < len(hull):
            heapq.heappush(steps, (_slope(hull[index], hull[index + 1]), name, index + 1))
    return taken


def lower_hull(options: Sequence[Choice]) -> list[Choice]:
    """The choices that are best for some price of a byte, by size: from one to the next a byte saves ever less."""
    hull: list[Choice] = []
    for choice in sorted(options, key=lambda option: (option.size, option.cost)):
        if hull and choice.cost >= hull[-1].cost:
            continue  # larger and no better
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(small: Choice, large: Choice) -> float:
    """Change of the cost for a byte more; negative."""
    return (large.cost - small.cost) / (large.size - small.size)
