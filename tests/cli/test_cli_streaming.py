"""Streamed blocks by the command line: the text of plain decoding, from the files and from a copy in 12 bits."""

from pathlib import Path

import pytest
import torch
from helpers.tiny_model import save_tiny_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from quasar_cli.main import run

OPTIONS = ["--prompt", "abcabc", "--raw", "-n", "24", "--dtype", "bfloat16"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a model of four blocks in bfloat16 and a verifier; quasar's own folder."""
    monkeypatch.setenv("QUASAR_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "four")
    config = Qwen3Config.from_pretrained(tmp_path / "four")
    config.num_hidden_layers, config.layer_types = 4, ["full_attention"] * 4
    config.initializer_range = 0.2
    torch.manual_seed(1)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "four")
    assert run(["quantize", "four", "--samples", "4", "--seq-len", "24"]) == 0
    return tmp_path


@pytest.mark.usefixtures("cpp_pass")
def test_a_copy_in_12_bits_writes_the_same_text(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(["generate", *OPTIONS, "--verify", "full", "--draft", "none", "--offload", "none"]) == 0
    expected = capsys.readouterr().out
    assert len(expected) > 10
    for options, form in ((["--no-compress"], ""), (["--compress"], ", in 12 bits"), ([], ", in 12 bits")):
        assert run(["generate", *OPTIONS, "--offload", "target", *options]) == 0
        shown = capsys.readouterr()
        assert shown.out == expected
        said = " ".join(shown.err.split())
        assert f"offload: 0 of the target's 4 blocks stay in memory{form}, with all else and a cache of 128" in said
        assert "; 4 are read whenever it passes," in said
        assert "tokens a second are expected" in said
    assert len(list((place / "home" / "compressed").glob("*/block-*.safetensors"))) == 4
    assert run(["models", "forget"]) == 0
    assert not list((place / "home" / "compressed").iterdir())


@pytest.mark.parametrize("options", [["--offload", "target"], ["--decode-memory", "6GB"]])
def test_how_decoding_streams_is_asked_where_bits_are_chosen(
    options: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(["quantize", str(save_tiny_model(tmp_path / "tiny")), *options]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--offload and --decode-memory go with --bits auto, which chooses for them." in said
    both = ["--bits", "auto", "--offload", "none", "--decode-memory", "6GB"]
    assert run(["quantize", str(tmp_path / "tiny"), *both]) == 2
    assert "leave --offload none out" in " ".join(capsys.readouterr().err.split())
