"""Check before a run that its peers are installed, and start them; one that fails answers with its reason."""

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quasar_core.bench.arms import Arm, BenchConfig
from quasar_core.bench.peers import llama_cpp, vllm_process
from quasar_core.bench.peers.process import Peer, PeerFailure, TalkingPeer
from quasar_core.bench.peers.talk import Ask, Told
from quasar_core.bench.peers.transformers_process import left_out_processors
from quasar_core.errors import UsageError
from quasar_core.files import is_folder
from quasar_core.kernels.threads import most_threads
from quasar_core.models.pair import Pair

TRANSFORMERS = "quasar_core.bench.peers.transformers_process"
MOST_CONTEXT = 8192  # that a peer reserves memory for


class FailedPeer(Peer):
    """A peer that could not begin: every answer is the reason."""

    def __init__(self, name: str, pair: Pair, reason: str) -> None:
        super().__init__(name, pair, ignore_eos=True)
        self.reason = reason

    def ask(self, ask: Ask) -> Told:
        """Raise the reason."""
        raise PeerFailure(self.reason)


def check_peers(arms: list[Arm], config: BenchConfig) -> None:
    """UsageError, before anything is loaded, that says what an arm lacks."""
    for arm in arms:
        if arm.name in ("transformers-assisted", "vllm-draft"):
            _check_assistant(arm, config)
        if arm.program == "llama.cpp":
            llama_cpp.check(config.peers)
        if arm.program == "vllm":
            vllm_python(config)


def _check_assistant(arm: Arm, config: BenchConfig) -> None:
    folder = config.peers.assistant
    if folder is None or not is_folder(Path(folder)):
        raise UsageError(f"The arm {arm.name} needs a small model of the same vocabulary: --assistant FOLDER.")


def vllm_python(config: BenchConfig) -> str:
    """The interpreter that has vLLM: the one that was named, or this one; UsageError where neither has it."""
    named = config.peers.vllm_python
    if named is not None:
        if shutil.which(named) is None:
            raise UsageError(f"--vllm-python must name a Python interpreter, and {named} is none.")
        return named
    if find_spec("vllm") is None:
        raise UsageError(
            "The arm vllm needs vLLM: install it here, or name the Python of the environment that has it with "
            "--vllm-python."
        )
    return sys.executable


def begin_peer(arm: Arm, pair: Pair, config: BenchConfig) -> Peer:
    """Begin a peer, or what stands for one that failed."""
    try:
        if pair.target_folder is None:
            raise PeerFailure(f"the arm {arm.name} needs the target's files")
        if arm.program == "llama.cpp":
            return llama_cpp.LlamaServer(arm.name, pair, config.ignore_eos, config.peers, most_threads())
        return TalkingPeer(
            arm.name, pair, config.ignore_eos, _command(arm, config), settings(arm, pair, config), _variables()
        )
    except PeerFailure as error:
        return FailedPeer(arm.name, pair, str(error))


def _command(arm: Arm, config: BenchConfig) -> list[str]:
    if arm.program == "vllm":
        return [vllm_python(config), str(Path(vllm_process.__file__))]
    return [sys.executable, "-m", TRANSFORMERS]


def _variables() -> dict[str, str]:
    """So that the process finds this package where it runs from a checkout, and as many threads."""
    root = str(Path(__file__).parents[3])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = str(most_threads())
    return {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": threads, "VLLM_CPU_KVCACHE_SPACE": "2"}


def settings(arm: Arm, pair: Pair, config: BenchConfig) -> dict[str, Any]:
    """What a peer's process is told."""
    eos_ids = [] if config.ignore_eos else sorted(pair.eos_ids)
    return {
        "folder": str(pair.target_folder),
        "device": str(pair.device),
        "dtype": str(pair.dtype).removeprefix("torch."),
        "threads": most_threads(),
        "eos_ids": eos_ids,
        "max_context": min(pair.max_context, MOST_CONTEXT) if arm.program == "vllm" else pair.max_context,
        "draft": arm.draft,
        "assistant": config.peers.assistant if arm.name in ("transformers-assisted", "vllm-draft") else None,
        "left_out": left_out_processors(list(pair.processors), config.processors, config.ignore_eos),
    }
