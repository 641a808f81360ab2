"""Models of random weights, of families that run through transformers, in the shape of a real small one.

Twelve blocks of hidden size 768 and a vocabulary of 50,304 tokens: 100 to 200 million parameters. What decoding costs
depends on shapes alone, so random weights do.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quasar_core.foreign_bars import hidden_bars

VOCABULARY, HIDDEN, BLOCKS, HEADS, POSITIONS = 50_304, 768, 12, 12, 2048
ENDS = {"eos_token_id": 0, "bos_token_id": None}
_COMMON = {"vocab_size": VOCABULARY, **ENDS}
_USUAL = {**_COMMON, "hidden_size": HIDDEN, "num_hidden_layers": BLOCKS}
_HEADS = {**_USUAL, "num_attention_heads": HEADS}
_NEW = {**_HEADS, "intermediate_size": 4 * HIDDEN, "max_position_embeddings": POSITIONS}
_GATED = {**_NEW, "intermediate_size": 2048, "num_key_value_heads": 4}
_OLD = {**_COMMON, "n_embd": HIDDEN, "n_layer": BLOCKS, "n_head": HEADS, "n_positions": POSITIONS}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # what the class is named after, and options of its config
    "gpt2": ("GPT2", _OLD),
    "opt": ("OPT", {**_HEADS, "ffn_dim": 4 * HIDDEN, "word_embed_proj_dim": HIDDEN, "pad_token_id": 1}),
    "bloom": ("Bloom", {**_COMMON, "hidden_size": HIDDEN, "n_layer": BLOCKS, "n_head": HEADS}),
    "mpt": ("Mpt", {**_COMMON, "d_model": HIDDEN, "n_layers": BLOCKS, "n_heads": HEADS, "max_seq_len": POSITIONS}),
    "gpt-neox": ("GPTNeoX", _NEW),
    "gpt-j": ("GPTJ", {**_OLD, "rotary_dim": 64}),
    "falcon": ("Falcon", {**_HEADS, "alibi": False, "multi_query": True, "parallel_attn": True}),
    "phi": ("Phi", _NEW),
    "stablelm": ("StableLm", _GATED),
    "starcoder2": ("Starcoder2", {**_NEW, "num_key_value_heads": 4}),
    "cohere": ("Cohere", {**_GATED, "pad_token_id": 0}),
    "nemotron": ("Nemotron", {**_NEW, "num_key_value_heads": 4}),
    "mamba": ("Mamba", {**_USUAL, "num_hidden_layers": 24, "state_size": 16}),
    "falcon-h1": (
        "FalconH1",
        {**_GATED, "mamba_d_ssm": HIDDEN, "mamba_n_heads": 24, "mamba_d_head": 32, "mamba_d_state": 64},
    ),
}


def build_family(name: str, **changes: Any) -> Any:
    """The model of a family with transformers' own random weights; `changes` are other options of its config."""
    family, options = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(**options | changes)
    return getattr(transformers, f"{family}{'LMHeadModel' if family == 'GPT2' else 'ForCausalLM'}")(config)


def save_family(folder: Path, name: str, **changes: Any) -> Path:
    """The same with wider weights and a tokenizer, in bfloat16."""
    torch.manual_seed(0)
    model = build_family(name, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:  # the best token leads by more than a rounding
                parameter.normal_(0, 0.08)
    save_tokenizer(folder, model.config.vocab_size)
    with hidden_bars():
        model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path, size: int) -> None:
    """Bytes, and behind them words that nobody uses: any token of a random model is some text."""
    letters = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = [*letters, *(f"Ġword{number}" for number in range(size - len(letters)))]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
