"""Every table at 80 and at 60 columns, with contents as they come: nothing is cut, no word is broken."""

import io
import random
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helpers.bench_records import make_row, make_run, make_stats
from helpers.stand_ins import FIDELITY, STATS
from rich.console import Console, RenderableType  # noqa: TID251 - what is drawn is looked at

from quasar_cli.render import bench, generation, quantize, steps
from quasar_cli.render.doctor import findings_tables
from quasar_cli.render.fidelity import measured_tables
from quasar_cli.render.grids import as_table
from quasar_core.bench import plots
from quasar_core.bench.arms import ARMS, BenchConfig
from quasar_core.bench.metrics.compare import compare
from quasar_core.bench.results import Results
from quasar_core.bench.steps import StepConfig, StepReport, StepRow
from quasar_core.config import GenerationConfig
from quasar_core.quantize.plan import Plan
from quasar_core.quantize.text_plan import TextPlan
from quasar_core.records import Confirm, FidelityReport, FidelitySlice, GenerationResult, QuantizeReport, Step
from quasar_core.store import PairRecord

DATASETS = ("mt-bench", "humaneval", "gsm8k", "alpaca", "cnn-dm", "spec-bench")
HOME = "/srv/models/.cache/quasar/verifiers/Qwen3-0.6B-gptq-4bit-g128"


def results(arms: tuple[str, ...] = tuple(ARMS)) -> Results:
    """Ten questions of six datasets, every arm; speeds drawn around a plausible one."""
    draw = random.Random(0)
    rows = []
    for dataset in DATASETS:
        for question in range(10):
            for place, arm in enumerate(arms):
                drafted = [Step(4, draw.randrange(5)) for _ in range(40)] if place else [Step(0, 0)] * 120
                confirms = [Confirm(12, 11)] * 4 if arm == "exact" else []
                stats = make_stats(120, draw.uniform(1, 2) / (1 + 0.3 * place), drafted, confirms)
                category = ("writing", "multi-turn reasoning")[question % 2]
                rows.append(make_row(arm, question, [1] * 120, stats, dataset=dataset, category=category))
    return Results(make_run(config=BenchConfig(arms)), rows)


def grids(of: list[Any]) -> list[RenderableType]:
    return [as_table(grid) for grid in of]


def step_report() -> StepReport:
    counts = (1, 2, 4, 6, 8, 12, 16)
    speeds = {"target": 1234.5, "verifier": 812.3, "transformers": 1500.0}
    kernel = "cpu-pass with torch-int4-cpu and vnni"
    rows = [
        StepRow(model, t, ms + 9 * t, 16_400_000_000, 1000.0, 1100.0, kernel, 0.12)
        for model, ms in speeds.items()
        for t in counts
    ]
    config = StepConfig(counts)
    return StepReport("qwen3-8b", 2, 36, config, "cpu", "bfloat16", {}, None, (21.3e9, 20.1e9), rows)


FULL = replace(
    FIDELITY,
    agreement_beside=0.9612,
    by_position=[FidelitySlice(name, 4096, 0.9471, 0.0412) for name in ("1 to 63", "64 to 255", "256 to 511")],
    by_kind=[FidelitySlice(name, 4096, 0.9471, 0.0412) for name in ("letters", "part of a character", "whitespace")],
)


def findings() -> dict[str, Any]:
    passes = {
        "ms": [123.4, 145.2, 187.1],
        "floor_ms": 101.5,
        "source": "measured 3 days ago",
        "products": "vnni in every layer, dense in the head",
    }
    verifier = {
        "name": "Qwen3-0.6B-gptq-4bit-g128",
        "bits": 4,
        "passes": passes,
        "agreement": 0.9471,
        "quantized": 25.4,
        "exact": 19.8,
        "exact_is_bound": True,
    }
    speed = {
        "device": "cpu",
        "dtype": "bfloat16",
        "target": passes,
        "plain": 8.1,
        "full": 10.2,
        "verifiers": [verifier, {**verifier, "name": "Qwen3-0.6B-w8a8-8bit-channel", "exact": None}],
        "best_quantized": verifier["name"],
        "best_exact": verifier["name"],
    }
    kernels = [
        {
            "name": name,
            "usable": usable,
            "reason": "needs CUDA of compute capability 8.9 or more, and this machine has no GPU that CUDA reaches",
        }
        for name, usable in (("torch-int4-cuda", False), ("triton-float8", False), ("vnni", True))
    ]
    return {
        "python": "3.11.8",
        "platform": "Linux-6.8.0-45-generic-x86_64-with-glibc2.39",
        "packages": {"quasar-cli": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
        "optional_packages": {"triton": None, "matplotlib": "3.11.2"},
        "cpu": {"name": "Intel(R) Xeon(R) Platinum 8481C CPU", "features": ["avx2", "avx512_vnni", "amx_int8"]},
        "memory_bytes": 16_400_000_000,
        "gpu": None,
        "device": "cpu",
        "read_bandwidth_bytes_per_s": 21.3e9,
        "kernels": kernels,
        "cpp": "for AVX-512 with VNNI and BF16, the best that this processor has",
        "quantizer_loops": "C++, compiled here",
        "home": "/srv/models/.cache/quasar",
        "current_pair": {"name": "Qwen3-0.6B-gptq-4bit-g128", "target": "Qwen/Qwen3-0.6B"},
        "speed": speed,
        "pair_memory": None,
    }


def inspection() -> dict[str, Any]:
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(8)]
    fidelity = {**FULL.__dict__, "margins": FULL.margins.__dict__}
    fidelity |= {name: [part.__dict__ for part in getattr(FULL, name)] for name in ("by_position", "by_kind")}
    return {
        "checkpoint": HOME,
        "target": "Qwen/Qwen3-0.6B",
        "architecture": "Qwen3ForCausalLM",
        "quantization": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True},
        "marlin": None,
        "loaders": {"vLLM": "yes", "transformers": "yes"},
        "packed_layers": 196,
        "layers": [{"name": name, "bits": 4, "group_size": 128, "bytes": 6_300_000} for name in names],
        "bits_per_weight": 4.16,
        "bytes": {"packed": 230_000_000, "plain": 310_000_000},
        "calibration": {"name": "self", "sha256": "3f" * 32, "seed": 0, "tokens": 65536},
        "report": {"fidelity": fidelity, "layer_errors": dict.fromkeys(names, 0.0123)},
    }


def quantize_report() -> QuantizeReport:
    return QuantizeReport(
        HOME,
        "Qwen/Qwen3-0.6B",
        {"bits": 4, "samples": 16, "seq_len": 128, "fidelity_rows": 8},
        16_400_000_000,
        6_100_000_000,
        4.15,
        {f"model.layers.{i}.self_attn.q_proj": 0.01 for i in range(6)},
        {"calibration text": 12.0, "total": 14.5},
        FULL,
    )


def pairs() -> list[PairRecord]:
    return [PairRecord("Qwen3-0.6B-gptq-4bit-g128", "Qwen/Qwen3-0.6B", HOME)]


def measured() -> list[RenderableType]:
    return measured_tables(inspection()["report"]["fidelity"])


TEXT = TextPlan(False, None, "bfloat16", weights=1_200_000_000, room=2_000_000_000)
PLAN = Plan(6_100_000_000, 4.15, 900_000_000, False, 9_000_000_000, 0, 12_000_000_000, TEXT, 64, seconds=5400.0)
ANSWER = GenerationResult([1], [2], "x", "eos", STATS)
TABLES: dict[str, Any] = {
    "bench": lambda: grids(bench.result_grids(results())),
    "compare": lambda: grids(
        bench.comparison_grids(compare(results(("vanilla", "ngram")), results(("vanilla", "ngram"))))
    ),
    "steps": lambda: grids(steps.step_grids(step_report())),
    "doctor": lambda: findings_tables(findings()),
    "inspect": lambda: quantize.inspection_tables(inspection(), verbose=True),
    "measured": measured,
    "quantize": lambda: quantize.report_tables(quantize_report(), verbose=True),
    "plan": lambda: [quantize.plan_table(PLAN)],
    "pairs": lambda: [quantize.pairs_table(pairs(), None)],
    "stats": lambda: [generation.stats_table(ANSWER, GenerationConfig())],
}
tables_of = cache(lambda name: TABLES[name]())  # intervals of many questions take seconds
LONGEST_WHOLE = 30  # what is longer, such as a path or a digest, may be folded


def drawn(tables: list[RenderableType], width: int) -> str:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    for table in tables:
        console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_one_step_and_one_confirm_are_told_in_the_singular() -> None:
    stats = replace(STATS, step_log=STATS.step_log[:1])
    assert (stats.steps, stats.confirms) == (1, 1)
    lines = drawn([generation.stats_table(replace(ANSWER, stats=stats), GenerationConfig())], 80)
    assert "(1 step)" in lines
    assert "in 1 confirm)" in lines


@pytest.mark.parametrize("width", [80, 60])
@pytest.mark.parametrize("name", TABLES)
def test_a_table_fits_and_cuts_no_word(name: str, width: int) -> None:
    """The words at 1,000 columns, where all fit, are those at this width."""
    text = drawn(tables_of(name), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    words = {word for word in re.findall(r"\S+", drawn(tables_of(name), 1000)) if not set(word) <= set("─━")}
    lost = {word for word in words if word not in text.split() and len(word) <= LONGEST_WHOLE}
    assert not lost


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved."""
    pytest.importorskip("matplotlib")
    saved: list[Any] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: saved.append(figure))
    return saved


def test_figures_say_what_they_show_and_no_legend_is_cut(figures: list[Any]) -> None:
    """Every axis has a label, with its unit; legends lie within the figure."""
    plots.plot(results(), Path("a.png"))
    plots.draw_steps(step_report(), Path("b.png"))
    errors = inspection()["report"]["layer_errors"]
    plots.plot_fidelity(FULL, errors, "Qwen3-0.6B-gptq-4bit-g128", Path("c.png"))
    for figure in figures:
        figure.draw_without_rendering()
        assert all(axes.get_ylabel() for axes in figure.axes)
        assert all(axes.get_xlabel() or axes.get_ylabel().startswith("tokens of a bin") for axes in figure.axes)
        legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
        assert legends
        for legend in legends:
            box = legend.get_window_extent()
            assert box.x0 >= 0
            assert box.x1 <= figure.bbox.width
            assert box.y0 >= 0
    labels = [label for figure in figures for axes in figure.axes for label in (axes.get_xlabel(), axes.get_ylabel())]
    for unit in ("(×)", "(%)", "(ms)", "(nats)", "n = "):
        assert any(unit in label for label in labels)


def test_a_report_of_little_text_says_so() -> None:
    assert "calibrated on 16 texts of 128 tokens" in drawn(quantize.report_tables(quantize_report(), False), 200)
    full = replace(quantize_report(), config={"fidelity_rows": 32})
    assert "quick" not in drawn(quantize.report_tables(full, False), 200)


def test_agreement_in_exact_is_told_where_it_was_measured() -> None:
    rows = drawn(quantize.report_tables(quantize_report(), False), 200).splitlines()
    assert [row.split() for row in rows if row.startswith("agreement in exact")] == [
        ["agreement", "in", "exact", "0.9612", "on", "greedy", "text"]
    ]
    older = replace(quantize_report(), fidelity=replace(FULL, agreement_beside=None))
    assert "agreement in exact" not in drawn(quantize.report_tables(older, False), 200)


def test_figures_of_a_report_are_read_again() -> None:
    assert FidelityReport.from_dict(inspection()["report"]["fidelity"]) == FULL


if __name__ == "__main__":  # python -m tests.cli.test_tables: look at them
    for build in TABLES.values():
        for columns in (80, 60):
            print(f"{columns:─^{columns}}")
            print(drawn(build(), columns))
