"""The costs of passes: bytes and floors by hand, random models, the command from end to end."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_cases import CPU, FLOAT

from quasar_cli.main import run
from quasar_cli.render import steps as render
from quasar_cli.render.grids import as_markdown
from quasar_core.bench import steps, synthetic_models
from quasar_core.bench.steps import (
    Candidate,
    RandomShape,
    StepConfig,
    StepReport,
    cache_bytes,
    layer_bytes,
    step_rows,
    time_passes,
    weight_bytes,
)
from quasar_core.bench.synthetic_models import random_pair
from quasar_core.config import QuantizeConfig
from quasar_core.errors import UsageError
from quasar_core.models.config import shapes
from quasar_core.models.config.decoder import DecoderConfig
from quasar_core.timing import Timing

TINY = {
    **shapes.SHAPES["qwen3-0.6b"],
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 160,
}
CONFIG = DecoderConfig.parse(TINY)
LAYER = 64 * (128 + 64 + 64) + 128 * 64 + 3 * 64 * 96  # q, k, v; o; gate, up, down


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small probe, a small pool, a shape named tiny and one that has biases."""
    monkeypatch.setitem(steps.PROBE_BYTES, "cpu", 4_000_000)
    monkeypatch.setattr(synthetic_models, "POOL", 10_007)
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    biased = {**TINY, "architectures": ["PanguEmbeddedForCausalLM"], "model_type": "PanguEmbedded", "bias": True}
    monkeypatch.setitem(shapes.SHAPES, "tiny-pangu", {**biased, "tie_word_embeddings": False})


# Bytes, floors, medians


def test_weight_bytes_by_hand() -> None:
    assert weight_bytes(CONFIG, 2) == 2 * (3 * LAYER + 160 * 64)
    biased = DecoderConfig.parse(shapes.SHAPES["tiny-pangu"])
    assert weight_bytes(biased, 2) == 2 * (3 * (LAYER + 128 + 64 + 64 + 64) + 160 * 64)


@pytest.mark.parametrize(
    ("bits", "group_size", "expected"),
    [
        (4, 32, 8 * (64 * 4 + 2 * 20) // 8),
        (4, -1, 8 * (64 * 4 + 1 * 20) // 8),
        (3, 64, 8 * (64 * 3 + 1 * 19) // 8),
        (8, 48, 8 * (64 * 8 + 2 * 24) // 8),  # the last group is shorter
    ],
)
def test_packed_bytes_by_hand(bits: int, group_size: int, expected: int) -> None:
    assert layer_bytes(64, 8, bits, group_size) == expected


def test_the_bytes_of_the_published_shape() -> None:
    """Qwen3-0.6B has 596 million weights, read once; 256 positions are 28 layers of 2 · 8 · 128 numbers each."""
    config = DecoderConfig.parse(shapes.SHAPES["qwen3-0.6b"])
    assert weight_bytes(config, 2) == pytest.approx(1.192e9, rel=1e-3)
    assert cache_bytes(config, 256, 2) == 256 * 28 * 2 * 8 * 128 * 2


def test_a_window_bounds_the_bytes_of_the_cache() -> None:
    windows = {"use_sliding_window": True, "sliding_window": 10, "layer_types": ["sliding_attention"] * 3}
    config = DecoderConfig.parse({**TINY, **windows})
    assert cache_bytes(config, 256, 4) == 3 * 10 * 2 * 2 * 32 * 4
    assert cache_bytes(config, 4, 4) == 3 * 4 * 2 * 2 * 32 * 4


def test_rows_by_hand() -> None:
    by_name = {"target": Candidate(model=None, kernel="torch linear", weight_bytes=900)}  # type: ignore[arg-type]
    samples = {("target", 1): Timing((0.002, 0.003, 0.004)), ("target", 8): Timing((0.005,))}
    first, second = step_rows(samples, by_name, {1: 100, 8: 300}, (1e6, 5e5), {("target", 8): 0.25})
    assert (first.ms, first.bytes, first.floor_ms, first.slow_floor_ms) == (3.0, 1000, 1.0, 2.0)
    assert first.ratio == 3.0
    assert (second.tokens, second.bytes, second.floor_ms) == (8, 1200, 1.2)
    assert (first.outside, second.outside) == (None, 0.25)
    assert (first.spread, second.spread) == (pytest.approx(0.5), None)


# Timing


class CountingModel:
    """Keeps the passes that it was asked for."""

    vocab_size, device = 50, CPU

    def __init__(self, name: str, log: list[tuple[str, int, int]]) -> None:
        self.name, self.log = name, log

    def new_cache(self, capacity: int) -> "CountingModel":
        self.capacity, self.length = capacity, 0
        return self

    def rollback(self, length: int) -> None:
        self.length = length

    def forward(self, tokens: list[int], cache: Any, last_only: bool = False) -> None:
        assert last_only, "logits of every token are written"
        self.choose(tokens, cache)

    def choose(self, tokens: list[int], cache: Any) -> None:
        self.log.append((self.name, self.length, len(tokens)))
        self.length += len(tokens)
        assert self.length <= self.capacity
        assert all(0 <= token < 50 for token in tokens)


def test_passes_are_interleaved_behind_the_same_context() -> None:
    log: list[tuple[str, int, int]] = []
    models: dict[str, Any] = {name: CountingModel(name, log) for name in "ab"}
    samples = time_passes(models, StepConfig(tokens=(1, 4), context=300, rounds=2))
    assert log[:4] == [("a", 0, 256), ("a", 256, 44), ("b", 0, 256), ("b", 256, 44)]
    assert log[4:] == [("a", 300, 1), ("b", 300, 1), ("a", 300, 4), ("b", 300, 4)] * 3
    assert {place: len(timing.samples) for place, timing in samples.items()} == {
        (m, t): 2 for m in "ab" for t in (1, 4)
    }


def test_the_probe_gives_bytes_per_second() -> None:
    assert 1e8 < steps.read_bandwidth(CPU) < 1e13


# Random models


@pytest.mark.parametrize("name", ["tiny", "tiny-pangu"])
def test_random_models_have_no_zeros_and_finite_logits(name: str) -> None:
    config = DecoderConfig.parse(shapes.SHAPES[name])
    target, verifier = random_pair(config, QuantizeConfig(group_size=32), CPU, FLOAT)
    assert target.embedding.shape == (160, 64)
    assert float((target.embedding == 0).float().mean()) < 0.01
    x = torch.ones(1, 96)
    assert not torch.equal(target.layers[0].down(x), target.layers[-1].down(x))
    for model in (target, verifier):
        logits = model.forward([1, 2, 3], model.new_cache(8))
        assert torch.isfinite(logits).all()
        assert float(logits.std()) > 0


def test_a_quantized_head_is_counted() -> None:
    heads = [
        steps.random_candidates(RandomShape("tiny", codes=QuantizeConfig(group_size=32, lm_head_bits=bits)))
        for bits in (16, 4)
    ]
    sizes = [candidates.by_name["verifier"].weight_bytes for candidates in heads]
    head = layer_bytes(64, 160, 4, 32)
    itemsize = heads[0].dtype.itemsize
    assert sizes[0] - sizes[1] == itemsize * 160 * 64 - head
    layers = [(64, 256), (128, 64), (64, 192), (96, 64)]
    assert sizes[1] == head + 3 * sum(layer_bytes(*layer, 4, 32) for layer in layers)
    assert heads[0].by_name["target"].weight_bytes == weight_bytes(CONFIG, itemsize)


# The command


def ask(*arguments: str) -> int:
    return run(["bench", "steps", "--shape", "tiny", "--tokens", "1,3", "--context", "20", "--rounds", "2", *arguments])


def test_it_has_help_and_takes_verbose_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "steps", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--verbose" in shown
    assert "--json" in shown


def test_json_tells_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "steps.json"
    assert ask("--json", "--layers", "2", "--reference", "transformers", "--output", str(output)) == 0
    document = json.loads(capsys.readouterr().out)
    assert json.loads(output.read_text()) == document
    assert (document["layers"], document["all_layers"]) == (2, 3)
    assert len(document["bandwidth"]) == 2
    assert document["versions"]["torch"] == torch.__version__
    places = [(row["model"], row["tokens"]) for row in document["rows"]]
    assert places == [(name, count) for name in ("target", "verifier", "transformers") for count in (1, 3)]
    for row in document["rows"]:
        assert row["ratio"] == pytest.approx(row["ms"] / row["floor_ms"])
        assert row["kernel"]
    two_layers = DecoderConfig.parse({**TINY, "num_hidden_layers": 2})
    itemsize = getattr(torch, document["dtype"]).itemsize
    assert document["rows"][0]["bytes"] == weight_bytes(two_layers, itemsize) + cache_bytes(two_layers, 21, itemsize)


def test_tables_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    figure = tmp_path / "steps.svg"
    assert ask("--layers", "1", "--plot", str(figure), "--kernel", "reference") == 0
    shown = capsys.readouterr()
    assert "1 of the 3 layers and the head" in shown.out
    assert "measured in this run" in shown.out
    assert "reference" in shown.out
    assert "ms: median" in shown.err
    assert figure.read_text().lstrip().startswith("<?xml")


def test_markdown_has_a_row_for_each_length() -> None:
    taken = {("target", 1): 0.002, ("target", 16): 0.25, ("transformers", 1): 0.004, ("transformers", 16): 2.0}
    rows = list(
        step_rows(
            {place: Timing((seconds,)) for place, seconds in taken.items()},
            {name: Candidate(None, "k", 10**6) for name in ("target", "transformers")},  # type: ignore[arg-type]
            {1: 0, 16: 0},
            (1e9, 2e9),
            {("target", 1): 0.123},
        )
    )
    config = StepConfig(tokens=(1, 16))
    report = StepReport("m", 3, 3, config, "cpu", "bfloat16", {}, None, (1e9, 2e9), rows)
    assert as_markdown(render.step_grids(report)[1]).splitlines()[-2:] == [
        "| target | 1.0 MB | 12 % | k |",
        "| transformers | 1.0 MB | – | k |",
    ]
    lines = as_markdown(render.step_grids(report)[0]).splitlines()
    assert lines[0] == "**A pass of T tokens after 256: 3 layers and the head**"
    assert lines[-2:] == [
        "| 1 | 2.00 | 0.500 to 1.00 | 4.00 | 4.00 |",
        "| 16 | 250.0 | 0.500 to 1.00 | 500.00 | 2000 |",
    ]


def test_a_file_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("quasar_core.bench.steps.write_json", refuse)
    assert ask("--output", str(tmp_path / "steps.json")) == 1
    assert "steps.json could not be written: No space left on device." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--tokens", "1,x"), "--tokens must be numbers"),
        (("--tokens", "0"), "--tokens must be numbers"),
        (("--rounds", "0"), "--rounds must be at least 1"),
        (("--context", "0"), "--context must be at least 1"),
        (("--layers", "4"), "--layers must be from 1 to 3"),
        (("--shape", "gpt-2"), "--shape must be one of qwen3-32b"),
        (("--bits", "5"), "--bits must be one of"),
        (("--reference", "jax"), "--reference must be one of none, transformers"),
        (("--plot", "steps.txt"), "--plot must end in .png or .svg"),
        (("--model", "demo"), "--shape makes a model of its own"),
        (("--shape", "tiny-pangu", "--reference", "transformers"), "transformers has no PanguEmbedded"),
    ],
)
def test_wrong_usage_is_one_sentence(
    arguments: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(*arguments) == 2
    assert sentence in capsys.readouterr().err


def test_a_config_is_checked() -> None:
    with pytest.raises(UsageError, match="--tokens"):
        StepConfig(tokens=(257,))


def test_a_stored_pair_is_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    target, verifier = random_pair(CONFIG, QuantizeConfig(group_size=32), CPU, FLOAT)

    class LoadedPair:
        target_name, device, dtype, notes = "mine", CPU, FLOAT, ("kernel: mine",)

    pair = LoadedPair()
    pair.target, pair.verifier = target, verifier  # type: ignore[attr-defined]
    monkeypatch.setattr("quasar_core.api.measuring.load", lambda *_, **__: pair)
    assert run(["bench", "steps", "--model", "demo", "--tokens", "2", "--rounds", "1", "--json", "-v"]) == 0
    shown = capsys.readouterr()
    assert "- kernel: mine" in shown.err
    document = json.loads(shown.out)
    assert (document["name"], document["layers"]) == ("mine", 3)
    assert [row["model"] for row in document["rows"]] == ["target", "verifier"]
    assert steps.StepConfig().context == document["config"]["context"]
