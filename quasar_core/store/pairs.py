"""Record and find the pairs that `quasar quantize` made, and the one in use: home()/pairs.json."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote

from quasar_core.errors import QuasarError, UsageError
from quasar_core.files import absolute, is_folder, locked, read_json_if_there, write_json
from quasar_core.store.folders import CARD, home, may_be_replaced, relate, remove_verifier
from quasar_core.typed import build

FORMAT_VERSION = 1


@dataclass(frozen=True)
class PairRecord:
    """One target and its verifier: `target` is a name that resolve_model finds, `verifier` an absolute folder.

    `added`: the verifier was made elsewhere, so that its folder is never removed from here.
    """

    name: str
    target: str
    verifier: str
    added: bool = False


@dataclass(frozen=True)
class _Stored:
    """The content of pairs.json."""

    pairs: list[PairRecord]
    current: str | None
    format_version: int = FORMAT_VERSION


def list_pairs() -> list[PairRecord]:
    """Every recorded pair, the oldest first."""
    return _read()[0]


def current_pair() -> PairRecord | None:
    """The pair that commands use when no model is named; None where there is none."""
    pairs, current = _read()
    return next((pair for pair in pairs if pair.name == current), None)


def pair_named(name: str) -> PairRecord | None:
    """The recorded pair of that name; None where there is none."""
    return next((pair for pair in list_pairs() if pair.name == name), None)


def find_pair(name: str) -> PairRecord:
    """The recorded pair of that name; UsageError that lists the known ones."""
    return _find(list_pairs(), name)


def record_pair(target: str, verifier: Path, name: str | None = None, added: bool = False) -> PairRecord:
    """Record a pair and make it the current one; a pair with the same verifier folder is replaced.

    `target` is a ModelSource's name, so that it is found again from anywhere. The pair is named `name`, else after the
    verifier's folder, with a number where another pair has that name already.
    """
    folder = str(absolute(verifier))
    with _registry_held():
        others = [pair for pair in list_pairs() if pair.verifier != folder]
        record = PairRecord(_free_name(name or Path(folder).name, others), target, folder, added)
        _write([*others, record], record.name)
    return record


def verifier_folder(named: str | None) -> Path:
    """The folder of a verifier that is named by its path or by a pair's name; else the current pair's."""
    if named is None:
        current = current_pair()
        if current is None:
            raise UsageError("No pair is current: name a CHECKPOINT, or make one with `quasar quantize MODEL`.")
        return Path(current.verifier)
    folder = absolute(Path(named))
    if is_folder(folder):
        return folder
    pairs = list_pairs()
    pair = next((pair for pair in pairs if pair.name == named), None)
    if pair is None:
        raise UsageError(f"{named} is neither a folder here nor a recorded pair; the recorded pairs: {_listed(pairs)}.")
    return Path(pair.verifier)


def check_registry() -> None:
    """QuasarError where no pair could be recorded: said before hours of work, not after."""
    with _registry_held():
        list_pairs()


def use_pair(name: str) -> PairRecord:
    """Make a recorded pair the current one."""
    find_pair(name)  # what is not there is said where nothing can be written too
    with _registry_held():
        pairs = list_pairs()
        record = _find(pairs, name)
        _write(pairs, record.name)
    return record


def remove_pair(name: str, delete_files: bool) -> PairRecord:
    """Forget a pair, and remove its verifier if asked to; the target is never touched.

    Of a folder that quasar wrote here its own files are removed, and the folder if nothing else is in it. Without the
    current pair, none is current. QuasarError, and the pair stays, where the verifier may not be removed.
    """
    with _registry_held():
        pairs, current = _read()
        record = _find(pairs, name)
        if delete_files and is_folder(Path(record.verifier)):
            _remove(record, pairs)
        kept = [pair for pair in pairs if pair != record]
        _write(kept, current if current != record.name else None)
    return record


def _remove(record: PairRecord, pairs: Sequence[PairRecord]) -> None:
    folder = Path(record.verifier)
    instead = f"`quasar models remove {quote(record.name)} --keep-files` forgets the pair alone"
    if record.added:
        raise QuasarError(f"{folder} was added and not made here, so it is not deleted; {instead}.")
    if folder.is_symlink() or not may_be_replaced(folder):
        why = f"was not written by quasar (it has no {CARD} of its own)"
        raise QuasarError(f"{folder} {why}, so it is not deleted; {instead}.")
    targets = [Path(pair.target) for pair in pairs if Path(pair.target).is_absolute()]
    if any(relate(folder, target) == "is" for target in targets):
        raise QuasarError(f"{folder} is the target of a pair, so it is not deleted; {instead}.")
    try:
        remove_verifier(folder)
    except OSError as error:
        raise QuasarError(f"{folder} cannot be deleted: {error.strerror or error}.") from error


@contextmanager
def _registry_held() -> Iterator[None]:
    """No other process changes the registry meanwhile."""
    try:
        with locked(_path()):
            yield
    except OSError as error:
        raise QuasarError(f"{_path()} cannot be written: {error.strerror or error}.") from error


def _path() -> Path:
    return home() / "pairs.json"


def _find(pairs: Sequence[PairRecord], name: str) -> PairRecord:
    for pair in pairs:
        if pair.name == name:
            return pair
    raise UsageError(f"There is no pair {name}; the recorded pairs: {_listed(pairs)}.")


def _listed(pairs: Sequence[PairRecord]) -> str:
    return ", ".join(pair.name for pair in pairs) or "none"


def _free_name(wanted: str, others: Sequence[PairRecord]) -> str:
    taken = {pair.name for pair in others}
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}-{number}"
    return name


def _read() -> tuple[list[PairRecord], str | None]:
    path = _path()
    content = read_json_if_there(path)
    if content is None:
        return [], None
    try:
        stored = build(_Stored, content)
    except ValueError as error:
        raise QuasarError(f"{path} is damaged ({error}): repair it, or delete it and quantize again.") from error
    return stored.pairs, stored.current


def _write(pairs: Sequence[PairRecord], current: str | None) -> None:
    listed = [{key: value for key, value in asdict(pair).items() if value is not False} for pair in pairs]
    write_json(_path(), {"format_version": FORMAT_VERSION, "current": current, "pairs": listed}, alone=True)
