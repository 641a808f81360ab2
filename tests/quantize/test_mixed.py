"""Widths by layer: measured, spent, written so that others read them, and found by the agreement asked for."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.moe_models import qwen3_moe, save
from helpers.quantize_cases import CONFIG, quantize

from quasar_cli.commands.quantize import parse_widths
from quasar_cli.main import run as run_command
from quasar_core.checkpoint.fused_names import FUSED
from quasar_core.checkpoint.headers import stored_layers
from quasar_core.checkpoint.loaders import describe_loaders
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.config import QuantizeConfig
from quasar_core.errors import QuasarError, UsageError
from quasar_core.quantize import mixed_precision, run
from quasar_core.quantize.assemble import quantize_command
from quasar_core.quantize.layer_plan import LayerPlan
from quasar_core.quantize.mixed_precision import (
    BUDGETS,
    Choice,
    LayerGroup,
    Trial,
    best_trial,
    next_budget,
    size_at,
    spend,
    stored_bytes,
)
from quasar_core.quantize.solve.gptq import SolverConfig

pytest_plugins = ["helpers.quantize_fixtures"]


def group(name: str, costs: dict[int, float]) -> LayerGroup:
    """A layer of 128 × 128 in one group, with these costs by bits."""
    linear = torch.nn.Linear(128, 128)
    return LayerGroup((name,), tuple(Choice(b, 128, stored_bytes(linear, b, 128), c) for b, c in costs.items()))


def test_bytes_are_those_of_the_packed_tensors() -> None:
    """128 × 128 at 4 bits in groups of 32: 8,192 of codes, 4 rows of zeros of 64 bytes, 4 rows of scales of 256."""
    assert stored_bytes(torch.nn.Linear(128, 128), 4, 32) == 8192 + 4 * 64 + 4 * 256
    assert stored_bytes(torch.nn.Linear(128, 128), 4, -1) == 8192 + 64 + 256


def test_a_budget_between_two_widths_goes_to_the_layer_that_needs_it() -> None:
    groups = [group("calm", {2: 0.2, 4: 0.1, 8: 0.0}), group("touchy", {2: 9.0, 4: 3.0, 8: 0.1})]
    plan = spend(LayerPlan(SolverConfig()), groups, 6)
    assert (plan.solver("calm").bits, plan.solver("touchy").bits) == (4, 8)
    assert size_at(groups[0], 128, 6) == (size_at(groups[0], 128, 4) + size_at(groups[0], 128, 8)) / 2
    with pytest.raises(UsageError, match=r"--bits 1 is too few for this model"):
        spend(LayerPlan(SolverConfig()), groups, 1)


def test_a_checkpoint_of_a_mean_of_bits(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(CONFIG, bits=4, mean_bits=3.5)
    report = quantize(source, config)
    folder = source.parent / "tiny-gptq-mixed3.5bit-g32"
    assert report.checkpoint == str(folder)
    layers = {layer.name: layer for layer in stored_layers(VerifierCheckpoint(folder))}
    assert len({layer.bits for layer in layers.values()}) > 1
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    named = {name.replace("\\", "").rstrip("$"): width for name, width in section["dynamic"].items()}
    for name, layer in layers.items():
        width = named.get(name, {"bits": section["bits"], "group_size": section["group_size"]})
        assert (width["bits"], width["group_size"]) == (layer.bits, layer.group_size)
        assert VerifierCheckpoint(folder).layer(name).bits == layer.bits
    for first, *others in FUSED.values():
        for block in ("0.self_attn", "1.self_attn", "0.mlp", "1.mlp"):
            parts = [layers.get(f"model.layers.{block}.{part}") for part in (first, *others)]
            assert len({part and (part.bits, part.group_size) for part in parts}) == 1
    verdicts = describe_loaders(list(layers.values()), section)
    assert verdicts["GPTQModel"] == "yes"
    assert not any("its config tells" in verdict or "one product" in verdict for verdict in verdicts.values())
    uniform = quantize(source, replace(CONFIG, bits=4), output=source.parent / "uniform")
    assert report.bytes_after < uniform.bytes_after
    assert "from 2 to 8 bits by layer, groups of 32 or smaller ones, symmetric" in (folder / "README.md").read_text()
    assert run_command(["inspect", str(folder)]) == 0
    assert f"symmetric, other widths by {len(section['dynamic'])} rules" in capsys.readouterr().out


def test_widths_that_vllm_takes(source: Path) -> None:
    """Of 4 bits in smaller groups its CPU build, too; what is left out is measured and not taken."""
    for widths, bits, loaders in (((4, 8), 4.5, {"vLLM"}), ((4,), 4.25, {"vLLM", "vLLM on a CPU"})):
        config = replace(CONFIG, group_size=64, mean_bits=bits, widths=widths)
        folder = source.parent / f"of-{len(widths)}"
        report = quantize(source, config, output=folder)
        layers = stored_layers(VerifierCheckpoint(folder))
        assert {layer.bits for layer in layers} <= set(widths)
        assert len({(layer.bits, layer.group_size) for layer in layers}) > 1
        section = json.loads((folder / "config.json").read_text())["quantization_config"]
        verdicts = describe_loaders(layers, section)
        assert {verdicts[name] for name in loaders} == {"yes"}
        assert f"--bits {bits} --mixed --group-size 64 --widths {','.join(map(str, widths))}" in quantize_command(
            report
        )


def search(goal: float, least: float = 0) -> list[Trial]:
    """All trials of a model whose agreement is a tenth of its bits."""
    trials: list[Trial] = []
    while (bits := next_budget(goal, trials, least)) is not None:
        trials.append(Trial(bits, bits / 10))
    return trials


def test_the_bisection_leaves_out_what_the_widths_cannot_fill() -> None:
    trials = search(0.1, least=4)
    assert best_trial(0.1, trials).bits == min(trial.bits for trial in trials) == 4


def test_bisection_asks_at_most_five_times() -> None:
    for aim in range(len(BUDGETS)):
        trials = search(BUDGETS[aim] / 10)
        assert best_trial(BUDGETS[aim] / 10, trials) == Trial(BUDGETS[aim], BUDGETS[aim] / 10)
        assert len(trials) <= 5
    with pytest.raises(QuasarError, match=r"--target-agreement 0.7 was not reached: 6 bits agree 0.6000"):
        best_trial(0.7, search(0.7))


def test_the_agreement_asked_for_is_reached(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few budgets; an interrupted search goes on with the trials that it had finished."""
    monkeypatch.setattr(mixed_precision, "BUDGETS", (2.5, 3.0, 4.0, 6.0))
    config = replace(CONFIG, target_agreement=0.5)
    whole = quantize(source, config, output=source.parent / "whole")
    assert whole.fidelity.agreement >= 0.5
    measured = run.measure
    calls: list[int] = []

    def fails_later(*args: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measured(*args, **options)

    monkeypatch.setattr(run, "measure", fails_later)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, config, output=source.parent / "begun")
    monkeypatch.setattr(run, "measure", measured)
    again = quantize(source, config, output=source.parent / "begun")
    assert again.fidelity == whole.fidelity
    first, second = ((source.parent / name / "model.safetensors").read_bytes() for name in ("whole", "begun"))
    assert first == second


def test_an_agreement_that_is_not_reached_may_be_asked_for_anew(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured serves a smaller one; once a budget is found, only what was asked for goes on."""
    monkeypatch.setattr(mixed_precision, "BUDGETS", (4.0, 6.0))
    with pytest.raises(QuasarError, match="was not reached"):
        quantize(source, replace(CONFIG, target_agreement=0.9999), output=source.parent / "out")
    monkeypatch.setattr(mixed_precision, "measure_widths", lambda *_: pytest.fail("widths are measured again"))
    monkeypatch.setattr(run, "assemble", lambda *_: pytest.fail("stopped here"))
    with pytest.raises(pytest.fail.Exception, match="stopped here"):
        quantize(source, replace(CONFIG, target_agreement=0.3), output=source.parent / "out")
    with pytest.raises(UsageError, match=r"target_agreement was 0\.3 and is 0\.2"):
        quantize(source, replace(CONFIG, target_agreement=0.2), output=source.parent / "out")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mean_bits": 1.5}, "--bits must be from 2 to 8, not 1.5."),
        ({"target_agreement": 1.0}, "--target-agreement must be above 0 and below 1, not 1."),
        ({"target_agreement": 0.9, "mean_bits": 4.5}, "leave --bits and --mixed out"),
        ({"target_agreement": 0.9, "lm_head_bits": 8}, "leave --lm-head-bits out"),
        ({"mean_bits": 4.5, "widths": (4, 5)}, "--widths must be some of 2, 3, 4, 8, such as 4,8, not 4,5."),
        ({"mean_bits": 4.5, "widths": ()}, "--widths must be some of"),
        ({"widths": (4, 8)}, "--widths goes with widths by layer"),
        ({"mean_bits": 4.5, "backend": "optimum"}, "goes with --method gptq and --backend native"),
    ],
)
def test_what_cannot_be_asked_for(options: dict, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        QuantizeConfig(**options)


def test_the_command_reads_widths(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_widths("8,4,4") == (4, 8)
    assert run_command(["quantize", "demo", "--bits", "4.5", "--widths", "4;8"]) == 2
    assert "--widths must be whole numbers such as 4,8, not 4;8." in capsys.readouterr().err


def test_a_mixture_of_experts_has_one_width(tmp_path: Path, small_texts: None) -> None:
    source = save(tmp_path / "tiny", qwen3_moe)
    with pytest.raises(UsageError, match="not chosen for a mixture of experts"):
        quantize(source, replace(CONFIG, mean_bits=3.5))
    assert not list(tmp_path.glob("*.partial"))
