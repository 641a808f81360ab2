"""One quantization: its identity, the folder of its work in progress, its lock, and what was left there before."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quasar_core.config import QuantizeConfig
from quasar_core.errors import QuasarError, UsageError, WriteError
from quasar_core.files import read_json, write_json
from quasar_core.store.folders import COMMITS, IDENTITY, LOCK, partial_folder, refuse_foreign_work, remove_work
from quasar_core.system import package_versions

# How layers are fitted to the text: a run goes on only where its first blocks were made in the same way.
METHOD = "half of the rows beside the target"


@dataclass(frozen=True)
class Job:
    """What to quantize, where to, and how it is computed (`device` and `dtype`, such as cpu and bfloat16)."""

    target_name: str
    source: Path
    fingerprint: str
    output: Path
    config: QuantizeConfig
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def partial(self) -> Path:
        """The folder of the work in progress."""
        return partial_folder(self.output)

    @property
    def commits(self) -> Path:
        """Finished blocks of a run that may be resumed."""
        return self.partial / COMMITS

    @property
    def calibration(self) -> Path:
        """The calibration text, once it is written."""
        return self.commits / "calibration.safetensors"

    @property
    def written_text(self) -> Path:
        """The text that the model writes, as far as it is written."""
        return self.commits / "text"

    @property
    def rounded(self) -> Path:
        """A copy of few bits that writes the text where memory does not hold the model."""
        return self.partial / "rounded"

    @property
    def budget(self) -> Path:
        """The bits that `--target-agreement` found, once it did."""
        return self.commits / "budget.json"

    @property
    def spill(self) -> Path:
        """Where hidden states lie that memory does not hold."""
        return self.partial / "activations"

    def identity(self) -> dict[str, Any]:
        """Collect what a resumed run must share with the one that began."""
        computed = {"device": self.device, "dtype": self.dtype, "calibration method": METHOD}
        config = {**asdict(self.config), "widths": list(self.config.widths)}  # as JSON has it
        return {"target": self.fingerprint, **config, **computed, **package_versions()}

    def digest(self) -> str:
        """Shorten the identity for a checkpoint's card, which tells no path of this machine."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def working_folder(job: Job, resume: bool) -> Iterator[str | None]:
    """Hold the partial folder alone, emptied or with the commits of a run of the same identity.

    Gives what became of an interrupted run, in words; None where there was none, or it was not to be gone on with.
    Raises UsageError where another process works in it, or an interrupted run of another identity lies there. A write
    that fails, as on a full disk, becomes one sentence; what is committed stays.
    """
    with _claim(job):
        try:
            yield _begin(job, resume)
        except (OSError, WriteError) as error:
            failed = str(error).removesuffix(".")
            if isinstance(error, OSError):
                failed = f"{error.filename or job.partial} could not be written ({error.strerror or error})"
            raise QuasarError(
                f"{failed}; what is finished is kept, and the same command goes on from there."
            ) from error
        finally:
            if job.partial.exists() and not anything_finished(job):
                remove_work(job.partial)


def anything_finished(job: Job) -> bool:
    """Tell whether there is a text, or a part of it, or a block to go on from."""
    return any(job.commits.glob("*.safetensors")) or any(job.written_text.glob("*"))


def clear_all_but_commits(job: Job) -> None:
    """Remove what an interrupted run had begun to assemble."""
    for path in job.partial.iterdir():
        if path.is_dir() and path != job.commits:
            shutil.rmtree(path)
        elif path.is_file() and path.name != LOCK:
            path.unlink()


@contextlib.contextmanager
def _claim(job: Job) -> Iterator[None]:
    """Make the working folder where it is missing, and hold it against other runs."""
    refuse_foreign_work(job.partial)
    while True:
        try:
            job.partial.mkdir(parents=True, exist_ok=True)
            lock = (job.partial / LOCK).open("a+")
        except OSError as error:
            raise QuasarError(f"{job.partial} could not be made ({error.strerror}).") from error
        with lock:
            take_lock(lock.fileno(), job.output)
            if not _still_there(lock.fileno(), job.partial / LOCK):
                continue  # another run has just finished, and its folder is the output now
            yield
            return


def take_lock(lock: int, output: Path) -> None:
    """Hold an open lock file; the system gives it up when its process ends, however it ends.

    UsageError where another run holds it, and on Windows, which renames no folder in which a file is open.
    """
    try:
        import fcntl
    except ImportError as error:
        raise UsageError("Quantizing needs Linux or macOS; on Windows, run it in WSL and copy the verifier.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(lock, 32, 0).decode(errors="replace").strip()
        raise UsageError(
            f"Another run (process {holder}) writes {output} at this moment; wait for it, or name another --output."
        ) from error
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)


def _still_there(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _begin(job: Job, resume: bool) -> str | None:
    """Empty the folder, or keep what an interrupted run has finished; what became of that run, in words."""
    state = job.commits / IDENTITY
    interrupted = resume and anything_finished(job)
    if interrupted and state.exists():
        _refuse_other_identity(job, _read_identity(state))
        write_json(state, job.identity())
        return f"going on from an interrupted run: {_describe_finished(job)}"
    shutil.rmtree(job.commits, ignore_errors=True)
    clear_all_but_commits(job)
    job.commits.mkdir()
    write_json(state, job.identity())
    return "beginning anew, as an interrupted run left no word of its options" if interrupted else None


def _describe_finished(job: Job) -> str:
    """Say what there is to go on from."""
    text = "its text" if job.calibration.exists() else "the text so far"
    blocks = sum(1 for _ in job.commits.glob("block-*.safetensors"))
    return f"{text}, {blocks} block{'s' if blocks > 1 else ''}" if blocks else text


def _read_identity(state: Path) -> dict[str, Any]:
    try:
        return read_json(state)
    except QuasarError as error:
        raise QuasarError(f"{error} Pass --no-resume to begin anew.") from error


def _refuse_other_identity(job: Job, begun: dict[str, Any]) -> None:
    """Refuse a run that differs in anything from the one that began."""
    wanted = job.identity()
    differing = [key for key in {**begun, **wanted} if begun.get(key) != wanted.get(key)]
    if differing == ["target_agreement"] and None not in (begun[differing[0]], wanted[differing[0]]):
        differing = differing if job.budget.exists() else []  # until one is found, trials serve any agreement
    if differing:
        changes = ", ".join(f"{key} was {_short(begun.get(key))} and is {_short(wanted.get(key))}" for key in differing)
        raise UsageError(
            f"{job.partial} holds an interrupted run of another kind: {changes}. Run it as it was begun, or pass "
            "--no-resume to begin anew."
        )


def _short(value: object) -> str:
    """Shorten a value for a sentence; a fingerprint to its beginning."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
