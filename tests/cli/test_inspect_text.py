"""Fidelity on a user's text, the kinds of tokens, and the figure."""

import json
from pathlib import Path

import pytest
import torch
from helpers.quantize_cases import quantize
from helpers.stand_ins import FIDELITY
from helpers.tiny_model import save_tiny_model
from transformers import AutoTokenizer

from quasar_cli.main import run
from quasar_core.bench.plots import plot_fidelity
from quasar_core.quantize.fidelity import KINDS, kind_of, token_kinds

pytest_plugins = ["helpers.quantize_fixtures"]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" def", "letters"),
        ("x1", "letters"),
        ("é", "letters"),
        ("42", "digits"),
        ("):\n", "punctuation"),
        ("\n    ", "whitespace"),
        ("\ufffd", "part of a character"),
    ],
)
def test_the_kind_of_a_text(text: str, kind: str) -> None:
    assert kind_of(text) == kind


def test_the_kinds_of_a_vocabulary(tmp_path: Path) -> None:
    """A byte-level tokenizer: the ids beyond it, and the end of text, are special; bytes above 127 are parts."""
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(tmp_path / "tiny"))
    kinds = token_kinds(tokenizer, len(tokenizer) + 7)
    assert len(kinds) == len(tokenizer) + 7
    ids = {text: tokenizer(text)["input_ids"][0] for text in ("a", "7", "(", " ", "é")}
    found = {text: KINDS[kinds[number]] for text, number in ids.items()}
    wanted = {"a": "letters", "7": "digits", "(": "punctuation", " ": "whitespace", "é": "part of a character"}
    assert found == wanted
    assert [KINDS[kind] for kind in kinds[[0, -1]]] == ["special", "special"]


def test_fidelity_on_a_text(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = quantize(source).checkpoint
    (tmp_path / "text.txt").write_text("def f(x): return x + 1\n" * 60)
    asked = ["inspect", folder, "--against", str(source), "--text", str(tmp_path / "text.txt")]
    assert run([*asked, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    measured = document["measured"]
    assert (measured["text"], measured["agreement"]) == ("text.txt", measured["agreement_sampled"])
    assert measured["kl_mean"] > 0
    assert sum(part["tokens"] for part in measured["by_kind"]) == measured["tokens"] > 1000
    assert {layer["bits"] for layer in document["layers"]} == {4}
    assert sum(layer["bytes"] for layer in document["layers"]) == document["bytes"]["packed"]
    assert run(asked) == 0
    shown = capsys.readouterr().out
    assert "By position" in shown
    assert "punctuation" in shown


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (["--against", "demo"], 2, "--against MODEL and --text FILE go together"),
        (["--against", "{source}", "--text", "{missing}"], 2, "--text must be a file or one of generic, wikitext2, c4"),
        (["--against", "{source}", "--text", "{empty}"], 2, "holds 0 tokens; at least 2 are needed"),
        (["--against", "{other}", "--text", "{text}"], 1, "they do not belong together"),
        (["--plot", "figure.txt"], 2, "--plot must end in .png or .svg"),
    ],
)
def test_what_cannot_be_measured(
    options: list[str],
    code: int,
    sentence: str,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"source": source, "missing": tmp_path / "none.txt", "empty": tmp_path / "empty.txt"}
    places |= {"text": tmp_path / "text.txt", "other": save_tiny_model(tmp_path / "other")}
    places["empty"].write_text("")
    places["text"].write_text("def f(): pass\n" * 9)
    folder = quantize(source).checkpoint
    assert run(["inspect", folder, *(option.format(**places) for option in options)]) == code
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_the_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    losses = {"model.layers.0.mlp.up_proj": 0.01, "model.layers.1.mlp.up_proj": 0.02}
    plot_fidelity(FIDELITY, losses, "a verifier", tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text()
    assert text.count("<svg") == 1
    assert len(text) > 10_000


def test_a_text_of_a_few_tokens_is_one_row(source: Path, tmp_path: Path) -> None:
    from quasar_core.api import measuring

    (tmp_path / "short.txt").write_text("def")
    report = measuring.fidelity_on_text(str(source), Path(quantize(source).checkpoint), str(tmp_path / "short.txt"))
    assert report.tokens == 2
    assert torch.isfinite(torch.tensor(report.kl_mean))
