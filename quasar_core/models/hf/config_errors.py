"""Turn what transformers raises for a config into one sentence that names the option."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quasar_core.errors import QuasarError, foreign_errors, reason
from quasar_core.models.config.options import wrong_option
from quasar_core.store.text_part import text_part

# How huggingface_hub's strict dataclasses, which configs are, begin what they say, and how they name types.
_FIELD, _CLASS = re.compile(r"Validation error for field '(\w+)'"), "Class validation error"
_EXPECTED = re.compile(r"expected (a list|\w+), got")
_NAMES = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number with a point",
    "str": "a text",
    "a list": "a list",
    "dict": "an object",
    "NoneType": "null",
}
_LONGEST = 60  # characters of a value


@contextmanager
def config_errors(failed: str, path: Path, content: Mapping[str, Any]) -> Iterator[None]:
    """Raise QuasarError for what transformers raises within: which option is wrong, else what failed and why."""
    try:
        with foreign_errors(failed):
            yield
    except QuasarError as error:
        cause = error.__cause__
        wrong = (_wrong_field(cause, content) or wrong_option(text_part(dict(content)))) if cause else None
        if wrong is None:
            raise
        raise QuasarError(f"{path} is not a model's config: {wrong}.") from cause


def _wrong_field(error: BaseException, content: Mapping[str, Any]) -> str | None:
    """What a strict dataclass refuses; None for other errors."""
    said = str(error)
    if said.startswith(_CLASS):
        return reason(error.__cause__ or error)
    if not (field := _FIELD.match(said)):
        return None
    name, kinds = field[1], dict.fromkeys(_NAMES[kind] for kind in _EXPECTED.findall(said) if kind in _NAMES)
    if not kinds:
        return f"{name}: {reason(error.__cause__ or error)}"
    value = json.dumps(_value_of(name, content), ensure_ascii=False)
    shown = value if len(value) <= _LONGEST else f"{value[:_LONGEST]}..."
    return f"{name} must be {' or '.join(kinds)}, not {shown}"


def _value_of(name: str, content: Mapping[str, Any]) -> Any:
    """An option's value, of a part's config where the whole has none; None where no config has it."""
    if name in content:
        return content[name]
    parts = (_value_of(name, part) for part in content.values() if isinstance(part, Mapping))
    return next((value for value in parts if value is not None), None)
