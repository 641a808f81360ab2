"""A batch of rows that a model writes: its columns so far, and what else was asked of its passes.

Letters: B rows, L positions, V vocabulary, K likeliest tokens.
"""

from dataclasses import dataclass, replace

import torch

from quasar_core.quantize.conversation import Conversations
from quasar_core.quantize.logit_rows import likeliest
from quasar_core.quantize.text_log import TOKENS, Columns, TextLog
from quasar_core.quantize.text_writers import Rows

LIKELIEST, CHANCES, HIDDEN = "likeliest", "chances", "hidden"  # columns beside the tokens


@dataclass(frozen=True)
class Asked:
    """What passes are to tell beside tokens: of the first `counted` rows the `width` likeliest tokens behind each.

    Of the other rows, with `hidden`, what each position leaves behind the last block.
    """

    counted: int = 0
    width: int = 0
    hidden: bool = False

    def from_row(self, begin: int) -> "Asked":
        """What is asked of the rows from that one on."""
        return replace(self, counted=max(self.counted - begin, 0))


NOTHING = Asked()


class Batch:
    """Rows that march in step, each of `length` tokens; kept in a log where there is one."""

    def __init__(self, rows: Rows, count: int, length: int, asked: Asked, log: TextLog | None) -> None:
        self._rows, self._length, self._asked, self._log = rows, length, asked, log
        self._counts = asked.counted > 0 and asked.width > 0
        self._remembers = asked.hidden and asked.counted < count
        beside = [LIKELIEST, CHANCES] * self._counts + [HIDDEN] * self._remembers
        self._columns: Columns = {name: [] for name in (TOKENS, *beside)}

    def __len__(self) -> int:
        return len(self._columns[TOKENS])

    def begin(self, opening: list[torch.Tensor], conversation: Conversations) -> torch.Tensor:
        """Take what is kept, else what every row begins with, [B] each; return the logits [B, V] behind it."""
        if self._log and self._log.resume(self._columns, self._rows, opening[0].device):
            passed = self._columns[TOKENS]
            for chosen in passed[len(opening) :]:
                conversation.direct(chosen)
            self._rows.rollback(len(passed) - 1)
            return self._rows.next_logits(passed[-1])
        for tokens in opening:
            logits = self._pass(tokens)
        return logits

    def add(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Take the next token of each row [B]; return the logits [B, V] behind it, none where nothing asks for them."""
        if len(self) + 1 == self._length and not self._counts:
            self._columns[TOKENS].append(tokens)
            return None
        logits = self._pass(tokens)
        if self._log:
            self._log.keep(self._columns, self._rows)
        return logits

    def finish(self) -> dict[str, torch.Tensor]:
        """The columns beside one another, which are kept: tokens [B, L], the others [·, L or L − 1, K or hidden]."""
        whole = {name: torch.stack(column, dim=1).cpu() for name, column in self._columns.items()}
        if self._log:
            self._log.finish(whole)
        return whole

    def _pass(self, tokens: torch.Tensor) -> torch.Tensor:
        logits, columns = self._rows.next_logits(tokens), self._columns
        columns[TOKENS].append(tokens)
        if self._counts:
            found, chances = likeliest(logits[: self._asked.counted], self._asked.width)
            columns[LIKELIEST].append(found)
            columns[CHANCES].append(chances)
        if self._remembers:
            assert self._rows.hidden is not None
            columns[HIDDEN].append(self._rows.hidden[self._asked.counted :].clone())
        return logits
