"""Train the demo model: `python -m tools.demo.train OUTPUT`.

A Qwen3 of 3.5 million parameters learns the running interpreter's standard library. An interrupted run goes on from
OUTPUT.state.safetensors, which holds every tensor, the optimizers' included.
"""

import argparse
import json
import logging
import math
import os
import platform
import random
import re
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from quasar_core.store.folders import begin_work, end_work, partial_folder, refuse_foreign_work
from tools.demo.corpus import Corpus, make_chats, read_corpus
from tools.demo.ngram_lm import NgramModel
from tools.demo.tokenizer import END_OF_TEXT, train_tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Phase:
    """What the model reads from a step on: the share of rows from chats, how often library files stand beside their
    tests, the share of spaces at which a file is cut before it is tokenized, and the share of rows that open a
    statement.

    A cut teaches the model to go on after a prompt that ends in a space; a row that begins `import ` and is cut there,
    to do so with nothing before it.
    """

    first_step: int
    chat_share: float
    library_copies: int
    cut_share: float
    opening_share: float = 0.0


@dataclass(frozen=True)
class TrainConfig:
    """What the run depends on, beside the interpreter's standard library."""

    steps: int = 1900
    tokens_per_step: int = 16_384
    short_context: int = 512
    long_context: int = 1024
    long_context_share: float = 0.15
    decay_share: float = 0.5
    warmup_steps: int = 60
    phases: tuple[Phase, ...] = (Phase(0, 0.25, 2, 0.0), Phase(600, 0.12, 1, 0.0), Phase(800, 0.12, 1, 0.02))
    muon_lr: float = 4e-3
    adam_lr: float = 3e-3
    weight_decay: float = 0.05
    seed: int = 0
    vocab_size: int = 2048


STAGES = {
    "main": TrainConfig(),
    "openings": TrainConfig(
        steps=50,
        long_context_share=1.0,
        decay_share=1.0,
        warmup_steps=5,
        phases=(Phase(0, 0.1, 1, 0.02, opening_share=0.4),),
        muon_lr=4e-4,
        adam_lr=3e-4,
    ),
}


def demo_config(vocab_size: int) -> Qwen3Config:
    """The demo model's shape: q/k norm, grouped-query attention, tied head; every width a multiple of 128."""
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )


@dataclass(frozen=True)
class TokenStreams:
    """The corpus as token ids, every document followed by the end-of-text token; one source stream for each phase."""

    sources: list[np.ndarray]
    chats: np.ndarray
    openings: list[np.ndarray]
    held_out: np.ndarray
    held_out_bytes: int


def tokenize_corpus(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, config: TrainConfig) -> TokenStreams:
    """Tokenize sources as each phase reads them, chats, and held-out sources."""
    end = int(tokenizer.get_vocab()[END_OF_TEXT])

    def join(documents: list[list[str]]) -> np.ndarray:
        pieces = [piece for document in documents for piece in document]
        encoded: list[list[int]] = tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]
        ids = iter(encoded)
        tokens: list[int] = []
        for document in documents:
            for _ in document:
                tokens += next(ids)
            tokens.append(end)
        return np.array(tokens, dtype=np.int64)

    def source(phase: Phase) -> np.ndarray:
        rng = random.Random(config.seed)
        library = [text for text in corpus.train if "unittest" not in text]
        texts = corpus.train + library * (phase.library_copies - 1)
        return join([cut_after_spaces(text, phase.cut_share, rng) for text in texts])

    conversations = make_chats(corpus.functions, config.seed)
    chats = [[str(tokenizer.apply_chat_template(chat, tokenize=False))] for chat in conversations]
    held_out_bytes = sum(len(text.encode()) for text in corpus.held_out)
    held_out = join([[text] for text in corpus.held_out])
    openings = [join([pieces]) for pieces in find_openings(corpus.train, random.Random(config.seed))]
    return TokenStreams([source(phase) for phase in config.phases], join(chats), openings, held_out, held_out_bytes)


def find_openings(texts: list[str], rng: random.Random, count: int = 500) -> list[list[str]]:
    """Random files from a `def`, `class`, `import` or `from` at the left edge on, cut behind that word's space."""
    found: list[list[str]] = []
    for text in rng.sample(texts, len(texts)):
        starts = [match.span() for match in re.finditer(r"^(?:def|class|import|from) ", text, re.MULTILINE)]
        if starts and len(found) < count:
            begin, end = rng.choice(starts)
            found.append([text[begin:end], text[end : begin + 8 * 1024]])
    return found


def cut_after_spaces(text: str, share: float, rng: random.Random) -> list[str]:
    """Cut the text behind a share of the spaces that stand before a word."""
    if share == 0:
        return [text]
    cuts = [match.end() for match in re.finditer(r"(?<=\S) (?=\w)", text) if rng.random() < share]
    return [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def sample_batch(streams: TokenStreams, config: TrainConfig, step: int) -> torch.Tensor:
    """Rows of random crops, [B, T + 1]; a function of the seed and the step alone."""
    number = max(i for i, phase in enumerate(config.phases) if phase.first_step <= step)
    phase = config.phases[number]
    rng = np.random.default_rng((config.seed, step))
    long = step >= config.steps * (1 - config.long_context_share)
    context = config.long_context if long else config.short_context
    rows = []
    for _ in range(config.tokens_per_step // context):
        stream = streams.chats if rng.random() < phase.chat_share else streams.sources[number]
        start = int(rng.integers(len(stream) - context - 1))
        row = stream[start : start + context + 1]
        if phase.opening_share and rng.random() < phase.opening_share:
            opening = streams.openings[int(rng.integers(len(streams.openings)))]
            row = np.concatenate([opening, row])[: context + 1]
        rows.append(row)
    return torch.from_numpy(np.stack(rows))


def make_optimizers(model: PreTrainedModel, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding, a head of its own, and the norms."""
    in_blocks = {n: p.ndim == 2 and not re.search("embed|lm_head", n) for n, p in model.named_parameters()}
    matrices = [p for n, p in model.named_parameters() if in_blocks[n]]
    others = [p for n, p in model.named_parameters() if not in_blocks[n]]
    muon = torch.optim.Muon(
        matrices, lr=config.muon_lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(others, lr=config.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adam]


def learning_rate_scale(step: int, config: TrainConfig) -> float:
    """Linear warm-up, constant, linear decay to zero."""
    remaining = (config.steps - step) / (config.steps * config.decay_share)
    return min(1.0, (step + 1) / config.warmup_steps, remaining)


def train(model: PreTrainedModel, streams: TokenStreams, config: TrainConfig, state: Path) -> None:
    """Train in place, saving every 200 steps to `state`, from where a second call goes on."""
    optimizers = make_optimizers(model, config)
    first = load_state(model, optimizers, state)
    compiled = torch.compile(model)
    progress = tqdm(range(first, config.steps), initial=first, total=config.steps, unit="step", mininterval=10)
    for step in progress:
        batch = sample_batch(streams, config, step)
        with torch.autocast("cpu", torch.bfloat16):
            logits = compiled(input_ids=batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * learning_rate_scale(step, config)
            optimizer.step()
            optimizer.zero_grad()
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"the loss is {loss.item()} at step {step}: lower the learning rates")
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % 200 == 0:
            save_state(model, optimizers, state, step + 1)
            log.info("step %d: loss %.3f", step + 1, loss.item())


def save_state(model: PreTrainedModel, optimizers: list[torch.optim.Optimizer], path: Path, step: int) -> None:
    """Write parameters and optimizer moments, whole or not at all."""
    tensors = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
    for i, optimizer in enumerate(optimizers):
        for j, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{j}.{k}": torch.as_tensor(v) for k, v in moments.items()}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"step": str(step)})
    partial.rename(path)


def load_state(model: PreTrainedModel, optimizers: list[torch.optim.Optimizer], path: Path) -> int:
    """Read what `save_state` wrote; the step to go on from, 0 where there is nothing."""
    if not path.exists():
        return 0
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    for i, optimizer in enumerate(optimizers):
        content = optimizer.state_dict()
        for key, value in tensors.items():
            if key.startswith(f"optimizer.{i}."):
                _, _, j, name = key.split(".")
                content["state"].setdefault(int(j), {})[name] = value
        optimizer.load_state_dict(content)
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


@torch.inference_mode()
def held_out_bits(model: PreTrainedModel, tokens: np.ndarray, context: int) -> float:
    """Total bits for `tokens`, in windows that overlap by half, so that most tokens see context ÷ 2 before them."""
    bits, scored, stride = 0.0, 1, context // 2
    for start in range(0, len(tokens) - 1, stride):
        window = torch.from_numpy(tokens[start : start + context])[None]
        logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none")
        new = start + len(window[0]) - scored
        if new > 0:
            bits += losses[-new:].sum().item() / math.log(2)
            scored += new
    return bits


def write_model(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path, report: dict[str, Any]
) -> None:
    """The demo model's folder, with its card."""
    files = {"training.json": json.dumps(report, indent=2) + "\n", "README.md": model_card(report)}
    save_model(model, tokenizer, output, files)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, output: Path, files: dict[str, str]) -> None:
    """A Hugging Face folder with these texts beside it, whole or not at all."""
    partial = partial_folder(output)
    begin_work(partial)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for name, text in files.items():
        (partial / name).write_text(text)
    end_work(partial, output)


def refuse_output(output: Path) -> None:
    """Refuse, before any training, an output that exists: a trained model is never replaced."""
    if os.path.lexists(output):
        raise SystemExit(f"Error: {output} exists; name another folder.")
    refuse_foreign_work(partial_folder(output))


def model_card(report: dict[str, Any]) -> str:
    """The card: what the model is, what it read, and how well it predicts text that it did not read."""
    return f"""---
license: apache-2.0
library_name: transformers
---
# quasar demo model

A Qwen3 of {report["parameters"]:,} parameters and {report["config"]["vocab_size"]:,} tokens that writes Python. It
exists so that `quasar` can be run, tested and timed without a download. It is a language model, not an assistant.

Trained by `python -m tools.demo.train` on the standard library of Python
{report["python"]} ({report["train_tokens"]:,} tokens of source, {report["chat_tokens"]:,} of chats made from it),
in steps of {report["config"]["tokens_per_step"]:,} tokens: {describe_stages(report)}.

| on {report["held_out_bytes"]:,} bytes of held-out files | bits per byte |
|---|---|
| this model, its stored bf16 weights | {report["held_out_bits_per_byte"]:.3f} |
| n-gram model of order 5 over the same tokens (Witten-Bell) | {report["ngram_bits_per_byte"]:.3f} |
"""


def describe_stages(report: dict[str, Any]) -> str:
    """The stages so far, such as `1,900 of stage main (seed 0), 50 of stage openings (seed 1)`."""
    own = f"{report['config']['steps']:,} of stage {report['stage']} (seed {report['config']['seed']})"
    return f"{describe_stages(report['before'])}, {own}" if report["before"] else own


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--stage", choices=STAGES, default="main", help="the long run, or the short one after it")
    parser.add_argument("--start", type=Path, help="the model to go on from (stage openings)")
    parser.add_argument("--seed", type=int, default=TrainConfig.seed)
    options = parser.parse_args()
    if (options.stage == "main") != (options.start is None):
        parser.error("--start goes with --stage openings")
    refuse_output(options.output)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    config = replace(STAGES[options.stage], seed=options.seed)
    torch.manual_seed(config.seed)

    corpus = read_corpus()
    tokenizer = train_tokenizer(corpus.train, config.vocab_size)
    streams = tokenize_corpus(corpus, tokenizer, config)
    model = Qwen3ForCausalLM(demo_config(config.vocab_size))
    before: dict[str, Any] = {}
    if options.start:
        model = Qwen3ForCausalLM.from_pretrained(options.start, dtype=torch.float32)
        before = json.loads((options.start / "training.json").read_text())
    log.info("%d tokens of source, %d of chats", len(streams.sources[-1]), len(streams.chats))

    begin = time.monotonic()
    state = options.output.with_name(options.output.name + ".state.safetensors")
    train(model, streams, config, state)
    model = model.bfloat16().float()  # score what is stored
    bits = held_out_bits(model, streams.held_out, config.long_context)
    ngram = NgramModel(streams.sources[-1], config.vocab_size)
    report = {
        "before": before,
        "stage": options.stage,
        "config": asdict(config),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_tokens": len(streams.sources[-1]),
        "chat_tokens": len(streams.chats),
        "held_out_bytes": streams.held_out_bytes,
        "held_out_bits_per_byte": round(bits / streams.held_out_bytes, 4),
        "ngram_bits_per_byte": round(ngram.bits(streams.held_out) / streams.held_out_bytes, 4),
        "seconds": round(time.monotonic() - begin),
    }
    write_model(model.bfloat16(), tokenizer, options.output, report)
    state.unlink(missing_ok=True)
    log.info("held-out bits per byte: %.4f", report["held_out_bits_per_byte"])


if __name__ == "__main__":
    main()
