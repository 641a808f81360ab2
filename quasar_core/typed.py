"""Build values of declared types from parsed JSON: nothing is converted, nothing is guessed."""

import types
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
_LARGEST = 2**63
_NAMES = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def build(kind: type[T], content: Any, where: str = "") -> T:
    """`content` as the type `kind`: a dataclass from an object, lists, tuples, objects, unions and plain values.

    ValueError that names the place, such as "rows[2].stats.steps must be a whole number, not a text", also for fields
    that a dataclass does not have or needs, and for whole numbers of more than 64 bits.
    """
    value: T = _build(kind, content, where)
    return value


def known_part(kind: type, content: Any) -> Any:
    """An object without what the dataclass `kind` has no fields for; anything else as it is."""
    if not isinstance(content, dict):
        return content
    return {name: value for name, value in content.items() if name in _fields(kind)[0]}


def _build(kind: Any, content: Any, where: str) -> Any:
    if kind is Any:
        return content
    if is_dataclass(kind):
        return _build_dataclass(kind, content, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _build_union(arguments, content, where)
    if origin is Literal:
        _require(content in arguments and type(content) in map(type, arguments), where, f"one of {arguments}", content)
        return content
    if list in (origin, kind) or origin is tuple:
        _require(isinstance(content, list), where, "a list", content)
        inner = arguments[0] if arguments else Any
        return (origin or list)(_build(inner, item, f"{where}[{i}]") for i, item in enumerate(content))
    if origin is dict or kind is dict:
        _require(isinstance(content, dict), where, "an object", content)
        inner = arguments[1] if arguments else Any
        return {key: _build(inner, value, _inside(where, key)) for key, value in content.items()}
    return _plain(kind, content, where)


def _plain(kind: type, content: Any, where: str) -> Any:
    allowed = (int, float) if kind is float else (kind,)
    _require(type(content) in allowed, where, _name(kind), content)
    if type(content) is int and abs(content) > _LARGEST:
        raise ValueError(f"{where or 'it'} is a number of more than 64 bits")
    return content


def _build_union(kinds: tuple[Any, ...], content: Any, where: str) -> Any:
    """Build the one kind that fits; else tell what is wrong within the one that could, or name all that could be."""
    wrong: list[str] = []
    for kind in kinds:
        try:
            return _build(kind, content, where)
        except ValueError as error:
            wrong.append(str(error))
    own = f"{where or 'it'} must be "
    inner = next((sentence for sentence in wrong if not sentence.startswith(own)), None)
    if inner is None:
        _require(False, where, " or ".join(map(_name, kinds)), content)
    raise ValueError(inner)


def _build_dataclass(kind: Any, content: Any, where: str) -> Any:
    _require(isinstance(content, dict), where, "an object", content)
    known, needed = _fields(kind)
    for name in content:
        if name not in known:
            raise ValueError(f"{_inside(where, name)} is not known")
    for name in needed:
        if name not in content:
            raise ValueError(f"{_inside(where, name)} is missing")
    return kind(**{name: _build(known[name], value, _inside(where, name)) for name, value in content.items()})


@cache
def _fields(kind: Any) -> tuple[dict[str, Any], list[str]]:
    """A dataclass's fields with their types, and the names of those without a default."""
    hints = get_type_hints(kind)
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    return {f.name: hints[f.name] for f in fields(kind)}, needed


def _name(kind: Any) -> str:
    """A type in a sentence."""
    return "an object" if is_dataclass(kind) else _NAMES.get(get_origin(kind) or kind, str(kind))


def _inside(where: str, name: str) -> str:
    return f"{where}.{name}" if where else str(name)


def _require(holds: bool, where: str, wanted: str, content: Any) -> None:
    if not holds:
        found = _name(type(content))
        raise ValueError(f"{where or 'it'} must be {wanted}, not {found}")
