"""GGUF files, written by gguf's own writer, as models: weights, tokenizer and template are the file's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.decoder_cases import fresh_logits, in_passes, random_tokens
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from quasar_cli.main import app
from quasar_core.errors import QuasarError, UsageError
from quasar_core.models.loading import load_models
from quasar_core.store import resolve_model
from quasar_core.store.gguf import unpacked

gguf = pytest.importorskip("gguf", reason="the gguf package writes these files")
CPU, FLOAT = torch.device("cpu"), torch.float32
TEMPLATE = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
WORDS = ["<pad>", "<s>", "</s>", *(chr(33 + i) for i in range(94)), *("Ġ",), *(f"w{i}" for i in range(157)), "!!"]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_K", "Q6_K"]
# Of a K-quant's blocks of 256 weights: bytes, and where their factors of 16 bits stand.
BLOCKS = {"Q4_K": (144, (0, 2)), "Q6_K": (210, (208,))}


def tiny() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,  # as all of the family have: transformers' reader does not ask the file
        max_position_embeddings=128,
    )
    return Qwen3ForCausalLM(config).eval()


def own_name(name: str) -> str:
    """What GGUF calls a parameter."""
    if name.startswith("model.layers."):
        _, _, index, rest = name.split(".", 3)
        return f"blk.{index}.{NAMES[rest.removesuffix('.weight')]}.weight"
    return f"{NAMES[name.removesuffix('.weight')]}.weight"


def random_blocks(values: np.ndarray, kind: str) -> np.ndarray:
    """Codes of so many weights, since the package reads K-quants and does not make them; their factors are small."""
    size, factors = BLOCKS[kind]
    blocks = np.random.default_rng(values.size).integers(0, 256, (*values.shape[:-1], values.shape[-1] // 256, size))
    blocks = blocks.astype(np.uint8)
    for place in factors:
        blocks[..., place : place + 2] = np.frombuffer(np.float16(2e-4).tobytes(), np.uint8)
    return blocks.reshape(*values.shape[:-1], -1)


def write(path: Path, kind: str) -> dict[str, torch.Tensor]:
    """The model in a file, its matrices of this type; what they stand for then."""
    model, writer = tiny(), gguf.GGUFWriter(str(path), "qwen3")
    config: Any = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3, *[1] * 253])
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    held: dict[str, torch.Tensor] = {}
    for name, parameter in model.state_dict().items():
        values, width = parameter.float().numpy(), getattr(gguf.GGMLQuantizationType, kind)
        if values.ndim == 1:
            width = gguf.GGMLQuantizationType.F32
        data = random_blocks(values, kind) if width.name in BLOCKS else gguf.quants.quantize(values, width)
        held[name] = torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(data, width))).reshape(values.shape)
        writer.add_tensor(own_name(name), data, raw_dtype=width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUASAR_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("kind", TYPES)
def test_the_model_of_a_file_computes_what_its_weights_stand_for(tmp_path: Path, kind: str) -> None:
    held = write(tmp_path / "tiny.gguf", kind)
    source = resolve_model(str(tmp_path / "tiny.gguf"))
    models = load_models(source.folder, None, CPU, FLOAT)
    model = tiny()
    dtype = {"F32": torch.float32, "F16": torch.float16}.get(kind, torch.bfloat16)
    model.load_state_dict({name: values.to(dtype).float() for name, values in held.items()})
    tokens = [token % 256 for token in random_tokens()]
    logits = in_passes(models.target, tokens, [20, 1, 4])
    torch.testing.assert_close(logits, fresh_logits(model, tokens), atol=1e-4, rtol=1e-4)
    assert models.notes[0] == "decoder: our own"
    note = next(note for note in models.notes if "unpacked from tiny.gguf" in note)
    assert ("rounded weights" in note) == kind.startswith("Q")
    assert source.label == "tiny"


def test_it_is_unpacked_once_and_anew_when_the_file_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write(path, "F32")
    folder = unpacked(path)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert unpacked(path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    write(path, "Q8_0")
    assert unpacked(path) != folder
    assert [child.name for child in folder.parent.iterdir()] == ["tiny"]


def test_tokenizer_and_template_are_the_files(tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf", "F32")
    folder = unpacked(tmp_path / "tiny.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(["!", "~", "w3"]) == [3, 96, 101]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<hi>"
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 2


def test_generate_takes_a_file_and_shows_no_bar_but_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "tiny.gguf", "Q8_0")
    command = ["generate", "--model", str(tmp_path / "tiny.gguf"), "--prompt", "!!!", "--verify", "full"]
    run = CliRunner().invoke(app, [*command, "--max-new-tokens", "4", "--raw", "--json"])
    assert run.exit_code == 0, run.output
    assert "it/s" not in run.stderr + capsys.readouterr().err


def test_files_that_are_no_models_are_one_sentence(tmp_path: Path) -> None:
    other, cut = tmp_path / "notes.txt", tmp_path / "cut.gguf"
    other.write_text("hello")
    cut.write_bytes(b"GGUF\x03\x00")
    with pytest.raises(UsageError, match="is a file, and not of GGUF"):
        resolve_model(str(other))
    with pytest.raises(QuasarError, match=r"cut\.gguf is not a readable GGUF file"):
        resolve_model(str(cut))
    assert not list((tmp_path / "home").rglob("unpacking-*"))
