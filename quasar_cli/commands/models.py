"""`quasar models`: the pairs that `quantize` recorded."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from quasar_cli import console
from quasar_cli.options import Json, Verbose
from quasar_core import store
from quasar_core.errors import QuasarError

app = typer.Typer(help="List, choose and remove the pairs that quantize recorded.", invoke_without_command=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="A pair's name, as `quasar models` lists it.")]


def announce(model: str | None) -> None:
    """Say on stderr which hub model a bare name stands for."""
    if model is not None and (full := store.full_name(model)) != model and "/" not in model:
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
        from quasar_cli.render.checkpoint import pairs_table

        console.show(pairs_table(pairs, current))
    else:
        console.note_plain("No pair is recorded yet; make one with `quasar quantize MODEL`.")


@app.command("use")
def use(name: Name, verbose: Verbose = False, as_json: Json = False) -> None:
    """Make a pair the current one."""
    record = store.use_pair(name)
    if as_json:
        console.print_json(asdict(record))
    else:
        console.note_plain(f"{record.name} is the current pair.")


@app.command("push")
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


@app.command("remove")
def remove(
    name: Name,
    keep_files: Annotated[bool, typer.Option("--keep-files", help="Forget the pair, keep the verifier.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Forget a pair and delete its verifier's folder; the target is never touched."""
    record = store.find_pair(name)
    deletes = not keep_files and Path(record.verifier).exists()
    what = f"Forget {name} and delete {record.verifier}?" if deletes else f"Forget {name}?"
    if not yes and not console.confirm(what):
        raise QuasarError("Nothing was removed: answer y, or pass --yes.")
    store.remove_pair(name, delete_files=deletes)
    if as_json:
        console.print_json({**asdict(record), "files_deleted": deletes})
    else:
        console.note_plain(f"{name} is removed.")
