"""Rows of a run that is not finished: appended as they come, so that an interrupted run can go on.

The file stands beside the output as `NAME.partial.jsonl`: the run first, then a line for each conversation, which is
a list of rows, so a line that was cut off takes its whole conversation with it.
"""

import os
from pathlib import Path
from typing import Any

from quasar_core.bench.results import (
    Divergence,
    Results,
    Row,
    Run,
    differing_settings,
    read_results,
    refuse_foreign_results,
    write_results,
)
from quasar_core.errors import QuasarError, UsageError
from quasar_core.files import is_file, json_line, opened, parse_json, write_json_lines
from quasar_core.store.steps import reached
from quasar_core.typed import build


class RowLog:
    """The rows so far, in memory and on disk.

    Opening an earlier log keeps its conversations, apart from failed ones (they are tried again). UsageError when the
    log belongs to a run with other settings.
    """

    def __init__(self, output: Path, run: Run, resume: bool = True) -> None:
        self.output = output
        self.path = output.with_name(output.name + ".partial.jsonl")
        self.run = run
        if not resume:
            refuse_foreign_results(self.path)
        kept = self._kept() if resume and is_file(self.path) else []
        self.rows = [row for conversation in kept for row in conversation]
        write_json_lines(self.path, [run.to_dict(), *map(_rows, kept)])

    def append(self, conversation: list[Row]) -> None:
        """Add the rows of one conversation, at once."""
        self.rows.extend(conversation)
        try:
            with self.path.open("ab") as file:
                file.write(json_line(_rows(conversation)))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise QuasarError(
                f"{self.path} could not be written: {error.strerror or error}. What is finished is kept, and the same "
                "command goes on from there."
            ) from error

    def finish(self, divergences: list[Divergence]) -> Results:
        """Write the result file, and drop the log."""
        results = Results(self.run, self.rows, divergences)
        write_results(results, self.output)
        reached("written")
        self.path.unlink()
        return results

    def _is_left_over(self, earlier: Run, rows: int) -> bool:
        """Whether the run of the log has its result file, and ended before it removed the log."""
        if not self.output.is_file():
            return False
        try:
            results = read_results(self.output)
        except UsageError:
            return False
        return not differing_settings(results.run, earlier) and len(results.rows) >= rows

    def _kept(self) -> list[list[Row]]:
        with opened(self.path) as file:
            header, *lines = file.read().decode("utf-8", errors="replace").split("\n")  # the last may be cut
        try:
            earlier = Run.from_dict(build(dict, parse_json(header)))
            conversations = [[Row.from_dict(row) for row in build(list, parse_json(line))] for line in lines[:-1]]
        except (ValueError, UsageError) as error:
            raise QuasarError(f"{self.path} is damaged; pass --no-resume to start anew.") from error
        differences = differing_settings(earlier, self.run)
        if differences and self._is_left_over(earlier, sum(map(len, conversations))):
            return []
        if differences:
            changed = ", ".join(f"{name} {before}, now {now}" for name, before, now in differences)
            raise UsageError(
                f"{self.path} belongs to a run with other settings ({changed}); "
                "repeat them to finish it, or pass --no-resume to start anew."
            )
        return [conversation for conversation in conversations if not any(row.error for row in conversation)]


def _rows(conversation: list[Row]) -> list[dict[str, Any]]:
    return [row.to_dict() for row in conversation]
