"""Help pages: plain text that is whole at any width, options under the headings of their panels, examples last."""

import re
import shutil
import textwrap
from typing import Any

from typer.core import TyperCommand, TyperGroup

from quasar_core.errors import UsageError

WIDEST, NARROWEST = 80, 32  # columns of a page
# What stands for a value, by the type that typer names in angle brackets; an argument's own name says it.
_VALUES = {"str": "TEXT", "list[str]": "TEXT", "int": "N", "float": "NUMBER", "path": "FILE"}
_HEADINGS = {"argument": "Arguments", "option": "Options"}


def examples(*lines: str) -> str:
    """The end of a help page: lines that can be typed, which are not folded."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


# Options whose file may be left out, with the value that they have then.
BARE = {"--trace": "-"}


def with_values(arguments: list[str]) -> list[str]:
    """Arguments in which an option of `BARE` has its value: the name of a file where one follows, else its own.

    A prompt that follows is no name: it has spaces, or no ending of a few letters. An empty text is meant as a name.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    given = arguments[:end]
    following = [*given[1:], "--"]
    return [
        f"{word}={BARE[word]}" if word in BARE and not _is_file_name(after) else word
        for word, after in zip(given, following, strict=False)
    ] + arguments[end:]


def _is_file_name(word: str) -> bool:
    return re.fullmatch(r"\s*|[^\s-]\S*\.[A-Za-z][A-Za-z0-9]{0,4}|\.[A-Za-z]{1,5}", word) is not None


# What may be an empty text, or is refused where it is used.
TEXTS = {"PROMPT", "--prompt", "--system", "--stop"}
TYPED = "quasar.typed"  # in a context: the values as they were typed, by their parameters' names


def _refuse_empty(command: Any, ctx: Any, arguments: list[str]) -> None:
    """UsageError for a value that is empty, as of a variable of the shell that is not set: it names nothing."""
    if ctx.resilient_parsing:  # completion reads lines that are not finished
        return
    typed, _, _ = command.make_parser(ctx).parse_args(args=list(arguments))
    ctx.meta[TYPED] = typed
    for parameter in command.get_params(ctx):
        value = typed.get(parameter.name)
        name = parameter.metavar if parameter.param_type_name == "argument" else parameter.opts[0]
        values = value if isinstance(value, (list, tuple)) else [value]
        if name not in TEXTS and any(isinstance(each, str) and not each.strip() for each in values):
            raise UsageError(f"{name} must not be empty; see {ctx.command_path} --help.")


class _Page:
    """A help page as wide as the terminal, also where that is narrower than click makes its own."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the page."""
        formatter.width = max(min(shutil.get_terminal_size().columns, WIDEST) - 2, NARROWEST)
        super().format_help(ctx, formatter)  # type: ignore[misc]


class Command(_Page, TyperCommand):
    """A command whose options stand in groups."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments, options that stand without a value included."""
        arguments = with_values(args)
        _refuse_empty(self, ctx, arguments)
        return super().parse_args(ctx, arguments)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options by their panels."""
        _write_parameters(self, ctx, formatter)


class Group(_Page, TyperGroup):
    """A command with commands of its own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the options before the name of a command."""
        if args:  # else the page is shown
            _refuse_empty(self, ctx, args)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options by their panels, then the commands."""
        _write_parameters(self, ctx, formatter)
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        rows = [(name, _first_sentence(command)) for name, command in commands.items()]
        _write_section(formatter, "Commands", rows)


def _first_sentence(command: Any) -> str:
    """All of the first paragraph: a sentence that is cut says nothing."""
    return " ".join((command.help or "").split("\n\n")[0].split())


def _write_parameters(command: Any, ctx: Any, formatter: Any) -> None:
    sections: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record is not None:
            kind = parameter.param_type_name
            heading = getattr(parameter, "rich_help_panel", None) or _HEADINGS[kind]
            sections.setdefault(heading, []).append((_without_types(record[0], kind), record[1]))
    for heading in sorted(sections, key=lambda heading: heading in _HEADINGS.values(), reverse=True):
        _write_section(formatter, heading, sections[heading])


def _without_types(name: str, kind: str) -> str:
    """A parameter's name and its value in words of the field, not in types of Python."""
    if kind == "argument":
        return re.sub(r" <[^>]*>$", "", name)
    return re.sub(r"<([^>|]*)>", lambda found: _VALUES.get(found[1], found[0]), name)


def _write_section(formatter: Any, heading: str, rows: list[tuple[str, str]]) -> None:
    """Names on the left, what they mean beside them; words stay whole, those with hyphens too."""
    with formatter.section(heading):
        indent = formatter.current_indent
        column = min(max(len(name) for name, _ in rows), formatter.width // 3) + 2
        for name, meaning in rows:
            lines = textwrap.wrap(
                meaning, formatter.width - indent - column, break_on_hyphens=False, break_long_words=False
            )
            fits = len(name) <= column - 2
            first = f"{name:{column}}{lines.pop(0) if lines else ''}" if fits else name
            below = [f"{'':{indent + column}}{line}" for line in lines]
            formatter.write("\n".join([f"{'':{indent}}{first}".rstrip(), *below]) + "\n")
