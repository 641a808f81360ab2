"""The tools of a request: which are offered, which must be called, and which calls are held to their schemas."""

from dataclasses import dataclass
from typing import Any

from quasar_core.decode.logits.triggered_grammar import Trigger
from quasar_core.serve.errors import refused
from quasar_core.serve.fields import Fields
from quasar_core.serve.served import END_OF_THINKING, THINK, Served
from quasar_core.serve.structure import compiled
from quasar_core.serve.tools import ToolForm, form_of, loosened, read_tools


@dataclass(frozen=True)
class Tooling:
    """`offered` tools; one of `forced` must be called; with `strict`, calls by the model's own choice are held."""

    offered: list[dict[str, Any]]
    form: ToolForm | None = None
    forced: tuple[dict[str, Any], ...] = ()
    strict: bool = False

    @property
    def held(self) -> bool:
        """Whether a grammar holds calls."""
        return bool(self.forced) or self.strict

    def grammar(self, served: Served) -> str:
        """The grammar of a call, its opening included; ApiError where there is none."""
        assert self.form is not None
        field = "tool_choice" if self.forced else "tools"
        lark = self.form.grammar(self.forced or loosened(self.offered), served.added_tokens)
        if lark is None or (self.strict and not self.form.keeps_strict):
            named = "A call that must be made" if self.forced else "strict, with tool_choice auto,"
            raise refused(f"{named} is not served for this model's form of calls.", field, "unsupported_field")
        return compiled(lambda: served.grammars.of_lark(lark), "tools")

    def trigger(self, served: Served, inside: bool, special: bool) -> Trigger:
        """What begins a call in an answer, which thinking may precede; `special`: whether special tokens are text."""
        assert self.form is not None
        return Trigger(
            self.form.opening,
            only_first=self.form.only_first,
            thinking=(THINK, END_OF_THINKING) if served.thinks else None,
            inside=inside,
            shown=tuple(served.added_tokens) if special else shown_in(served, self.form),
            closes=self.form.closing is not None,
        )


def shown_in(served: Served, form: ToolForm | None) -> tuple[str, ...]:
    """Special tokens that are text in an answer, as they are marks in it."""
    return (*(form.special if form else ()), *((THINK, END_OF_THINKING) if served.thinks else ()))


def read_tooling(fields: Fields, served: Served) -> Tooling:
    """`tools` and `tool_choice`."""
    given, choice = fields.take("tools", []), fields.take("tool_choice", "auto")
    tools = read_tools(given)
    if not tools or choice == "none":
        if choice not in ("auto", "none"):
            raise refused("tool_choice goes with tools.", "tool_choice")
        return Tooling([])
    form = form_of(served.template)
    if choice == "auto":
        return Tooling(tools, form, strict=any(tool["function"].get("strict") for tool in tools))
    if choice == "required":
        return Tooling(tools, form, tuple(tools))
    called = choice.get("function") if isinstance(choice, dict) else None
    name = called.get("name") if isinstance(called, dict) else None
    forced = tuple(tool for tool in tools if tool["function"]["name"] == name)
    if not forced:
        raise refused("tool_choice must be none, auto, required, or one of the tools.", "tool_choice")
    return Tooling(tools, form, forced)
