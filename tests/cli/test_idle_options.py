"""Options that do nothing beside the others: each is said in one sentence, whichever command it is given to."""

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
from rich.table import Table  # noqa: TID251 - what is drawn is looked at

from quasar_cli import console, idle_options
from quasar_cli.commands.bench import BenchOptions
from quasar_cli.commands.bench_steps import Placement, RandomOptions
from quasar_cli.commands.quantize import QuantizeOptions
from quasar_cli.main import run
from quasar_cli.option_groups import DecodeOptions, ModelOptions

pytest_plugins = ["helpers.cli_fixtures"]

GENERATE = {field.name: field.default for group in (DecodeOptions, ModelOptions) for field in fields(group)} | {
    "chat": True,
    "think": None,
    "stream": True,
    "trace": None,
    "as_json": False,
    "show_unconfirmed": False,
}
CHAT = {name: value for name, value in GENERATE.items() if name not in ("chat", "trace", "show_unconfirmed")}
SERVE = {**CHAT, "port": 8000}
QUANTIZE = {field.name: field.default for field in fields(QuantizeOptions)} | {
    "push_to_hub": None,
    "private": False,
    "successors": False,
    "force": False,
    "resume": True,
    "max_memory": None,
    "max_device_memory": None,
}
STEPS = {field.name: field.default for group in (Placement, RandomOptions) for field in fields(group)}
BENCH = {field.name: field.default for group in (BenchOptions, ModelOptions) for field in fields(group)} | {
    "context": SimpleNamespace(invoked_subcommand=None)
}


def notes(capsys: pytest.CaptureFixture[str], usual: dict[str, Any], **given: Any) -> list[str]:
    """What is said of a command's options."""
    idle_options.note_idle_options({**usual, **given}, usual)
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("usual", "given", "flags"),
    [
        (GENERATE, {"fidelity": 0.9}, "--fidelity"),
        (SERVE, {"fidelity": 0.9}, "--fidelity"),
        (CHAT, {"window": "5", "verify": "full"}, "--window"),
        (GENERATE, {"window": "5", "verify": "quantized"}, "--window"),
        (GENERATE, {"kernel": "dense", "verifier_attention": "full", "verify": "full"}, "--kernel and --verifier-att"),
        (GENERATE, {"ngram_max": 4, "draft": "suffix"}, "--ngram-max"),
        (GENERATE, {"ngram_min": 2}, "--ngram-min"),
        (GENERATE, {"num_draft_tokens": "4", "trees": False, "draft": "none"}, "--num-draft-tokens and --no-trees"),
        (GENERATE, {"num_draft_tokens": "4", "trees": False}, "--no-trees"),
        (GENERATE, {"fast": True, "device": "cpu"}, "--fast"),
        (GENERATE, {"top_k": 5, "top_p": 0.9, "min_p": 0.1, "seed": 3}, "--top-k and --top-p and --min-p and --seed"),
        (GENERATE, {"chat": False, "think": True}, "--think"),
        (CHAT, {"stream": False, "as_json": True}, "--no-stream"),
        (GENERATE, {"show_unconfirmed": True, "verify": "full"}, "--show-unconfirmed"),
        (QUANTIZE, {"private": True}, "--private"),
        (QUANTIZE, {"method": "w8a8", "rounding": "nearest", "act_order": False}, "--no-act-order"),
        (QUANTIZE, {"successors": True, "bits": "3", "private": True}, "--bits and --private"),
        (STEPS, {"bits": 3, "layers": 2}, "--layers and --bits"),
        (STEPS, {"shape": "qwen3-8b", "verifier": "folder"}, "--verifier"),
        (BENCH, {"fidelity": 0.9}, "--fidelity"),
        (BENCH, {"window": "4", "arms": "vanilla,quantized"}, "--window"),
        (BENCH, {"kernel": "dense", "arms": "vanilla,ngram"}, "--kernel"),
        (BENCH, {"num_draft_tokens": "4", "arms": "vanilla,llama.cpp-spec"}, "--num-draft-tokens"),
        (BENCH, {"draft_from": ["file"], "arms": "vanilla,ngram"}, "--draft-from"),
        (BENCH, {"assistant": "small"}, "--assistant"),
        (BENCH, {"gguf": "file", "spec_type": "other"}, "--gguf"),
        (BENCH, {"spec_type": "other", "arms": "llama.cpp"}, "--spec-type"),
        (BENCH, {"vllm_python": "python"}, "--vllm-python"),
        (BENCH, {"check_noise": False, "arms": "exact"}, "--no-check-noise"),
        (BENCH, {"seed": 3}, "--seed"),
        (BENCH, {"limit": 3, "context": SimpleNamespace(invoked_subcommand="show")}, "--limit"),
    ],
)
def test_what_does_nothing_is_said(
    capsys: pytest.CaptureFixture[str], usual: dict[str, Any], given: dict[str, Any], flags: str
) -> None:
    said = notes(capsys, usual, **given)
    assert any(line.startswith(f"note: {flags}") and " nothing here: " in line for line in said), said


@pytest.mark.parametrize(
    ("usual", "given"),
    [
        *((usual, {}) for usual in (GENERATE, CHAT, SERVE, QUANTIZE, STEPS, BENCH)),
        (GENERATE, {"verify": "gated", "fidelity": 0.9}),
        (GENERATE, {"window": "5"}),
        (GENERATE, {"draft": "ngram", "ngram_max": 4, "num_draft_tokens": "4"}),
        (GENERATE, {"temperature": 1.0, "top_p": 0.9, "seed": 3}),
        (SERVE, {"top_p": 0.9, "seed": 3}),  # a request may ask for a temperature
        (GENERATE, {"repetition_penalty": 1.1}),
        (QUANTIZE, {"private": True, "push_to_hub": "me/mine"}),
        (STEPS, {"shape": "qwen3-8b", "bits": 3, "layers": 2}),
        (BENCH, {"arms": "vanilla,gated", "fidelity": 0.9, "temperature": "0,1", "seed": 3}),
    ],
)
def test_of_what_counts_nothing_is_said(
    capsys: pytest.CaptureFixture[str], usual: dict[str, Any], given: dict[str, Any]
) -> None:
    assert notes(capsys, usual, **given) == []


def test_every_option_of_a_rule_is_one_of_a_command() -> None:
    known = {*GENERATE, *QUANTIZE, *STEPS, *BENCH}
    rules = (*idle_options.DECODING, *idle_options.SAMPLING, *idle_options.SHOWING, *idle_options.QUANTIZING)
    for rule in (*rules, *idle_options.STEPS, *idle_options._bench()):
        assert known >= set(rule.options)


@pytest.mark.usefixtures("own_home")
def test_commands_say_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "hi", "--fidelity", "0.9", "--model", "/nowhere"]) == 2
    assert "note: --fidelity does nothing here: it is for --verify gated\n" in capsys.readouterr().err


@pytest.mark.usefixtures("own_home")
def test_a_dry_run_never_counts_successors(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", "demo", "--successors", "--dry-run"]) == 2
    assert "leave --dry-run out" in capsys.readouterr().err


def test_lines_of_a_table_in_a_pipe_do_not_end_in_blanks(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(box=None, show_header=False)
    for row in (("a", "short"), ("b", "much longer")):
        table.add_row(*row)
    console.show(table)
    console.note(table)
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert "much longer" in text
        assert [line for line in text.splitlines() if line != line.rstrip()] == []
