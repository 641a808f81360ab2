"""Train a second small model to measure quantizers on: `python -m tools.demo.small_llama OUTPUT`.

A Llama of one million parameters with a head of its own, no norms of queries and keys, and another width, depth and
vocabulary than the demo model's, on the same text. Minutes on one core; it is not part of the package.
"""

import argparse
import json
import logging
import platform
import time
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tools.demo.corpus import read_corpus
from tools.demo.tokenizer import train_tokenizer
from tools.demo.train import Phase, TrainConfig, held_out_bits, refuse_output, save_model, tokenize_corpus, train

log = logging.getLogger(__name__)

CONFIG = TrainConfig(
    steps=680,
    tokens_per_step=8192,
    short_context=256,
    long_context=512,
    warmup_steps=30,
    phases=(Phase(0, 0.2, 1, 0.0),),
    vocab_size=1024,
)


def llama_config(vocab_size: int) -> LlamaConfig:
    """Four layers of width 128: 1.05 million parameters, an eighth of them in the head."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )


def main() -> None:
    """Parse the command line, train, write the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="folder to write")
    output = parser.parse_args().output
    refuse_output(output)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.manual_seed(CONFIG.seed)

    corpus = read_corpus()
    tokenizer = train_tokenizer(corpus.train, CONFIG.vocab_size)
    streams = tokenize_corpus(corpus, tokenizer, CONFIG)
    model = LlamaForCausalLM(llama_config(CONFIG.vocab_size))
    begin = time.monotonic()
    train(model, streams, CONFIG, output.with_name(output.name + ".state.safetensors"))
    model = model.bfloat16().float()  # score what is stored
    bits = held_out_bits(model, streams.held_out, CONFIG.long_context) / streams.held_out_bytes
    report = {
        "config": asdict(CONFIG),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_bits_per_byte": round(bits, 4),
        "seconds": round(time.monotonic() - begin),
    }
    save_model(model.bfloat16(), tokenizer, output, {"training.json": json.dumps(report, indent=2) + "\n"})
    output.with_name(output.name + ".state.safetensors").unlink(missing_ok=True)
    log.info("held-out bits per byte: %.4f", bits)


if __name__ == "__main__":
    main()
