"""An answer coloured by who made each token, or with brackets where there are no colours."""

from itertools import groupby

from rich.text import Text

from quasar_core.trace import MAKERS, Maker, Trace, TracedToken

# Colours that all kinds of colour vision tell apart; a style beside each, for terminals that change colours.
STYLES: dict[Maker, str] = {
    "draft": "black on bright_cyan",
    "bonus": "",
    "target": "underline bright_yellow",
    "corrected": "bold white on dark_orange3",
    "prompt": "dim",
}
BRACKETS: dict[Maker, tuple[str, str]] = {
    "draft": ("[", "]"),
    "bonus": ("", ""),
    "target": ("<", ">"),
    "corrected": ("{", "}"),
    "prompt": ("", ""),
}
MEANINGS: dict[Maker, str] = {
    "draft": "drafted, and accepted",
    "bonus": "the verify pass's own",
    "target": "the confirm's own, behind a window that it accepted whole",
    "corrected": "corrected by the confirm",
    "prompt": "from the prompt's pass",
}


def coloured(trace: Trace) -> Text:
    """The text with a style for each maker."""
    text = Text()
    for token in trace.tokens:
        text.append(token.text, STYLES[token.origin.by])
    return text


def bracketed(trace: Trace) -> Text:
    """The text with brackets around what each draft, confirm or correction gave."""
    text = Text()
    for (maker, _), run in groupby(trace.tokens, _run):
        open_, close = BRACKETS[maker]
        text.append(f"{open_}{''.join(token.text for token in run)}{close}")
    return text


def _run(token: TracedToken) -> tuple[Maker, int]:
    """Tokens that stand in one bracket: of one maker, in one step."""
    return token.origin.by, token.origin.step


def legend(trace: Trace, in_colour: bool) -> Text:
    """What each colour or bracket means, with how many of the tokens it is; nothing where the logs do not tell."""
    if not trace.tokens:
        return Text("Who made each token is not known.")
    lines = Text()
    for maker in MAKERS:
        count = sum(token.origin.by == maker for token in trace.tokens)
        if count:
            open_, close = BRACKETS[maker]
            mark = Text("text", STYLES[maker]) if in_colour else Text(f"{open_}text{close}")
            tokens = "token" if count == 1 else "tokens"
            lines += Text.assemble(mark, f"  {MEANINGS[maker]}: {count} {tokens}\n")
    lines.rstrip()
    return lines
