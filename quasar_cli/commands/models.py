"""`quasar models`: the recorded pairs, and verifiers that somebody else made."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from quasar_cli import console
from quasar_cli.help import Command, Group, examples
from quasar_cli.options import Json, Verbose
from quasar_core import store
from quasar_core.errors import QuasarError
from quasar_core.files import is_folder

app = typer.Typer(
    cls=Group,
    help="List, choose, add and remove pairs of a model and its verifier.",
    invoke_without_command=True,
    epilog=examples("quasar models", "quasar models use demo-gptq-4bit-g128"),
)

Loader = Literal["gptqmodel"]
Name = Annotated[str, typer.Argument(metavar="NAME", help="A pair's name, as `quasar models` lists it.")]


def announce(model: str | None) -> None:
    """Say on stderr which hub model a bare name stands for."""
    if model is None or store.pair_named(model) is not None:
        return
    if (full := store.full_name(model)) != model and "/" not in model:
        console.note_plain(f"{model} is {full}.")


@app.callback()
def list_pairs(context: typer.Context, verbose: Verbose = False, as_json: Json = False) -> None:
    """List the recorded pairs; commands without --model use the current one."""
    if context.invoked_subcommand is not None:
        return
    pairs, current = store.list_pairs(), store.current_pair()
    if as_json:
        listed = [{**asdict(pair), "current": pair == current} for pair in pairs]
        console.print_json({"pairs": listed})
    elif pairs:
        from quasar_cli.render.quantize import pairs_table

        console.show(pairs_table(pairs, current))
    else:
        console.note_plain("No pair is recorded yet; make one with `quasar quantize MODEL`.")


@app.command("add", cls=Command, epilog=examples("quasar models add FOLDER --target Qwen/Qwen3-8B"))
def add(
    verifier: Annotated[str, typer.Argument(metavar="FOLDER|HUB-ID", help="A quantized checkpoint.")],
    target: Annotated[
        str | None,
        typer.Option("--target", metavar="MODEL", help="What it was made from; default: as its card says."),
    ] = None,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Take a verifier that somebody else made: checked against the target, never written to; it becomes current."""
    from quasar_core.api import quantizing

    announce(target)
    with console.progress_bar() as progress:
        record = quantizing.add_verifier(verifier, target, progress)
    if as_json:
        console.print_json(asdict(record))
    else:
        console.note_plain(f"{record.name} is added for {record.target}, and is the current pair.")


@app.command("use", cls=Command, epilog=examples("quasar models use demo-gptq-4bit-g128"))
def use(name: Name, verbose: Verbose = False, as_json: Json = False) -> None:
    """Make a pair the current one."""
    record = store.use_pair(name)
    if as_json:
        console.print_json(asdict(record))
    else:
        console.note_plain(f"{record.name} is the current pair.")


@app.command("push", cls=Command, epilog=examples("quasar models push NAME my-name/Qwen3-8B-4bit --private"))
def push(
    name: Name,
    repository: Annotated[str, typer.Argument(metavar="REPO", help="A hub id, such as my-name/Qwen3-8B-4bit.")],
    private: Annotated[
        bool, typer.Option("--private", help="If the repository is new, show it to nobody else.")
    ] = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Upload a pair's verifier to the hub; the target is not uploaded."""
    record = store.find_pair(name)
    address = push_verifier(Path(record.verifier), repository, private)
    if as_json:
        console.print_json({**asdict(record), "url": address})


def push_verifier(folder: Path, repository: str, private: bool) -> str:
    """Upload, and say where it is."""
    with console.progress_bar() as progress:
        progress("uploading", 0, 1)
        address = store.push_folder(folder, repository, private)
        progress("uploading", 1, 1)
    console.note_plain(f"{folder.name} is at {address}")
    return address


@app.command(
    "export",
    cls=Command,
    epilog=examples("quasar models export", "quasar models export NAME --for gptqmodel -o FOLDER"),
)
def export(
    checkpoint: Annotated[
        str | None,
        typer.Argument(metavar="CHECKPOINT", help="A verifier's folder or a pair's name; default: the current pair."),
    ] = None,
    loader: Annotated[Loader, typer.Option("--for", metavar="PROGRAM", help="What is to load it.")] = "gptqmodel",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="Where it goes; default: beside the verifier."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Write a copy of a verifier for a program that has other names for its layers; `quasar inspect` says which."""
    from quasar_core.api import exporting

    with console.progress_bar() as progress:
        written = exporting.export(checkpoint, output, force=force, progress=progress)
    if as_json:
        console.print_json({**written, "for": loader})
        return
    console.note_plain(f"{written['checkpoint']} is written for GPTQModel: {written['layers']} layers have codes.")
    if written["in_16_bits"]:
        console.note_plain(f"{written['in_16_bits']} layers, of which it reads no codes, are in 16 bits there.")


@app.command("forget", cls=Command, epilog=examples("quasar models forget"))
def forget(verbose: Verbose = False, as_json: Json = False) -> None:
    """Remove what earlier runs kept: answers of --draft-memory, texts of --draft-from, copies of --compress."""
    from quasar_core.api import decoding

    answers, texts, copies = decoding.forget_kept()
    if as_json:
        console.print_json({"memories": answers, "texts": texts, "copies": copies})
    else:
        console.note_plain(
            f"Forgotten: files of kept answers, {answers}; of texts for drafts, {texts}; models in 12 bits, {copies}."
        )


@app.command("remove", cls=Command, epilog=examples("quasar models remove demo-gptq-4bit-g128 --keep-files"))
def remove(
    name: Name,
    keep_files: Annotated[bool, typer.Option("--keep-files", help="Forget the pair, keep the verifier.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Forget a pair and delete the verifier that quantize wrote; one that was added, and the target, stay."""
    record = store.find_pair(name)
    folder = Path(record.verifier)
    deletes = not keep_files and not record.added and is_folder(folder)
    what = f"Forget {name} and delete {record.verifier}?" if deletes else f"Forget {name}?"
    if not yes and not console.confirm(what):
        raise QuasarError("Nothing was removed: answer y, or pass --yes.")
    store.remove_pair(name, delete_files=deletes)
    if as_json:
        console.print_json({**asdict(record), "files_deleted": deletes})
        return
    console.note_plain(f"{name} is removed.")
    if deletes and folder.exists():
        console.note_plain(f"{folder} stays: it holds files that quasar did not write.")
    elif record.added and folder.exists():
        console.note_plain(f"{folder} stays: it was added, not made here.")
