"""A model folder of a few thousand random weights, for what must run through the whole tool."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory


def files_of(save: Callable[[Path], object]) -> dict[str, bytes]:
    """What a function writes into a folder."""
    with TemporaryDirectory() as folder:
        save(Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    """Write them into a folder, which may be there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def save_tiny_model(folder: Path, seed: int = 0) -> Path:
    """A Qwen3 of two layers with a byte-level tokenizer without merges; `<eos>` ends a text."""
    import torch

    write_files(folder, _tiny_files(seed))
    torch.manual_seed(seed)  # what is drawn next does not depend on whether the files were made before
    return folder


@cache
def _tiny_files(seed: int) -> dict[str, bytes]:
    return files_of(lambda folder: _make_tiny_model(folder, seed))


def _make_tiny_model(folder: Path, seed: int) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    letters = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=len(letters),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        eos_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    Qwen3ForCausalLM(config).save_pretrained(folder)
