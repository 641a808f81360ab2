"""Plan a deployment of a pair: the command, what it promises, and whether the engine takes it."""

import sys
from dataclasses import asdict, dataclass, field
from typing import Any

from quasar_core.checkpoint.headers import stored_layers
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.deploy.commands import write_command
from quasar_core.deploy.fitting import judge, what_it_would_take, why_no_ranks
from quasar_core.deploy.installed import Installed, check_command, describe_version, find_installed
from quasar_core.deploy.promises import limits, promise
from quasar_core.deploy.wish import NAMES, Command, Files, Wish
from quasar_core.errors import QuasarError, UsageError
from quasar_core.store.model_config import read_config
from quasar_core.store.names import ModelSource
from quasar_core.system import usable_cores

LOADER = {("vllm", False): "vLLM", ("vllm", True): "vLLM on a CPU", ("sglang", False): "SGLang"}


@dataclass(frozen=True)
class Plan:
    """How a pair is served by another engine."""

    wish: Wish
    command: Command
    promise: str
    limits: list[str]
    version: str
    checkpoint: str  # whether the engine takes the verifier
    checked: str
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """One document."""
        wish = asdict(self.wish) | {"draft_from": list(self.wish.draft_from), "others": list(self.wish.others)}
        return {
            **wish,
            "python": str(self.wish.python or sys.executable),
            "draft": self.wish.drafts_by,
            "command": list(self.command.words),
            "environment": self.command.environment,
            "config": self.command.config,
            "promise": self.promise,
            "limits": self.limits,
            "version": self.version,
            "checkpoint": self.checkpoint,
            "checked": self.checked,
        }


def plan(wish: Wish, source: ModelSource, checkpoint: VerifierCheckpoint, check: bool = True) -> Plan:
    """Plan it; with `check`, the installed engine is asked whether it would take the command.

    QuasarError for a checkpoint or a number of ranks that the engine refuses; it says what would be taken.
    """
    installed = find_installed(wish.engine, wish.python)
    _require_ranks(wish, source)
    verdict = _verdict(wish, source, checkpoint, installed)
    _require_quasar(wish, installed)
    files = Files(str(source.folder), str(checkpoint.folder))
    cores = sorted(usable_cores()) if installed and installed.is_cpu else []
    command = write_command(wish, files, cores)
    is_checked = check and installed is not None
    return Plan(
        wish,
        command,
        promise(wish),
        limits(wish),
        describe_version(wish.engine, installed),
        verdict,
        check_command(wish.engine, command, wish.python) if is_checked else "not checked by the engine itself",
    )


def _require_ranks(wish: Wish, source: ModelSource) -> None:
    trouble = why_no_ranks(read_config(source.folder), wish.tensor_parallel)
    if trouble:
        raise UsageError(f"--tensor-parallel {wish.tensor_parallel}: {source.label} cannot be shared out: {trouble}.")


def _verdict(wish: Wish, source: ModelSource, checkpoint: VerifierCheckpoint, installed: Installed | None) -> str:
    """What the engine says of the verifier; QuasarError where it refuses it."""
    if not wish.loads_verifier:
        return "loaded by quasar, not by the engine" if wish.drafts_by == "quasar" else "not loaded"
    section = checkpoint.config.get("quantization_config") or {}
    if wish.dtype == "float32" and section.get("quant_method", "gptq") == "gptq":
        raise UsageError(f"--dtype float32: {NAMES[wish.engine]} multiplies by GPTQ's codes in 16 bits alone.")
    loader = LOADER[wish.engine, bool(installed and installed.is_cpu) and wish.engine == "vllm"]
    layers = stored_layers(checkpoint)
    [architecture, *_] = checkpoint.config.get("architectures") or [""]
    said = judge(loader, layers, section, wish.tensor_parallel, architecture)
    if not said.startswith("no: "):
        return f"{loader}: {said}"
    options = what_it_would_take(loader, layers, wish.tensor_parallel, architecture)
    remedy = f"; one that it takes: quasar quantize {source.name} {options}" if options else ""
    raise QuasarError(f"{loader} refuses {checkpoint.folder.name}: {said.removeprefix('no: ')}{remedy}.")


def _require_quasar(wish: Wish, installed: Installed | None) -> None:
    if wish.drafts_by == "quasar" and installed and not installed.has_quasar:
        raise UsageError(
            f"--draft quasar runs inside {NAMES[wish.engine]}, and quasar is not installed beside it: "
            f"{wish.python or 'python'} -m pip install 'quasar-cli[vllm]', or '.[vllm]' in a checkout."
        )
