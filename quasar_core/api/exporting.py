"""Write a copy of a verifier's checkpoint under the names that another program looks for."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quasar_core.checkpoint.card import CARD_VERSION
from quasar_core.checkpoint.checks import KEY as DIGESTS
from quasar_core.checkpoint.checks import check_digest
from quasar_core.checkpoint.export import SECTION, Export
from quasar_core.checkpoint.gptqmodel_names import LOADER
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.checkpoint.writer import ShardWriter
from quasar_core.errors import UsageError, foreign_errors
from quasar_core.files import absolute, is_file, read_text, require_regular, sync, write_json, write_whole
from quasar_core.models.weights.lean_weights import check_whole
from quasar_core.quantize.job import take_lock
from quasar_core.records import Progress, no_progress
from quasar_core.store import verifier_folder
from quasar_core.store.folders import (
    CARD,
    COMMITS,
    LOCK,
    begin_work,
    end_work,
    partial_folder,
    refuse_existing,
    refuse_place,
    remove_verifier,
    set_aside,
    set_aside_before,
)
from quasar_core.store.model_config import read_config
from quasar_core.system import free_disk, refuse_too_little

README, CONFIG = "README.md", "config.json"
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")


def default_output(verifier: Path) -> Path:
    """Beside the verifier."""
    return verifier.with_name(f"{verifier.name}-for-{LOADER}")


def export(
    verifier: str | None, output: Path | None = None, *, force: bool = False, progress: Progress = no_progress
) -> dict[str, Any]:
    """Write a checkpoint that GPTQModel loads, in a folder of its own; the verifier's is only read.

    `verifier` is a folder or a pair's name; without it, the current pair's. Returns the new folder (`checkpoint`), how
    many `layers` have codes, how many are `in_16_bits` since it reads no codes of theirs, and the `bytes` of weights.
    Raises UsageError where the output exists without `force` or is no verifier, QuasarError where GPTQModel loads the
    verifier as it is, or would not load the copy either, and for files that lack a layer, are damaged or cannot be
    copied.
    """
    source = absolute(verifier_folder(verifier))
    work = Export.of(VerifierCheckpoint(source))
    check_whole(work.checkpoint)
    destination = absolute(output or default_output(source))
    others, readme = _others(source), read_text(source / README) if is_file(source / README) else None
    refuse_place(destination, source)
    refuse_existing(destination, force)
    remedy = f"free some beside {destination}, or name another --output"
    refuse_too_little("of disk", work.bytes(), free_disk(destination), remedy)
    partial = partial_folder(destination)
    _refuse_other_work(partial, destination)
    check_digest(work.checkpoint, progress)
    with foreign_errors(f"{partial} could not be written"):
        begin_work(partial)
        with (partial / LOCK).open("a+") as lock:
            take_lock(lock.fileno(), destination)
            written = _write(work, partial, progress)
            _copy(others, source, partial)
            _describe(work, partial, destination, written, readme)
            set_aside(destination)
            end_work(partial, destination)
        for place in set_aside_before(destination):
            remove_verifier(place)
    return {"checkpoint": str(destination), **work.describe(), "bytes": written.total_bytes}


def _refuse_other_work(partial: Path, output: Path) -> None:
    """Unfinished work of an export is begun anew; what `quantize` has finished of a run, or another process, is not."""
    if (partial / COMMITS).exists():
        raise UsageError(f"{partial} holds what `quasar quantize` has finished for {output}; name another --output.")
    if (partial / LOCK).exists():
        with (partial / LOCK).open("a+") as lock:
            take_lock(lock.fileno(), output)


def _write(work: Export, partial: Path, progress: Progress) -> ShardWriter:
    """All weights into the working folder."""
    writer = ShardWriter(partial)
    for name, tensor in work.tensors(progress):
        writer.add(name, tensor)
    return writer


def _others(source: Path) -> list[Path]:
    """What else the folder holds, but for what is written anew: tokenizer, template, pictures' settings."""
    anew = {README, CONFIG, SECTION, CARD, LOCK}
    found = []
    for folder, inner, names in os.walk(source):
        place = Path(folder)
        is_top = place == source
        inner[:] = sorted(name for name in inner if not is_top or (name != COMMITS and not name.startswith(".")))
        links = [name for name in inner if (place / name).is_symlink()]
        for name in sorted([*names, *links]):
            if not is_top or (name not in anew and not name.endswith(WEIGHTS)):
                require_regular(place / name)
                found.append(place / name)
    return found


def _copy(others: Iterable[Path], source: Path, partial: Path) -> None:
    for path in others:
        place = partial / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
        sync(place)


def _describe(work: Export, partial: Path, output: Path, written: ShardWriter, readme: str | None) -> None:
    """Configs and the model card, quasar's own last."""
    digests, section = written.close(), work.section()
    write_json(partial / CONFIG, {**read_config(work.checkpoint.folder), "quantization_config": section})
    write_json(partial / SECTION, section)
    if readme is not None:
        write_whole(partial / README, f"{readme.rstrip()}\n\n{_note(work)}\n".encode())
    write_json(partial / CARD, _card(work, digests, output))


def _note(work: Export) -> str:
    """A paragraph of the model card."""
    kept = work.describe()["in_16_bits"]
    experts = f" {kept} layers, of which it reads no codes, are in 16 bits." if kept else ""
    return f"This copy has the names of layers under which GPTQModel looks for codes.{experts}"


def _card(work: Export, digests: dict[str, str], output: Path) -> dict[str, Any]:
    """The verifier's card, with the new files' digests; the run that made the verifier did not make this folder."""
    card = {"format_version": CARD_VERSION, "target": None, **work.checkpoint.card}
    card.pop("run", None)
    if isinstance(report := card.get("report"), dict):
        card["report"] = {**report, "checkpoint": output.name}
    return {**card, "exported": {"for": LOADER, **work.describe()}, DIGESTS: digests}
