"""Commands for vLLM and SGLang, word by word, and wishes that cannot be."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quasar_core.deploy.commands import bind_cores, write_command
from quasar_core.deploy.promises import limits, promise
from quasar_core.deploy.wish import DRAFTS, Files, Wish
from quasar_core.errors import UsageError

FILES = Files("/models/X", "/models/X-gptq-4bit-g128")
PYTHON = Path("/engine/bin/python")


def words_of(cores: Any = (), **wishes: Any) -> list[str]:
    return list(write_command(Wish(python=PYTHON, **wishes), FILES, cores).words)


def after(words: list[str], option: str) -> Any:
    return words[words.index(option) + 1]


def test_vllm_with_the_copy_as_draft_model() -> None:
    words = words_of(tensor_parallel=2, dtype="bfloat16", max_context=4096)
    assert words[:5] == [str(PYTHON), "-m", "vllm.entrypoints.cli.main", "serve", FILES.target]
    assert after(words, "--tensor-parallel-size") == "2"
    assert after(words, "--dtype") == "bfloat16"
    assert after(words, "--max-model-len") == "4096"
    assert json.loads(after(words, "--speculative-config")) == {
        "method": "draft_model",
        "model": FILES.verifier,
        "num_speculative_tokens": 4,
        "draft_tensor_parallel_size": 2,
    }


def test_vllm_with_our_proposer() -> None:
    words = words_of(draft="quasar", window=6, draft_from=("src",))
    speculation = json.loads(after(words, "--speculative-config"))
    assert speculation["method"] == "custom_class"
    assert speculation["num_speculative_tokens"] == 16
    section = json.loads(after(words, "--additional-config"))["quasar"]
    assert section == {"verifier": FILES.verifier, "window": 6, "draft_from": [str(Path("src").absolute())]}


def test_vllm_with_the_copy_as_target() -> None:
    words = words_of(mode="quantized", num_draft_tokens=5)
    assert after(words, "serve") == FILES.verifier
    assert json.loads(after(words, "--speculative-config")) == {
        "method": "ngram",
        "num_speculative_tokens": 5,
        "prompt_lookup_min": 2,
        "prompt_lookup_max": 4,
    }
    assert "--speculative-config" not in words_of(mode="quantized", draft="none")


def test_sglang() -> None:
    words = words_of(engine="sglang", tensor_parallel=4)
    assert words[1:5] == ["-m", "sglang.launch_server", "--model-path", FILES.target]
    assert after(words, "--tp-size") == "4"
    assert after(words, "--speculative-algorithm") == "STANDALONE"
    assert after(words, "--speculative-draft-model-path") == FILES.verifier
    assert [after(words, f"--speculative-{name}") for name in ("num-steps", "eagle-topk", "num-draft-tokens")] == [
        "4",
        "1",
        "5",
    ]
    words = words_of(engine="sglang", mode="quantized")
    assert after(words, "--model-path") == FILES.verifier
    assert after(words, "--speculative-algorithm") == "NGRAM"


def test_a_cpu_shares_its_cores_out() -> None:
    command = write_command(Wish(python=PYTHON, tensor_parallel=2), FILES, [0, 1])
    assert command.environment["VLLM_CPU_OMP_THREADS_BIND"] == "0|1"
    assert command.environment["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert "VLLM_CPU_OMP_THREADS_BIND='0|1'" in str(command)
    assert command.words[1:5] == ("-m", "vllm.entrypoints.openai.api_server", "--model", FILES.target)


@given(st.lists(st.integers(0, 200), min_size=1, max_size=40, unique=True), st.integers(1, 50))
def test_each_rank_has_cores_and_none_is_left(cores: list[int], ranks: int) -> None:
    parts = [[int(core) for core in part.split(",")] for part in bind_cores(cores, ranks).split("|")]
    assert len(parts) == ranks
    assert {core for part in parts for core in part} == set(cores) or ranks > len(cores)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("engine_and_mode", DRAFTS, ids="-".join)
def test_a_command_can_be_pasted_and_tells_what_it_promises(engine_and_mode: Any) -> None:
    engine, mode = engine_and_mode
    for draft in DRAFTS[engine_and_mode]:
        wish = Wish(engine=engine, mode=mode, draft=draft, python=PYTHON)
        command = write_command(wish, Files("/my models/X", "/my models/Y"))
        variables, words = len(command.environment), shlex.split(str(command))
        assert tuple(words[variables:]) == command.words
        assert ("is the full-precision model's" in promise(wish)) == (mode == "exact")
        assert limits(wish) or draft in ("none", "ngram")


def test_a_server_that_others_reach_should_have_a_key() -> None:
    assert any("--api-key" in limit for limit in limits(Wish(host="0.0.0.0")))
    assert not any("--api-key" in limit for limit in limits(Wish(host="0.0.0.0", others=("--api-key", "x"))))
    assert not any("--api-key" in limit for limit in limits(Wish()))


@pytest.mark.parametrize(
    ("wishes", "named"),
    [
        ({"engine": "sglang", "draft": "quasar"}, "--draft quasar"),
        ({"mode": "quantized", "draft": "draft-model"}, "--draft draft-model"),
        ({"tensor_parallel": 0}, "--tensor-parallel"),
        ({"num_draft_tokens": 65}, "--num-draft-tokens"),
        ({"port": 70000}, "--port"),
        ({"max_context": 0}, "--max-context"),
        ({"window": 3}, "--window"),
        ({"draft_from": ("x",)}, "--draft-from"),
    ],
)
def test_wishes_that_cannot_be_are_named(wishes: Any, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        Wish(**wishes)
