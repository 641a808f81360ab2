"""`quantize --bits auto` on a tiny model, by costs made by hand: candidates, the choice, what is written and kept."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.quantize_cases import CONFIG
from transformers import Qwen3Config, Qwen3ForCausalLM

from quasar_cli import console
from quasar_cli.main import run as run_command
from quasar_cli.render import as_bytes
from quasar_cli.render.choice import choice_table
from quasar_core.api import quantizing
from quasar_core.bench.synthetic_models import RandomCheckpoint
from quasar_core.bench.verifiers import try_candidates
from quasar_core.bench.verifiers.choose import Body, Choice, Replayed
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.choose_bits import Wanted, choose, find_candidates
from quasar_core.decode.costs.cost_records import CostRecord, Pace
from quasar_core.decode.costs.pass_costs import PairCosts, PassCost
from quasar_core.errors import QuasarError, UsageError
from quasar_core.library import quantize_model
from quasar_core.models.memory import offload
from quasar_core.models.memory.offload import plan_all
from quasar_core.models.pair import load_tokenizer
from quasar_core.quantize import candidates, estimate
from quasar_core.quantize.candidates import Look, PackedModel, Watcher, commit_candidates
from quasar_core.quantize.commits import block_file, read_commit
from quasar_core.quantize.job import working_folder
from quasar_core.quantize.layer_plan import LayerPlan
from quasar_core.quantize.measure_fidelity import measure
from quasar_core.quantize.run import calibrate
from quasar_core.quantize.solve.gptq import SolverConfig, solve
from quasar_core.quantize.text_plan import Free, plan_text
from quasar_core.store import default_output, resolve_model

pytest_plugins = ["helpers.quantize_fixtures"]
PASSES = {"4 bits": 2.0, "8 bits": 3.0, "5 bits": 2.2, "6 bits": 2.4}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates are guessed."""
    monkeypatch.setattr(estimate, "MEASURED_SECONDS", 0.01)


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A target's pass takes 10 ms, a verifier's as its bits say; a quantized head saves 1 ms. Who was measured."""
    measured: list[str] = []

    def cost_record(pair: Any, role: str, pace: Pace | None = None) -> CostRecord:
        own = None if role == "target" or pair.target.streamed else Pace(pair.target, 0.01)
        assert pace == own, "a candidate is timed beside the target"
        name = pair.verifier_fingerprint if role == "verifier" else "target"
        measured.append(name)
        ms = 10.0 if role == "target" else next(ms for bits, ms in PASSES.items() if bits in name)
        ms -= "head 8" in name or "head 4" in name
        return CostRecord(PassCost((1, 33), (ms / 1000, 1.5 * ms / 1000)), {"role": role}, 0.0)

    def rate(replayed: Replayed, look: Look, costs: PairCosts) -> float:
        return look.agreement / costs.verify(1)

    monkeypatch.setattr(try_candidates, "cost_record", cost_record)
    monkeypatch.setattr(Replayed, "rate", rate)  # replays take a second
    return measured


def wanted(source: Path, **options: Any) -> Wanted:
    return Wanted(str(source), replace(CONFIG, group_size=None), device="cpu", **options)


def test_candidates_are_the_widths_and_groups_that_fit(source: Path) -> None:
    found = find_candidates(wanted(source))
    assert found.uniform == [Body(bits, group) for bits in (4, 8) for group in (64, 32)]
    assert {body.bits for body in found.mixed} == {4.5, 5.0, 6.0}
    assert found.heads == [16, 8, 4]
    fixed = find_candidates(wanted(source, groups=(32,), heads=(8,)))
    assert (fixed.uniform, fixed.heads) == ([Body(4, 32), Body(8, 32)], [8])
    assert found.kept.path != fixed.kept.path
    with pytest.raises(UsageError, match="--bits auto chooses among GPTQ's widths"):
        Wanted(str(source), replace(CONFIG, bits=8, group_size=-1, method="w8a8"))
    with pytest.raises(QuasarError, match="lm_head cannot be packed"):
        find_candidates(wanted(source, heads=(3,)))


def test_options_that_do_not_go_with_it_are_refused(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, sentence in (
        (["--bits", "seven"], "--bits must be auto or a number such as 4 or 4.25, not seven"),
        (["--bits", "four"], "--bits must be auto or a number such as 4 or 4.25, not four."),
        (
            ["--bits", "auto", "--target-agreement", "0.9"],
            "leave --method, --backend, --mixed and --target-agreement out",
        ),
        (["--bits", "auto", "--group-size", "48"], "--group-size must be one of"),
    ):
        assert run_command(["quantize", str(source), *wrong]) == 2
        assert sentence in " ".join(capsys.readouterr().err.split())


def test_candidates_are_solved_together_as_each_by_itself(source: Path, tmp_path: Path) -> None:
    found = find_candidates(wanted(source))
    job, target = found.job, found.target
    with working_folder(job, True):
        text = calibrate(job, target, load_tokenizer(source), plan_text(source, target, Free()))
        plans = {
            tmp_path / body.describe(): LayerPlan.of(body.config(job.config, 16)) for body in (Body(4, 64), Body(8, 32))
        }
        commit_candidates(target, text.samples, plans)
        (first, own), _ = plans.items()
        kept = block_file(first, 0).stat().st_mtime_ns
        commit_candidates(target, text.samples, {first: own})
        assert block_file(first, 0).stat().st_mtime_ns == kept  # what has a commit is not solved again
        commit_candidates(target, text.samples, {tmp_path / "alone": own})
        for index in range(target.count):
            one, other = (read_commit(block_file(folder, index)) for folder in (first, tmp_path / "alone"))
            assert one.weights.keys() == other.weights.keys()
            for name in one.weights:
                assert torch.equal(one.dense(name, torch.float32), other.dense(name, torch.float32))
        watcher = Watcher(target, text)
        look = watcher.look(watcher.read(first), None)
        assert look.agreement == pytest.approx(measure(target, PackedModel(target, first), text).agreement_beside)
        noise = solve(torch.randn(264, 64), torch.eye(64), SolverConfig(8, 32)).weight
        assert watcher.look(watcher.read(first), noise).agreement < look.agreement / 2


def test_random_codes_of_widths_by_layer() -> None:
    from quasar_core.models.config.decoder import DecoderConfig
    from quasar_core.models.config.shapes import shape_named

    config = DecoderConfig.parse({**shape_named("--shape", "qwen3-0.6b"), "num_hidden_layers": 1})
    name = "model.layers.0.self_attn.q_proj"
    random = RandomCheckpoint(config, CONFIG, torch.bfloat16, widths={name: (8, 64)})
    layers = [random.layer(name), random.layer(name.replace("q_proj", "k_proj"))]
    assert [(layer.bits, layer.group_size) for layer in layers] == [(8, 64), (4, 32)]


@pytest.mark.usefixtures("by_hand")
def test_the_fastest_is_made_and_its_table_shown(
    source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(try_candidates, "MEAN_BITS", (5.0,))
    command = ["quantize", str(source), "--bits", "auto", "--samples", "6", "--seq-len", "24", "--device", "cpu"]
    assert run_command([*command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "4 bits in groups of 64; 4 bits in groups of 32; 8 bits" in said
    assert "16, 8, 4 bits with each" in said
    assert not list(source.parent.glob("*-choosing*"))
    assert run_command([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    rows = document["choice"]["rows"]
    tried = [row for row in rows if row["agreement"] is not None]
    assert rows[0] == max(tried, key=lambda row: row["rate"])
    assert len(rows) == 3 * 5
    assert document["config"]["lm_head_bits"] == rows[0]["head"]
    checkpoint = VerifierCheckpoint(Path(document["checkpoint"]))
    assert (document["config"]["bits"], document["config"]["mean_bits"]) in (
        (rows[0]["bits"], None),
        (4, rows[0]["bits"]),
    )
    assert checkpoint.fidelity is not None
    assert not list(source.parent.glob("*choosing*"))
    del document["choice"]["advice"]
    console.show(choice_table(Choice.parse(document["choice"])))
    said = capsys.readouterr().out
    assert "(chosen)" in said
    assert "not solved" in said
    assert "at most" in said
    assert run_command(command) == 2  # once it is finished: refused, before a table or another try
    again = capsys.readouterr()
    assert (again.out, again.err.count("\n")) == ("", 1)
    assert "exists; pass --force to replace it" in again.err


@pytest.mark.usefixtures("by_hand")
def test_the_library_chooses_too(source: Path) -> None:
    said: list[str] = []
    options = {"group_size": 32, "lm_head_bits": 16, "samples": 6, "seq_len": 24, "device": "cpu"}
    report = quantize_model(str(source), bits="auto", tell=said.append, **options)
    chosen = next(sentence for sentence in said if sentence.startswith("Chosen of "))
    bits = report.config["mean_bits"] or report.config["bits"]  # as times have it
    assert f" {bits:g} bits " in chosen
    assert "in groups of 32, head 16" in chosen
    assert "tokens/s" in chosen
    assert Path(report.checkpoint).is_dir()


def test_an_output_that_exists_is_refused_before_anything_is_read(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made").mkdir()
    monkeypatch.setattr("quasar_core.choose_bits.find_candidates", lambda _: pytest.fail("read"))
    assert run_command(["quantize", str(source), "--bits", "auto", "--output", str(tmp_path / "made")]) == 2
    assert "exists; pass --force" in capsys.readouterr().err


@pytest.mark.usefixtures("by_hand")
def test_places_that_may_be_chosen_are_refused_before_anything_is_tried(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = wanted(source, heads=(16,))
    found = find_candidates(asked)
    for body in (found.uniform[-1], found.mixed[0]):
        taken = default_output(resolve_model(str(source)), body.config(CONFIG, 16))
        taken.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr("quasar_core.choose_bits._choose", lambda *_: pytest.fail("something was tried"))
            with pytest.raises(UsageError, match=rf"{taken.name} exists, and {body.describe()} may be chosen: name"):
                choose(asked)
        taken.rmdir()
    taken.mkdir()
    monkeypatch.setattr("quasar_core.choose_bits._choose", lambda *_: pytest.skip("as it is to be"))
    with pytest.raises(pytest.skip.Exception):
        choose(asked, force=True)


def test_an_interrupted_choice_goes_on_with_its_text(
    source: Path, by_hand: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = wanted(source, heads=(16,))
    monkeypatch.setattr(try_candidates, "MEAN_BITS", ())  # nothing is measured for widths by layer

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Watcher, "look", interrupt)
        with pytest.raises(KeyboardInterrupt):
            choose(asked)
    job = find_candidates(asked).job
    text = job.calibration.read_bytes()
    solved = sorted(path.name for path in job.commits.glob("candidate-*"))
    assert {"candidate-4-64", "candidate-8-32"} <= set(solved)
    again: list[set[str]] = []
    solve = candidates._solve_block

    def noted(block: Any, name: str, activations: Any, plans: Any) -> Any:
        again.append({folder.name for folder in plans})
        return solve(block, name, activations, plans)

    monkeypatch.setattr(candidates, "_solve_block", noted)
    config, choice = choose(asked)
    assert all(plans.isdisjoint(solved) for plans in again)  # what was solved is not solved again
    _, made, _ = quantizing.open_job(str(source), config, None, "cpu", False, lambda _: None)
    assert made.calibration.read_bytes() == text
    measured = len(by_hand)
    said: list[str] = []
    assert choose(asked, tell=said.append)[1] == choice
    assert "This was chosen by an earlier run" in said[0]
    assert len(by_hand) == measured  # kept: nothing was measured again
    assert choose(asked, resume=False)[1].rows
    assert len(by_hand) > measured


@pytest.fixture
def four_blocks(source: Path) -> Path:
    """The model with as many blocks as a stream needs: two buffers hold fewer."""
    config = Qwen3Config.from_pretrained(source)
    config.num_hidden_layers, config.layer_types = 4, ["full_attention"] * 4
    torch.manual_seed(1)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(source)
    return source


@pytest.mark.usefixtures("by_hand")
def test_a_choice_for_a_streamed_target_reckons_with_what_a_confirm_reads(
    four_blocks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = wanted(four_blocks, groups=(32,), heads=(16,), offload="target")
    monkeypatch.setattr(try_candidates, "MEAN_BITS", ())
    confirms: list[float] = []

    def rate(replayed: Replayed, look: Look, costs: PairCosts) -> float:
        confirms.append(costs.confirm(1))
        return look.agreement / costs.verify(1)

    monkeypatch.setattr(Replayed, "rate", rate)
    _, choice = choose(asked)
    assert choice.streams
    assert len({row.moved for row in choice.rows}) == 1  # all blocks, beside any verifier
    assert all(row.confirm_ms == pytest.approx(1000 * confirms[0]) for row in choice.rows)
    console.show(choice_table(choice))
    assert as_bytes(choice.best.moved) in capsys.readouterr().out
    assert find_candidates(asked).kept.path != find_candidates(replace(asked, offload="auto")).kept.path


def test_what_does_not_fit_is_left_out(four_blocks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside 4 bits the target fits with all blocks streamed, beside 8 bits it does not; then beside none."""
    monkeypatch.setattr(offload, "own_memory", lambda: 0)
    monkeypatch.setattr(offload, "free_memory", lambda: 10**12)
    asked = wanted(four_blocks, groups=(32,), heads=(16,))
    assert find_candidates(asked).streaming is None  # what is free holds all
    target = find_candidates(replace(asked, offload="target")).streaming
    assert target is not None
    small, large = (codes_size(asked, bits) for bits in (4, 8))
    held = plan_all(target.movable, replace(target.need, verifier=(small + large) // 2), target.tokens).held
    found = find_candidates(replace(asked, decode_memory=held + offload.LEAST_RESERVE))
    assert (found.uniform, found.mixed) == ([Body(4, 32)], [])
    assert found.streaming is not None
    with pytest.raises(
        UsageError, match=r"^--decode-memory 70000000 holds no verifier of .* beside what its passes need"
    ):
        find_candidates(replace(asked, decode_memory=70_000_000))


def codes_size(asked: Wanted, bits: int) -> int:
    found = find_candidates(asked)
    return try_candidates.codes_size(found.target, replace(found.job.config, bits=bits, group_size=32), 2)
