"""Structured output: OpenAI's `response_format`, and the same under vLLM's names."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from quasar_core.decode.logits.grammar import ANY_OBJECT
from quasar_core.errors import UsageError
from quasar_core.serve.asks import Common
from quasar_core.serve.errors import of_usage, refused
from quasar_core.serve.fields import Fields
from quasar_core.serve.served import Served

MOST_CHOICES = 1024
GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice"}  # vLLM's older names


@dataclass(frozen=True)
class Structure:
    """A shape that an answer must have, and the field that asks for it."""

    field: str
    kind: str  # json, regex or choice
    value: Any

    def grammar(self, served: Served) -> str:
        """Its grammar; ApiError where there is none."""
        makers: dict[str, Callable[[Any], str]] = {
            "json": served.grammars.of_schema,
            "regex": served.grammars.of_regex,
            "choice": served.grammars.of_choice,
        }
        return compiled(lambda: makers[self.kind](self.value), self.field)


def compiled(make: Callable[[], str], field: str) -> str:
    """A grammar; ApiError that names the field it is of where it cannot be compiled."""
    try:
        return make()
    except UsageError as error:
        wrong = of_usage(error)
        wrong.field = field
        raise wrong from error


def read_structure(fields: Fields, common: Common, served: Served) -> Structure | None:
    """The one shape that the fields ask for; None where the text is free."""
    found = [_response_format(fields), *(_read(fields, name, name, kind) for name, kind in GUIDED.items())]
    asked = [structure for structure in [*found, *_structured_outputs(fields)] if structure is not None]
    if asked:
        require_free_end(common, asked[0].field, served)
    if len(asked) > 1:
        raise refused(f"{asked[1].field} and {asked[0].field} cannot both shape an answer.", asked[1].field)
    return asked[0] if asked else None


def require_free_end(common: Common, field: str, served: Served) -> None:
    """Refuse what would go on behind the end of what a grammar allows."""
    if common.reading.least:
        raise refused(f"min_tokens does not go with {field}: its grammar says where the answer ends.", "min_tokens")
    if not served.pair.eos_ids <= common.ends:
        raise refused(f"ignore_eos does not go with {field}: its grammar says where the answer ends.", "ignore_eos")


def _response_format(fields: Fields) -> Structure | None:
    """A JSON schema, or any object."""
    given = fields.mapping("response_format")
    if not given:
        return None
    inner = Fields(given, "response_format")
    kind = inner.one_of("type", ("text", "json_object", "json_schema"), "text")
    wrapped = Fields(inner.mapping("json_schema"), "response_format.json_schema")
    inner.end()
    if kind == "text":
        return None
    if kind == "json_object":
        return Structure("response_format", "json", ANY_OBJECT)
    for name in ("name", "description", "strict"):
        wrapped.take(name)
    schema = wrapped.take("schema")
    wrapped.end()
    if not isinstance(schema, dict):
        raise refused("response_format: json_schema needs a schema, which is an object.", "response_format")
    return Structure("response_format", "json", schema)


def _structured_outputs(fields: Fields) -> list[Structure | None]:
    """vLLM's `structured_outputs`; it may leave white space out, as JSON is written here in one way only."""
    name = "structured_outputs"
    inner = Fields(fields.mapping(name), name)
    found = [_read(inner, kind, name, kind) for kind in ("json", "regex", "choice")]
    if inner.flag("json_object"):
        found.append(Structure(name, "json", ANY_OBJECT))
    inner.flag("disable_any_whitespace")
    inner.end()
    return found


def _read(fields: Fields, key: str, field: str, kind: str) -> Structure | None:
    """A shape that is given by its value alone."""
    value = fields.take(key)
    if value is None:
        return None
    read: dict[str, Callable[[Any, str], Any]] = {"json": _schema, "regex": _regex, "choice": _choice}
    return Structure(field, kind, read[kind](value, field))


def _schema(value: Any, field: str) -> dict[str, Any]:
    """An object, or the JSON text of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise refused(f"{field}: the schema is no JSON.", field) from None
    if not isinstance(value, dict):
        raise refused(f"{field}: the schema must be an object, or its text.", field)
    return value


def _regex(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value:
        raise refused(f"{field}: the regular expression must be a text.", field)
    return value


def _choice(value: Any, field: str) -> list[str]:
    fits = isinstance(value, list) and 0 < len(value) <= MOST_CHOICES
    if not fits or not all(isinstance(text, str) and text for text in value):
        raise refused(f"{field}: choice must be a list of 1 to {MOST_CHOICES} texts.", field)
    return list(value)
