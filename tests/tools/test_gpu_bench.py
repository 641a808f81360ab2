"""The GPU bench, walked on the CPU: every part yields its rows, and what fails is told."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.interpret import interpret_on_cpu

from quasar_core import store
from quasar_core.kernels.base import LayerShape
from quasar_core.kernels.dense import DenseKernel
from quasar_core.models.config.decoder import DecoderConfig
from quasar_core.models.cuda.torch_steps import TorchSteps
from quasar_core.models.weights.lean_weights import load_target
from tools.demo.grow import DEMO
from tools.gpu_bench import compiled, correctness, mixtures, products, reference, report, supervise
from tools.gpu_bench.models import Bench, Plan, grown_target, rounded_verifier
from tools.gpu_bench.report import DeviceLostError, Report, read_report
from tools.gpu_bench.table import summary

PLAN = replace(Plan.dry_run(), architectures=1, samples=2, contexts=(16,), tokens=(1, 8))
needs_demo = pytest.mark.skipif(
    not (DEMO / "model.safetensors").exists(), reason="the demo model is not in this checkout"
)


if find_spec("triton"):
    interpret_on_cpu()  # before a part imports the kernels


def new_report(folder: Path, seconds: float = 300.0) -> Report:
    report = Report(folder, {"device": "here"}, seconds)
    report.begin(1.0)
    return report


@needs_demo
def test_a_dry_run_walks_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "run_process", add_measured)  # in this process: it has torch already
    report = supervise.run(PLAN, tmp_path / "out", 300.0)
    assert not report.failed, json.dumps(report.parts, indent=1)
    document = json.loads((tmp_path / "out" / "gpu-bench.json").read_text())
    before, behind = (
        ("facts", "smoke", "headline", "correctness", "passes", "mixtures"),
        ("quantizing", "loading", "offload", "transformers"),
    )
    assert list(document["parts"]) == [*before, "end to end", "products", "launches", *behind]
    assert document["finished"]
    passes = [row for row in document["parts"]["passes"] if "ratio" in row]
    models = (
        "target",
        "4-bit",
        "target, fast",
        "4-bit, fast",
        "4-bit, head 8",
        "4-bit, head 4",
        "w8a16",
        "w8a8",
        "fp8",
    )
    assert list(dict.fromkeys(row["model"] for row in passes)) == list(models)
    for part in ("headline", "end to end"):
        found = [row["arm"] for row in document["parts"][part] if "arm" in row]
        assert found == ["vanilla", "ngram", "quantized", "exact"]
    assert [row["arm"] for row in document["parts"]["offload"] if "arm" in row] == ["plain", "exact"]
    table = summary(report.parts)
    for expected in (
        "0 wrong or failed",
        "target at 16: 1:",
        "4-bit ÷ target at 16: 1:",
        "exact:",
        "s a block",
        "generate, compiled",
        "are copied there whenever it passes",
        "1 of 1 texts equal",
    ):
        assert expected in table


def add_measured(bench: Bench) -> None:
    for row in reference.measure(bench.plan):
        bench.report.add(reference.PART, **row)


@needs_demo
def test_the_grown_model_computes_what_the_demo_model_computes() -> None:
    plan = replace(PLAN, dtype=torch.float32)
    grown, demo = grown_target(plan), load_target(DEMO, plan.device, torch.float32)
    tokens = list(range(40, 60))
    logits = [model.forward(tokens, model.new_cache(32)) for model in (grown, demo)]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-3, rtol=1e-3)


@needs_demo
def test_a_rounded_copy_is_near_its_target_and_not_the_same() -> None:
    target = load_target(DEMO, PLAN.device, torch.float32)
    tokens = list(range(40, 60))
    logits = target.forward(tokens, target.new_cache(32))
    for name in ("4-bit", "w8a8", "fp8"):
        verifier = rounded_verifier(target, name)
        error = correctness.relative_error(verifier.forward(tokens, verifier.new_cache(32)), logits)
        assert 1e-4 < error < 0.3, name


def test_a_wrong_decoder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = new_report(tmp_path)
    correctness.check_decoder("qwen3", PLAN, report)
    assert not report.failed
    right = correctness.in_passes
    monkeypatch.setattr(correctness, "in_passes", lambda *given: right(*given) * 1.1)
    correctness.check_decoder("qwen3", PLAN, report)
    assert report.failed
    assert "checks: 7 right, 1 wrong or failed" in summary(report.parts)
    monkeypatch.setattr(TorchSteps, "choose", lambda self, logits, tokens, drafted, found: found.accepted.fill_(0))
    correctness.check_decoder("qwen3", PLAN, report)
    assert "checks: 9 right, 3 wrong or failed" in summary(report.parts)


def test_decoders_with_experts_are_checked_too(tmp_path: Path) -> None:
    """Here in PyTorch's operations, as no pass is recorded."""
    report = new_report(tmp_path)
    for name in correctness.ARCHITECTURES:
        if "experts" in name:
            correctness.check_decoder(name, PLAN, report)
    assert not report.failed
    assert "checks: 6 right, 0 wrong or failed" in summary(report.parts)


def test_a_pass_reads_the_experts_that_its_tokens_choose() -> None:
    """Of Qwen3-30B-A3B, whose tokens read 3.3 billion weights, and 64 of them all but a few."""
    config = DecoderConfig.parse({**mixtures.SHAPE, "num_hidden_layers": 48})
    one, many = (mixtures.pass_bytes(config, tokens, 16) / 2e9 for tokens in (1, 64))
    assert 2.9 < one < 3.4
    assert 29 < many < 31
    assert mixtures.experts_read(config, 1) == pytest.approx(8)
    assert 3.5 < mixtures.pass_bytes(config, 64, 16) / mixtures.pass_bytes(config, 64, 4) < 4


@needs_demo
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("wrong", [0, 2])
def test_launches_that_overlap_wrongly_are_not_used_later(
    wrong: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quasar_core.kernels.triton import language

    monkeypatch.delenv("QUASAR_OVERLAP", raising=False)
    monkeypatch.setattr(language, "why_not_overlapping", lambda device: None)
    monkeypatch.setattr(correctness, "why_not_triton", lambda device, dtype: None)
    monkeypatch.setattr(correctness, "differing_passes", lambda *given: wrong)
    report = new_report(tmp_path)
    correctness.check_overlap(PLAN, load_target(DEMO, PLAN.device, torch.float32), report)
    (row,) = report.parts["correctness"]
    assert row["wrong"] == {"target": wrong, "4-bit": wrong}
    assert row["ok"] == (not wrong)
    assert os.environ.pop("QUASAR_OVERLAP", None) == ("0" if wrong else None)


def test_what_fails_is_a_row_and_the_bench_goes_on(tmp_path: Path) -> None:
    report = new_report(tmp_path)

    def fail() -> None:
        raise ValueError("no such kernel")

    report.attempt("passes", "first", fail)
    report.attempt("passes", "second", lambda: report.add("passes", what="second", ok=True))
    assert report.failed
    rows = json.loads(report.path.read_text())["parts"]["passes"]
    assert rows == [{"what": "first", "error": "ValueError: no such kernel"}, {"what": "second", "ok": True}]
    assert "no such kernel" in summary(report.parts)


def test_behind_a_lost_device_another_process_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def measure(report: Report) -> None:
        for name in ("first", "second", "third"):
            report.attempt("passes", name, lambda: fail_at("second", name))  # noqa: B023 (called at once)

    def fail_at(wrong: str, name: str) -> None:
        order.append(name)
        if name == wrong:
            raise ValueError("an illegal access")

    monkeypatch.setattr(report, "is_lost", lambda: True)
    fresh = new_report(tmp_path)
    with pytest.raises(DeviceLostError):
        fresh.attempt("passes", "the whole part", lambda: measure(fresh))
    after = Report(tmp_path, {}, 300.0, 10.0, read_report(tmp_path))
    assert after.failed
    assert 10 < after.elapsed < 20
    after.attempt("passes", "the whole part", lambda: measure(after))
    assert order == ["first", "second", "third"]
    after.write(finished=True)
    rows = json.loads(after.path.read_text())["parts"]["passes"]
    assert rows == [{"what": "second", "error": "ValueError: an illegal access"}]


def test_what_ended_the_process_is_told_and_left_out(tmp_path: Path) -> None:
    report = new_report(tmp_path)

    def end_inside() -> None:
        report.attempt("passes", "hangs", lambda: (_ for _ in ()).throw(KeyboardInterrupt))

    with pytest.raises(KeyboardInterrupt):
        report.attempt("passes", "the whole part", end_inside)
    after = Report(tmp_path, {}, 300.0, 10.0, read_report(tmp_path))
    assert [row["what"] for row in after.parts["passes"]] == ["hangs"]
    assert after.failed
    after.attempt("passes", "hangs", lambda: pytest.fail("attempted again"))


def walk(folder: Path, fault: str, parts: Sequence[str] = ("facts", "headline")) -> dict[str, Any]:
    """A dry run's processes, one of whose parts has a fault; the rows."""
    own = ["gpu_bench", "--dry-run", "--fault", fault, "--budget-s", "300"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", own)
        environment = {**os.environ, "OUT": str(folder), "QUASAR_BENCH_QUIET_S": "40"}
        environment.pop("TRITON_INTERPRET", None)
        supervise.supervise(folder, 300.0, environment, parts)
    found = read_report(folder)
    assert found is not None
    return found


@needs_demo
@pytest.mark.slow
@pytest.mark.parametrize("fault", ["crash:headline:3", "compile:headline:3", "hang:headline:1"])
def test_every_rung_of_the_ladder_is_walked_and_the_headline_comes(tmp_path: Path, fault: str) -> None:
    """A part that crashes, does not compile or hangs, until what may be the reason is left out."""
    found = walk(tmp_path, fault)
    rows = found["parts"]["headline"]
    rungs = int(fault[-1])
    assert [row["what"] for row in rows if "error" in row] == ["the whole part"] * rungs
    assert found["rung"] == rungs
    assert found["finished"]
    timed = [(row["model"], row["tokens"]) for row in rows if "ratio" in row]
    assert timed == [(model, count) for model in ("target", "4-bit") for count in (1, 4)]
    assert [row["arm"] for row in rows if "arm" in row] == ["vanilla", "ngram", "quantized", "exact"]
    assert "headline: ms (× floor) by tokens" in summary(found["parts"])
    assert "bandwidth, read" in summary(found["parts"])


def test_processes_go_down_the_ladder_until_the_part_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a part needed to leave out, those behind it leave out too; a part that ends once runs once."""
    program = (
        "import json, os, pathlib, sys; path = pathlib.Path(os.environ['OUT']) / 'gpu-bench.json';"
        "found = json.loads(path.read_text()) if path.exists() else {'runs': [], 'ended': []};"
        "names = ('OVERLAP', 'TUNE', 'TRITON');"
        "off = [name for name in names if os.environ.get(f'QUASAR_{name}') == '0'];"
        "found['runs'].append([sys.argv[1], off]);"
        "found['ended'] += [sys.argv[1]] * (sys.argv[1] != 'headline' or len(off) == 2);"
        "path.write_text(json.dumps(found)); os._exit(1)"
    )
    monkeypatch.setattr(supervise, "command", lambda part, *given: [sys.executable, "-c", program, part])
    for name in ("OVERLAP", "TUNE", "TRITON"):
        monkeypatch.delenv(f"QUASAR_{name}", raising=False)
    environment = {**os.environ, "OUT": str(tmp_path)}
    supervise.supervise(tmp_path, 300.0, environment, ("facts", "headline", "passes"))
    found = json.loads((tmp_path / "gpu-bench.json").read_text())
    two = ["OVERLAP", "TUNE"]
    assert found["runs"] == [["facts", []], ["headline", []], ["headline", two[:1]], ["headline", two], ["passes", two]]
    assert found["finished"]
    (tmp_path / "gpu-bench.json").unlink()
    supervise.supervise(tmp_path, 0.0, environment)  # no time: none is started
    assert not (tmp_path / "gpu-bench.json").exists()


def test_what_was_compiled_is_carried_to_the_next_call(tmp_path: Path) -> None:
    (tmp_path / "compiled" / "KEY").mkdir(parents=True)
    for name in ("kernel.cubin", "kernel.json", "kernel.ttir"):
        (tmp_path / "compiled" / "KEY" / name).write_bytes(name.encode())
    compiled.pack(tmp_path / "compiled", tmp_path / compiled.FILE)
    compiled.unpack(tmp_path / compiled.FILE, tmp_path / "next")
    assert sorted(path.name for path in (tmp_path / "next" / "KEY").iterdir()) == ["kernel.cubin", "kernel.json"]
    compiled.unpack(None, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_parts_that_are_asked_for_have_all_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = dict[str, float]()
    monkeypatch.setattr(supervise, "read_bandwidth", lambda device: 1e9)
    for name in ("facts", "smoke"):
        module, ends = (supervise.facts_of, "run") if name == "facts" else (supervise.headline, "run_smoke")
        monkeypatch.setattr(module, ends, lambda bench, name=name: left.update({name: bench.report.left()}))
    supervise.run(PLAN, tmp_path, 1e6, ("facts", "smoke"))
    assert left["smoke"] == pytest.approx(1e6, rel=1e-3)
    assert left["facts"] == pytest.approx(1e6 * 0.06 / 0.14, rel=1e-3)
    supervise.run(PLAN, tmp_path, 1e6, ("smoke",), last="headline")
    assert left["smoke"] == pytest.approx(1e6 * 0.14 / 0.36, rel=1e-3)


def test_a_part_whose_time_is_up_is_skipped(tmp_path: Path) -> None:
    report = new_report(tmp_path, seconds=0.0)
    report.attempt("passes", "late", lambda: pytest.fail("measured without time"))
    assert report.parts["passes"] == [{"what": "late", "skipped": "no time was left"}]
    assert not report.failed


def test_a_reference_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = new_report(tmp_path, seconds=0.0)
    monkeypatch.setattr(reference, "command", lambda plan: ["/bin/sleep", "60"])
    reference.run_process(Bench(PLAN, report, 1e9))
    assert report.parts["transformers"] == [{"what": "reference", "skipped": "its time was up"}]


def test_every_shape_of_the_model_is_timed() -> None:
    plan = Plan.full(torch.device("cpu"))
    expected = [(4096, 6144), (4096, 4096), (4096, 24576), (12288, 4096), (4096, 151936)]
    assert products.shapes(plan) == expected


def test_kernels_that_are_used_most_are_checked_first() -> None:
    names = ["packed 2 bits bfloat16", "packed 4 bits float16", "packed 4 bits bfloat16", "gate 96 bfloat16", "choice"]
    ordered = [name for name, _ in correctness.most_telling_first([(name, None) for name in names])]
    assert ordered[:3] == ["packed 4 bits bfloat16", "gate 96 bfloat16", "choice"]
    assert ordered[3:] == ["packed 4 bits float16", "packed 2 bits bfloat16"]


def test_a_named_home_needs_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's machine has what a checkout needs, and not all that an installation brings."""
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    monkeypatch.setenv("QUASAR_HOME", str(tmp_path))
    assert store.home() == tmp_path


def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[Any]) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    monkeypatch.setattr(sys, "argv", ["gpu_bench"])
    with pytest.raises(SystemExit) as ended:
        supervise.main()
    assert ended.value.code == 2
    assert "--dry-run walks every step on the CPU" in capsys.readouterr().err


def test_products_are_tuned_before_they_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    from quasar_core.kernels.triton import tune

    events: list[str] = []
    report = new_report(tmp_path)
    monkeypatch.setattr(report, "say", events.append)
    monkeypatch.setattr(products, "why_not_triton", lambda device, dtype: None)
    monkeypatch.setattr(products, "time_rows", lambda *args: events.append("timed") or [])
    monkeypatch.setattr(tune, "tune_missing", lambda weights, dtype, seconds: "1 tuned in 1.0 s")
    products.time_dense(Bench(PLAN, report, 1e9), (64, 32))
    assert events[:2] == ["(64, 32), 16 bits: 1 tuned in 1.0 s", "timed"]

    class Tunable(DenseKernel):
        name = "tunable"

        def tune(self, weights: Any, dtype: torch.dtype) -> str:
            return "2 remembered"

    events.clear()
    monkeypatch.setattr(products, "packed_kernels", lambda layer: (Tunable(),))
    products.time_packed(Bench(PLAN, report, 1e9), LayerShape(64, 32, 4, 32, True))
    assert events[:2] == ["(64, 32), 4 bits: 2 remembered", "timed"]
