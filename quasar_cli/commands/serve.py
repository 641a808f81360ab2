"""`quasar serve`: one pair behind OpenAI's endpoints."""

import threading
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from quasar_cli import console
from quasar_cli.commands.generate import load_pair, show_notes
from quasar_cli.help import examples
from quasar_cli.option_groups import DecodeOptions, ModelOptions, takes_groups
from quasar_cli.options import MaxNewTokens, Verbose
from quasar_core.errors import UsageError
from quasar_core.files import read_text

EXAMPLES = examples(
    "quasar serve",
    "quasar serve --open",
    "quasar serve --model Qwen3-0.6B --port 8080 --verify exact",
    "quasar serve --host 0.0.0.0 --api-key-file key.txt",
)
_WHO, _BOUNDS = "Who may ask", "Bounds"


@dataclass(frozen=True)
class ServeDecodeOptions(DecodeOptions):
    """What holds for requests that do not say otherwise."""

    max_new_tokens: MaxNewTokens = 1024


@takes_groups
def serve(
    *,
    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="The port; 0 takes a free one.")] = 8000,
    open_page: Annotated[bool, typer.Option("--open", help="Open the chat page in a browser.")] = False,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key", help="The key that clients must send.", envvar="QUASAR_API_KEY", rich_help_panel=_WHO
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", metavar="FILE", help="A file with the key.", rich_help_panel=_WHO)
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option(
            "--cors", metavar="SITE", help="A site whose pages may ask; may be given again.", rich_help_panel=_WHO
        ),
    ] = None,
    prefixes: Annotated[
        int,
        typer.Option("--prefixes", help="Conversations that keep their caches; 0 for none.", rich_help_panel=_BOUNDS),
    ] = 3,
    queue: Annotated[int, typer.Option("--queue", help="The most requests that wait.", rich_help_panel=_BOUNDS)] = 32,
    max_body: Annotated[
        int, typer.Option("--max-body", help="The most bytes of a request.", rich_help_panel=_BOUNDS)
    ] = 8 * 2**20,
    max_prompt: Annotated[
        int | None,
        typer.Option(
            "--max-prompt", help="The most tokens of a prompt; default: the context.", rich_help_panel=_BOUNDS
        ),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option("--timeout", help="The most seconds of a request, waiting included.", rich_help_panel=_BOUNDS),
    ] = 600.0,
    decoding: ServeDecodeOptions,
    models: ModelOptions,
    verbose: Verbose = False,
) -> None:
    """Serve a pair to any client that speaks OpenAI's API.

    Options of speculation and sampling hold for requests that do not say otherwise.
    """
    from quasar_core.serve.run import RunningServer, listen, prefix_positions, require_extra
    from quasar_core.serve.settings import Settings

    require_extra()
    config = decoding.config()
    bounds = {"queue": queue, "most_bytes": max_body, "most_prompt": max_prompt, "timeout": timeout}
    settings = Settings(
        host=host,
        port=port,
        api_key=read_key(api_key, api_key_file),
        origins=tuple(cors or ()),
        prefixes=prefixes,
        defaults=config,
        **bounds,  # type: ignore[arg-type]
    )
    listening = listen(settings)  # a port that is taken is found before the pair is loaded, not after
    pair = load_pair(models, config)
    server = RunningServer(pair, prefix_positions(settings, pair), lambda url: announce(url, open_page), listening)
    with console.progress_bar() as progress:
        server.server.worker.prepare(progress)
    if verbose:
        show_notes(pair)
    server.run()


def announce(url: str, open_page: bool) -> None:
    """Say where it listens, and open the page."""
    console.note_plain(f"Serving at {url}/v1, with a chat page at {url} (Ctrl-C ends)")
    if open_page:  # a browser for the terminal returns when it is left, and needs a server that answers meanwhile
        threading.Thread(target=show_page, args=(url,), name="quasar browser", daemon=True).start()


def show_page(url: str) -> None:
    """Open the page in a browser, or say that there is none."""
    if not webbrowser.open(url):
        console.note_plain(f"No browser could be opened: open {url} in one.")


def read_key(key: str | None, file: Path | None) -> str | None:
    """The API key from the option or the file; UsageError for both."""
    if key is not None and file is not None:
        raise UsageError("Give the key once: with --api-key, or with --api-key-file.")
    return key if file is None else read_text(file, kind=UsageError).strip()
