"""`quasar deploy`: serve the pair by vLLM or SGLang."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from quasar_cli import console
from quasar_cli.help import examples
from quasar_cli.options import DraftFrom, Json, Model, Verbose, Verifier, Window, parse_auto
from quasar_core.config import LoadOptions

EXAMPLES = examples(
    "quasar deploy",
    "quasar deploy --tensor-parallel 2 --draft quasar --run",
    "quasar deploy --mode quantized --python /opt/vllm/bin/python",
    "quasar deploy --engine sglang --json",
    "quasar deploy --run -- --enforce-eager --max-num-seqs 8",
)


def deploy(
    others: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- OPTIONS]", help="Further options of the engine, behind a --.", show_default=False),
    ] = None,
    model: Model = None,
    verifier: Verifier = None,
    engine: Annotated[Literal["vllm", "sglang"], typer.Option("--engine", help="What serves.")] = "vllm",
    mode: Annotated[
        Literal["exact", "quantized"],
        typer.Option("--mode", help="exact: the full-precision model decides; quantized: the low-bit copy."),
    ] = "exact",
    draft: Annotated[
        Literal["auto", "draft-model", "quasar", "ngram", "suffix", "none"],
        typer.Option("--draft", help="Who drafts; auto: the low-bit copy in exact, n-grams in quantized."),
    ] = "auto",
    tensor_parallel: Annotated[
        int, typer.Option("--tensor-parallel", metavar="N", help="GPUs that share the model out.")
    ] = 1,
    num_draft_tokens: Annotated[
        int | None, typer.Option("--num-draft-tokens", metavar="N", help="The most tokens of a draft.")
    ] = None,
    window: Window = "auto",
    draft_from: DraftFrom = None,
    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="The port to listen on.")] = 8000,
    max_context: Annotated[
        int | None, typer.Option("--max-context", help="The most tokens of prompt and answer.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="What the engine computes in.")] = "auto",
    python: Annotated[
        Path | None,
        typer.Option("--python", metavar="FILE", help="The Python of the engine's environment; default: this one."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Ask the installed engine whether it takes the command.")
    ] = True,
    run: Annotated[
        bool, typer.Option("--run", help="Start it, and start it anew when one of its processes died.")
    ] = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Print the command and config that serve the pair by vLLM or SGLang, what that promises, and what it cannot do."""
    from quasar_core.api import decoding
    from quasar_core.deploy.planning import plan
    from quasar_core.deploy.wish import Wish

    wish = Wish(
        engine=engine,
        mode=mode,
        draft=draft,
        tensor_parallel=tensor_parallel,
        num_draft_tokens=num_draft_tokens,
        window=parse_auto("--window", window),
        draft_from=tuple(draft_from or ()),
        host=host,
        port=port,
        max_context=max_context,
        dtype=dtype,
        python=python,
        others=tuple(others or ()),
    )
    source, checkpoint = decoding.find_pair_files(LoadOptions(model, verifier, verify="exact"))
    assert checkpoint is not None
    found = plan(wish, source, checkpoint, check)
    if as_json:
        console.print_json(found.as_json())
    else:
        _show(found)
    if run:
        raise typer.Exit(_run(found))


def _show(found: Any) -> None:
    from quasar_cli.render.deploy import plan_table

    console.show_plain(f"{found.command}\n")
    console.show(plan_table(found))


def _run(found: Any) -> int:
    from quasar_core.deploy.installed import require_installed
    from quasar_core.deploy.supervise import Supervisor
    from quasar_core.ports import require_free

    require_installed(found.wish.engine, found.wish.python)
    require_free(found.wish.host, found.wish.port)  # else another server's answers would pass for the engine's
    url = f"http://{found.wish.host}:{found.wish.port}"
    return Supervisor(found.command, url, console.note_plain).run()
