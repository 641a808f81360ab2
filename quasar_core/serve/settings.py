"""The settings of a server: frozen, checked once, in messages that name the flag."""

from dataclasses import dataclass, field
from ipaddress import ip_address

from quasar_core.config import GenerationConfig
from quasar_core.errors import UsageError

LOCAL = ("127.0.0.1", "localhost", "::1")
SHORTEST_KEY = 16  # characters


@dataclass(frozen=True)
class Settings:
    """Where to listen, who may ask, and bounds on what is asked; `defaults` hold where a request says nothing.

    `prefixes` conversations keep their caches, of `prefix_positions` tokens together. `queue` requests may wait.
    Sizes in bytes, times in seconds.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    origins: tuple[str, ...] = ()  # of other sites' pages that may ask
    prefixes: int = 3
    prefix_positions: int | None = None
    queue: int = 32
    most_bytes: int = 8 * 2**20
    most_prompt: int | None = None  # tokens; None: what the model's context holds
    most_choices: int = 16
    timeout: float = 600.0
    defaults: GenerationConfig = field(default_factory=lambda: GenerationConfig(max_new_tokens=1024))

    def __post_init__(self) -> None:
        _require(0 <= self.port <= 65535, f"--port must be from 0 to 65535, not {self.port}.")
        _require(0 <= self.prefixes <= 64, f"--prefixes must be from 0 to 64, not {self.prefixes}.")
        _require(1 <= self.queue <= 10_000, f"--queue must be from 1 to 10000, not {self.queue}.")
        _require(self.most_bytes >= 1024, f"--max-body must be at least 1024 bytes, not {self.most_bytes}.")
        _require(self.most_prompt is None or self.most_prompt >= 1, "--max-prompt must be at least 1.")
        _require(0 < self.timeout < float("inf"), f"--timeout must be above 0, not {self.timeout}.")
        _require(
            self.api_key is None or (len(self.api_key) >= SHORTEST_KEY and self.api_key.isascii()),
            f"The API key must have at least {SHORTEST_KEY} characters, all of them ASCII.",
        )
        _require(
            self.is_local or self.api_key is not None,
            f"--host {self.host} can be reached by others: give a key with --api-key or --api-key-file.",
        )
        for origin in self.origins:
            _require(
                origin.startswith(("http://", "https://")) and not origin.endswith("/"),
                f"--cors takes a site such as https://example.org, not {origin}.",
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can ask."""
        try:
            return self.host == "localhost" or ip_address(self.host).is_loopback
        except ValueError:
            return False


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise UsageError(sentence)
