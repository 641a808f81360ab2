"""Tools: which form of tool calls a model's template teaches, and reading calls in that form out of a text."""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from quasar_core.serve.errors import refused

Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ToolCall:
    """A call: the function's name, and its arguments as a JSON text."""

    name: str
    arguments: str

    def as_json(self) -> dict[str, Any]:
        """The form of OpenAI's clients, with an id of its own."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


class ToolForm(Protocol):
    """How calls stand in a text: from `opening` to `closing`, or to the end where that is None.

    `special` are tokens that decoding drops and that are part of the form; `only_first` calls begin the answer.
    `keeps_strict`: whether calls that a model makes by itself can be held to their tools' schemas.
    """

    opening: str
    closing: str | None
    special: tuple[str, ...]
    only_first: bool
    keeps_strict: bool

    def read(self, block: str, tools: Tools) -> list[ToolCall] | None:
        """The calls of a block, marks included; None where it holds none."""
        ...

    def grammar(self, tools: Tools, served_tokens: Mapping[str, int]) -> str | None:
        """A grammar, in Lark, of an answer that is one call; None where none is known."""
        ...


class TaggedCalls:
    """`<tool_call>{"name": …, "arguments": …}</tool_call>`: Qwen, Hermes, SmolLM3; or with `<function=…>`: Qwen3.5.

    The latter has its own writing of values, in which no grammar of ours holds a schema.
    """

    opening = "<tool_call>"
    closing: str | None = "</tool_call>"
    special: tuple[str, ...] = ("<tool_call>", "</tool_call>")
    only_first = False

    def __init__(self, as_json: bool = True) -> None:
        self.keeps_strict = as_json

    def read(self, block: str, tools: Tools) -> list[ToolCall] | None:
        """One call."""
        inner = block.removeprefix(self.opening).removesuffix("</tool_call>").strip()
        call = (
            _parameters_call(inner, tools) if inner.startswith("<function=") else _json_call(_parse(inner), "arguments")
        )
        return None if call is None else [call]

    def grammar(self, tools: Tools, served_tokens: Mapping[str, int]) -> str | None:
        """The JSON form."""
        begin, end = (mark if mark in served_tokens else json.dumps(mark) for mark in ("<tool_call>", "</tool_call>"))
        return f'start: {begin} "\\n" call "\\n" {end}\ncall: %json {_call_schema(tools, "arguments")}\n'


class BareCalls:
    """`{"name": …, "parameters": …}` as the whole answer: Llama 3."""

    opening = "{"
    closing: str | None = None
    special: tuple[str, ...] = ()  # <|python_tag|> may stand before it, and is dropped
    only_first = True
    keeps_strict = True

    def read(self, block: str, tools: Tools) -> list[ToolCall] | None:
        """Calls one after another, between semicolons or white space."""
        calls, rest = [], block.strip()
        while rest:
            try:
                value, end = json.JSONDecoder().raw_decode(rest)
            except (ValueError, RecursionError):
                return None
            call = _json_call(value, "parameters")
            if call is None:
                return None
            calls.append(call)
            rest = rest[end:].lstrip("; \n")
        return calls or None

    def grammar(self, tools: Tools, served_tokens: Mapping[str, int]) -> str | None:
        """One call."""
        return f"start: %json {_call_schema(tools, 'parameters')}\n"


class ListedCalls:
    """`[TOOL_CALLS][{"name": …, "arguments": …}]`, or `[TOOL_CALLS]name[ARGS]{…}`: Mistral."""

    opening = "[TOOL_CALLS]"
    closing: str | None = None
    special: tuple[str, ...] = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
    only_first = False
    keeps_strict = False

    def read(self, block: str, tools: Tools) -> list[ToolCall] | None:
        """All calls to the end."""
        listed = _parse(block.removeprefix(self.opening).strip())
        if isinstance(listed, list):
            calls = [_json_call(value, "arguments") for value in listed]
        else:
            calls = [self._named(part) for part in block.split(self.opening) if part.strip()]
        found = [call for call in calls if call is not None]
        return found if found and len(found) == len(calls) else None

    def grammar(self, tools: Tools, served_tokens: Mapping[str, int]) -> str | None:
        """None: the forms differ between versions."""
        return None

    @staticmethod
    def _named(part: str) -> ToolCall | None:
        found = re.fullmatch(r"\s*([\w.-]+)(?:\[CALL_ID\]\w+)?\s*(?:\[ARGS\])?\s*(\{.*\})\s*", part, re.DOTALL)
        arguments = _parse(found.group(2)) if found else None
        return (
            ToolCall(found.group(1), json.dumps(arguments, ensure_ascii=False))
            if found and arguments is not None
            else None
        )


def form_of(template: str) -> ToolForm:
    """The form of calls that a chat template teaches; ApiError where it takes no tools."""
    if "tools" in template:
        if "[TOOL_CALLS]" in template:
            return ListedCalls()
        if "<tool_call>" in template:
            return TaggedCalls(as_json="<function=" not in template)
        if '"parameters"' in template or "python_tag" in template:
            return BareCalls()
    raise refused(
        "This model's chat template takes no tools in a form that is known here.", "tools", "unsupported_field"
    )


def read_tools(value: Any) -> list[dict[str, Any]]:
    """The checked `tools` of a request."""
    if not isinstance(value, list) or len(value) > 256:
        raise refused("tools must be a list of at most 256 functions.", "tools")
    for tool in value:
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise refused('Each of tools must be {"type": "function", "function": {"name": …}}.', "tools")
        if not isinstance(function.get("parameters", {}), dict):
            raise refused("The parameters of a tool must be a JSON schema.", "tools")
        if function.get("strict") not in (None, True, False):
            raise refused("strict of a tool must be true or false.", "tools")
    return value


def loosened(tools: Tools) -> list[dict[str, Any]]:
    """The tools with no schema for the arguments of those that are not strict."""
    functions = [tool["function"] for tool in tools]
    return [
        {"type": "function", "function": function if function.get("strict") else {"name": function["name"]}}
        for function in functions
    ]


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _json_call(value: Any, arguments: str) -> ToolCall | None:
    """A call of an object; models mix the two names of the arguments up."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    given = value.get(arguments, value.get("arguments", value.get("parameters", {})))
    text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    return ToolCall(value["name"], text)


def _parameters_call(inner: str, tools: Tools) -> ToolCall | None:
    """`<function=name><parameter=a>…</parameter></function>`; what is no text by the tool's schema is read as JSON."""
    found = re.fullmatch(r"<function=([^>\n]+)>(.*)</function>", inner, re.DOTALL)
    if found is None:
        return None
    name, body = found.groups()
    types = _types(name, tools)
    given: dict[str, Any] = {}
    for key, text in re.findall(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", body, re.DOTALL):
        value = None if types.get(key) == "string" else _parse(text)
        given[key] = text if value is None and text.strip() != "null" else value
    return ToolCall(name, json.dumps(given, ensure_ascii=False))


def _types(name: str, tools: Tools) -> dict[str, Any]:
    for tool in tools:
        if tool["function"]["name"] == name:
            properties = tool["function"].get("parameters", {}).get("properties")
            listed = properties.items() if isinstance(properties, dict) else ()
            return {key: value.get("type") for key, value in listed if isinstance(value, dict)}
    return {}


def _call_schema(tools: Tools, arguments: str) -> str:
    """The JSON schema of a call to one of the tools."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                arguments: tool["function"].get("parameters") or {"type": "object"},
            },
            "required": ["name", arguments],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return json.dumps(calls[0] if len(calls) == 1 else {"anyOf": calls})
