"""Rolling a cache back: keys and values to any position, recurrent states to positions whose states were kept."""

from typing import Protocol, TypeGuard, runtime_checkable


@runtime_checkable
class StateCache(Protocol):
    """A cache that keeps states, and wants to know which of them are still of use."""

    def reachable(self, length: int) -> int:
        """The farthest position up to `length` that it can go back to."""
        ...

    def settle(self, length: int) -> None:
        """Nobody goes back before `length` any more, but for the next text, to where its prompt begins to differ."""
        ...


def reachable(cache: object, length: int) -> int:
    """The farthest position up to `length` that a cache can go back to."""
    return cache.reachable(length) if _keeps_states(cache) else length


def settle(cache: object, length: int) -> None:
    """Tell a cache that the tokens before `length` are decided."""
    if _keeps_states(cache):
        cache.settle(length)


def _keeps_states(cache: object) -> TypeGuard[StateCache]:
    kind = type(cache)
    if kind not in _KEEP_STATES:  # looking a protocol's methods up takes longer than most else of a step
        _KEEP_STATES[kind] = isinstance(cache, StateCache)
    return _KEEP_STATES[kind]


_KEEP_STATES: dict[type, bool] = {}
