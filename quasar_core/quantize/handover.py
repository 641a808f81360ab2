"""From a finished working folder to a recorded pair: steps that a run which ended between them can repeat.

The lock lies in the folder until the last step. An output that holds one is finished, and not yet handed over.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from quasar_core.errors import QuasarError, UsageError
from quasar_core.files import sync
from quasar_core.quantize.job import Job, take_lock
from quasar_core.records import QuantizeReport
from quasar_core.store import list_pairs
from quasar_core.store.folders import (
    LOCK,
    clear_commits,
    put_back,
    reached,
    read_card,
    remove_verifier,
    set_aside,
    set_aside_before,
)

Record = Callable[[], object]


def whole_report(job: Job, folder: Path) -> QuantizeReport | None:
    """Read the report of a folder that a run of this identity has finished; None where none has."""
    card = read_card(folder)
    if card is None or card.get("run") != job.digest():
        return None
    try:
        report = QuantizeReport.from_dict(card["report"])
    except (KeyError, TypeError, AttributeError):
        return None  # of another version
    return replace(report, checkpoint=str(job.output))


def hand_over(job: Job, record: Record) -> None:
    """Give the whole working folder its name, clear what is left of the work, record the pair."""
    reached("described")
    sync(job.partial)
    set_aside(job.output)
    reached("set aside")
    job.partial.rename(job.output)
    finish_output(job, record)


def finish_output(job: Job, record: Record) -> None:
    """Clear and record a finished output; whatever fails or interrupts, its place is said."""
    with _saying_where(job.output):
        sync(job.output.parent)
        reached("in place")
        clear_commits(job.output)
        reached("commits cleared")
        for place in set_aside_before(job.output):
            remove_verifier(place)
        reached("replaced one removed")
        record()
        reached("recorded")
        (job.output / LOCK).unlink(missing_ok=True)
        reached("unlocked")


def finish_earlier(job: Job, record: Record, resume: bool) -> QuantizeReport | None:
    """Finish what a run that ended too early left in the output; its report where that run had this identity.

    A finished verifier of this identity that no pair names is recorded, not made again. None where there is work to do.
    """
    for folder in (job.partial, job.output):
        _refuse_busy(job, folder / LOCK)
    if whole_report(job, job.partial) is None:
        put_back(job.output)
    if read_card(job.output) is None:
        return None
    report = whole_report(job, job.output) if resume else None
    lock = job.output / LOCK
    if not lock.exists():
        known = any(pair.verifier == str(job.output) for pair in list_pairs())
        if report is None or known:
            return None
        finish_output(job, record)
        return report
    card = read_card(job.output) or {}
    same_target = (card.get("target") or {}).get("fingerprint") == job.fingerprint
    with lock.open("a+") as held:
        take_lock(held.fileno(), job.output)
        finish_output(job, record if same_target else lambda: None)
    return report


def _refuse_busy(job: Job, lock: Path) -> None:
    """Refuse an output while another run may be about to hand over its work."""
    if lock.exists():
        with lock.open("a+") as held:
            take_lock(held.fileno(), job.output)


@contextlib.contextmanager
def _saying_where(output: Path) -> Iterator[None]:
    """Say at every failure that the verifier exists, and how to go on."""
    where = f"The verifier is finished in {output}; the same command records it, and makes nothing again."
    try:
        yield
    except OSError as error:
        raise QuasarError(f"{error.filename or output}: {error.strerror or error}. {where}") from error
    except UsageError as error:
        raise UsageError(f"{error} {where}") from error
    except QuasarError as error:
        raise QuasarError(f"{error} {where}") from error
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(where) from error
