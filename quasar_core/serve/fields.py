"""Read the fields of a request one by one; what is left over is refused by name."""

from collections.abc import Iterable, Mapping
from typing import Any

from quasar_core.serve.errors import refused

# They name the caller or what the answer is for, and no answer depends on them.
LABELS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})
# Fields that are not served, with the values that ask for nothing.
IDLE: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "use_beam_search": (False,),
    "spaces_between_special_tokens": (True,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "bad_words": ([],),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "include_reasoning": (True,),
    "priority": (0,),
    "cache_prompt": (True,),
}


class Fields:
    """The fields of a body that were not read yet; null counts as absent. `within` is the field that holds them."""

    def __init__(self, body: Mapping[str, Any], within: str = "") -> None:
        self._within = f"{within}." if within else ""
        self._left = {name: value for name, value in body.items() if value is not None and name not in LABELS}

    def take(self, name: str, default: Any = None) -> Any:
        """A field as it is."""
        return self._left.pop(name, default)

    def flag(self, name: str, default: bool = False) -> bool:
        """A field that is true or false."""
        value = self._left.pop(name, default)
        if not isinstance(value, bool):
            raise refused(f"{self._within}{name} must be true or false.", self._within + name)
        return value

    def whole(self, name: str, least: int, most: int | None = None) -> int | None:
        """A whole number, or None where the field is absent."""
        value = self._left.pop(name, None)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        fits = isinstance(value, int) and not isinstance(value, bool)
        if not fits or value < least or (most is not None and value > most):
            bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise refused(f"{self._within}{name} must be a whole number {bounds}.", self._within + name)
        return int(value)

    def number(self, name: str, least: float, most: float, default: float) -> float:
        """A number."""
        value = self._left.pop(name, default)
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        if not fits or not least <= value <= most:  # NaN is within no bounds
            raise refused(f"{self._within}{name} must be a number from {least:g} to {most:g}.", self._within + name)
        return float(value)

    def one_of(self, name: str, choices: Iterable[str], default: str) -> str:
        """One of several words."""
        value = self._left.pop(name, default)
        if value not in choices:
            raise refused(f"{self._within}{name} must be one of {', '.join(choices)}.", self._within + name)
        return str(value)

    def mapping(self, name: str) -> dict[str, Any]:
        """An object; an empty one where the field is absent."""
        value = self._left.pop(name, {})
        if not isinstance(value, dict):
            raise refused(f"{self._within}{name} must be an object.", self._within + name)
        return value

    def end(self) -> None:
        """Refuse what was not read."""
        for name, value in self._left.items():
            if name not in IDLE or value not in IDLE[name]:
                raise refused(f"{self._within}{name} is not served here.", self._within + name, "unsupported_field")
