"""One quantization: its identity, the folder of its work in progress, its lock, and the blocks that it has finished.

A commit is one safetensors file of a finished block, in the names of the target's files: each layer's packed tensors,
and every other tensor that the verifier has in place of the target's. Its metadata hold, per layer, the loss and how to
read the codes. So it is a shard of the checkpoint: one of `SHARD_BYTES` and more is not written a second time.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from quasar_core.checkpoint.compressed_tensors import CompressedTensorsFormat, PackedWeight, stored_tensors
from quasar_core.checkpoint.gptq_format import QuantizedWeight, unpack_weight
from quasar_core.checkpoint.tensor_files import open_tensors, read_tensor
from quasar_core.checkpoint.writer import save_tensors
from quasar_core.config import QuantizeConfig
from quasar_core.errors import QuasarError, UsageError, WriteError
from quasar_core.files import parse_json, read_json, write_json
from quasar_core.quantize.kept_text import check_sum
from quasar_core.store.folders import COMMITS, IDENTITY, LOCK, partial_folder, refuse_foreign_work, remove_work
from quasar_core.system import package_versions
from quasar_core.typed import build

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
    state = job.commits / IDENTITY
    interrupted = resume and anything_finished(job)
    if interrupted and state.exists():
        _refuse_other_identity(job, _read_identity(state))
        write_json(state, job.identity())
        return f"going on from an interrupted run: {_finished(job)}"
    shutil.rmtree(job.commits, ignore_errors=True)
    clear_all_but_commits(job)
    job.commits.mkdir()
    write_json(state, job.identity())
    return "beginning anew, as an interrupted run left no word of its options" if interrupted else None


def _finished(job: Job) -> str:
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


SHARD_BYTES = 32_000_000  # smaller blocks share a shard, so that a small model is one file
_FACTS = "quasar"  # the metadata's key
Layout = Literal["gptq", "compressed-tensors"]


@dataclass(frozen=True)
class QuantizedBlock:
    """The quantized layers of one block by full name, the relative loss of each, and what else the verifier holds.

    `tensors` are named as the model names its parameters: smoothed norms and biases.
    `rounded` are experts' layers with too few samples, rounded to nearest. `layout` is how the codes are stored.
    """

    weights: dict[str, PackedWeight]
    losses: dict[str, float]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    rounded: tuple[str, ...] = ()
    layout: Layout = "gptq"

    def dense(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight [out, in] that stands in the verifier for the layer of that name."""
        return self.weights[name].dequantize(dtype)


class Width(NamedTuple):
    """How a layer's codes are stored."""

    bits: int
    group_size: int


@dataclass(frozen=True)
class CommitSummary:
    """What a report says of a block: the loss of each layer (None from another tool), those rounded, sizes.

    `own_tensors` are what the verifier holds in place of the target's beside codes, such as norms.
    """

    losses: dict[str, float | None]
    rounded: tuple[str, ...]
    widths: dict[str, Width]
    packed_weights: int
    packed_bytes: int
    own_tensors: tuple[str, ...]


@dataclass(frozen=True)
class _Layer:
    """How to read a layer's codes, and what its report says; `stored` is its name in the file."""

    stored: str
    bits: int
    group_size: int
    suffixes: list[str]
    weights: int
    bytes: int
    loss: float | None


@dataclass(frozen=True)
class _Facts:
    """What a commit's metadata hold."""

    layout: Layout
    layers: dict[str, _Layer]
    rounded: list[str]
    others: dict[str, str]  # the names in the file of the block's other tensors, by their own
    crc32: int | None = None  # of the tensors; commits of older versions have none


def block_file(commits: Path, index: int) -> Path:
    """Name the commit of a block."""
    return commits / f"block-{index:05d}.safetensors"


def head_file(commits: Path) -> Path:
    """Name the commit of a quantized head."""
    return commits / "head.safetensors"


def commit_files(commits: Path) -> list[Path]:
    """List every commit of a run, blocks in order, then the head."""
    head = head_file(commits)
    return [*sorted(commits.glob("block-*.safetensors")), *([head] if head.exists() else [])]


def is_shard(commit: Path) -> bool:
    """Tell whether a commit is a shard of its own."""
    return commit.stat().st_size >= SHARD_BYTES


def own_name(name: str) -> str:
    """Name a tensor in a file as the model does."""
    return name


def write_commit(path: Path, block: QuantizedBlock, stored: Callable[[str], str] = own_name) -> None:
    """Write a finished block, whole or not at all; `stored` gives the name that the target's files have for another."""
    packed = {name: _pack(weight, block.layout) for name, weight in block.weights.items()}
    tensors = {f"{stored(name)}.{suffix}": tensor for name, parts in packed.items() for suffix, tensor in parts.items()}
    layers = {
        name: _Layer(
            stored=stored(name),
            bits=weight.bits,
            group_size=weight.group_size,
            suffixes=list(packed[name]),
            weights=weight.in_features * weight.out_features,
            bytes=sum(tensor.numel() * tensor.element_size() for tensor in packed[name].values()),
            loss=block.losses.get(name),
        )
        for name, weight in block.weights.items()
    }
    others = {name: stored(name) for name in block.tensors}
    tensors |= {others[name]: tensor for name, tensor in block.tensors.items()}
    facts = _Facts(block.layout, layers, list(block.rounded), others, check_sum(tensors))
    save_tensors(path, tensors, {_FACTS: json.dumps(asdict(facts))})


def read_commit(path: Path) -> QuantizedBlock:
    """Read what `write_commit` wrote; QuasarError where it was damaged since."""
    with _opened(path) as file:
        facts = _facts(file, path)
        names = [f"{layer.stored}.{suffix}" for layer in facts.layers.values() for suffix in layer.suffixes]
        tensors = {name: read_tensor(file, name, path) for name in (*names, *facts.others.values())}
    if facts.crc32 is not None and facts.crc32 != check_sum(tensors):
        raise QuasarError(f"{path} is not what was written: delete it, and it is made anew.")
    weights = {}
    for name, layer in facts.layers.items():
        parts = {suffix: tensors[f"{layer.stored}.{suffix}"] for suffix in layer.suffixes}
        weights[name] = _unpack(name, parts, layer, facts.layout)
    others = {name: tensors[stored] for name, stored in facts.others.items()}
    losses = {name: layer.loss for name, layer in facts.layers.items() if layer.loss is not None}
    return QuantizedBlock(weights, losses, others, tuple(facts.rounded), facts.layout)


def read_summary(path: Path) -> CommitSummary:
    """Read losses and sizes alone."""
    with _opened(path) as file:
        facts = _facts(file, path)
    return CommitSummary(
        {name: layer.loss for name, layer in facts.layers.items()},
        tuple(facts.rounded),
        {name: Width(layer.bits, layer.group_size) for name, layer in facts.layers.items()},
        sum(layer.weights for layer in facts.layers.values()),
        sum(layer.bytes for layer in facts.layers.values()),
        tuple(facts.others),
    )


def tensor_names(commit: Path) -> list[str]:
    """List the names of a commit's tensors."""
    with _opened(commit) as file:
        return list(file.keys())


def committed_tensors(commit: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Read every tensor of a commit, one after the other."""
    with _opened(commit) as file:
        for name in file.keys():  # noqa: SIM118
            yield name, read_tensor(file, name, commit)


def _pack(weight: PackedWeight, layout: Layout) -> dict[str, torch.Tensor]:
    """Lay a layer's tensors out as the checkpoint stores them."""
    return weight.pack() if layout == "gptq" and isinstance(weight, QuantizedWeight) else stored_tensors(weight)


def _unpack(name: str, parts: dict[str, torch.Tensor], layer: _Layer, layout: Layout) -> PackedWeight:
    if layout == "compressed-tensors":
        return CompressedTensorsFormat(layer.bits, layer.group_size).unpack(name, parts)
    return unpack_weight(name, parts, layer.bits, layer.group_size, zeros_offset=1)


def _opened(path: Path) -> Any:
    try:
        return open_tensors(path)
    except QuasarError as error:
        raise QuasarError(f"{error} Delete it, and it is made anew.") from error


def _facts(file: Any, path: Path) -> _Facts:
    try:
        return build(_Facts, parse_json((file.metadata() or {}).get(_FACTS, "")))
    except ValueError as error:
        raise QuasarError(f"{path} is no finished block ({error}): delete it, and it is made anew.") from error
