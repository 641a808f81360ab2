"""Draw what `quantize --bits auto` chooses from."""

from collections.abc import Sequence

from rich.table import Table

from quasar_cli.render import as_bytes, facts_table, number_table
from quasar_core.bench.verifiers.choose import Choice, Row


def candidates_table(candidates: Sequence[str], heads: Sequence[int]) -> Table:
    """What may be tried."""
    widths = ", ".join(map(str, heads))
    return facts_table(
        [("candidates", "; ".join(candidates)), ("head", f"{widths} bits with each"), ("chosen by", "speed of exact")]
    )


def choice_table(choice: Choice) -> Table:
    """Every candidate, what was chosen first; those that were not worth solving at the end."""
    title = f"Verifiers, by simulation over {choice.tokens:,} tokens of held-out text ({_target(choice)})"
    streamed = ("a confirm reads", "ms a confirm") if choice.streams else ()
    table = number_table(title, "codes", "head", "size", "agreement", "ms a pass", *streamed, "tokens/s")
    tried = [row for row in choice.rows if row.agreement is not None]
    for row in (*tried, *(row for row in choice.rows if row.agreement is None)):
        table.add_row(*_cells(row, row == choice.best, choice.streams))
    return table


def _target(choice: Choice) -> str:
    """What the full-precision model does."""
    if choice.streams:
        return "blocks of the target are read from the disk at each confirm"
    return f"the target alone: {choice.confirm_ms:.3g} ms a pass, {1000 / choice.confirm_ms:.1f} tokens/s"


def _cells(row: Row, chosen: bool, streams: bool) -> list[str]:
    """A candidate that was not solved has the rate that it could reach at most."""
    codes = f"{row.body.describe()}{' (chosen)' if chosen else ''}"
    known = row.agreement is not None
    agreement = f"{row.agreement:.4f}" if known else "not solved"
    rate = f"{'' if known else 'at most '}{row.rate:.1f}" if row.rate else "does not fit"
    read = [as_bytes(row.moved), f"{row.confirm_ms:.3g}"] if streams else []
    return [codes, str(row.head), as_bytes(row.size), agreement, f"{row.verify_ms:.3g}", *read, rate]
