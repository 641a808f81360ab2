"""Run a server: in the foreground, or in a thread of a program's own."""

import asyncio
import importlib.util
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from quasar_core.errors import QuasarError, UsageError
from quasar_core.models.config.decoder import DecoderConfig
from quasar_core.models.memory.estimate import token_bytes
from quasar_core.models.pair import Pair
from quasar_core.models.weights.lean_weights import why_folder_not_lean
from quasar_core.ports import listen_at
from quasar_core.serve.settings import Settings
from quasar_core.store.model_config import read_text_config
from quasar_core.system import free_memory

NEEDED = ("starlette", "uvicorn", "prometheus_client", "llguidance")
SHUTDOWN_SECONDS = 3


def require_extra() -> None:
    """UsageError where what `quasar serve` needs is not installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"quasar serve needs {', '.join(missing).replace('_', '-')}: pip install 'quasar-cli[serve]', "
            "or pip install '.[serve]' in a checkout."
        )


class RunningServer:
    """A server that listens, at a socket that `listen` made earlier or at a new one; `url` is where."""

    def __init__(
        self,
        pair: Pair,
        settings: Settings,
        on_ready: Callable[[str], None] = lambda url: None,
        listening: socket.socket | None = None,
    ) -> None:
        require_extra()
        import uvicorn

        from quasar_core.serve.app import Server

        self.server = Server(pair, settings)
        self._socket = listening or listen(settings)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        self.url = f"http://{host}:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(
            self.server.app(),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            server_header=False,
        )
        self._uvicorn = _announcing(uvicorn.Server, lambda: on_ready(self.url), self.server.worker.stop)(config)
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Serve until interrupted."""
        self._uvicorn.run(sockets=[self._socket])

    def start(self) -> None:
        """Serve in a thread of its own; returns when it answers."""
        started = threading.Event()
        self._uvicorn.announce = started.set
        self._thread = threading.Thread(target=self.run, name="quasar server", daemon=True)
        self._thread.start()
        if not started.wait(60):
            raise QuasarError("The server did not start.")

    def stop(self) -> None:
        """End answers before their next passes, and wait for the thread."""
        self._uvicorn.should_exit = True
        if self._thread is not None:
            self._thread.join()


def _announcing(base: Any, announce: Callable[[], None], end: Callable[[], None]) -> Any:
    """uvicorn's server, which says when it answers, and ends answers before it waits for them."""

    class Announcing(base):  # type: ignore[misc]
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            self.announce()

        async def shutdown(self, sockets: Any = None) -> None:
            await asyncio.to_thread(end)
            await super().shutdown(sockets)

    Announcing.announce = staticmethod(announce)
    return Announcing


def listen(settings: Settings) -> socket.socket:
    """The socket of a server, whose clients wait until it answers; UsageError where the address is not to be had."""
    return listen_at(settings.host, settings.port)


def prefix_positions(settings: Settings, pair: Pair) -> Settings:
    """The settings with the most positions of kept prefixes: what a quarter of the free memory holds."""
    free = free_memory() if pair.device.type == "cpu" else None
    if free is None or pair.target_folder is None or why_folder_not_lean(pair.target_folder):
        return replace(settings, prefix_positions=settings.prefixes * pair.max_context)
    each = token_bytes(DecoderConfig.parse(read_text_config(pair.target_folder)), pair.dtype)
    return replace(settings, prefix_positions=free // 4 // each)
