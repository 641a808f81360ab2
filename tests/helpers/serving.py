"""A server in a thread, over the demo model and a 4-bit copy, or over a model whose passes wait for a permit."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import torch
from helpers.tiny_models import RoundedCheckpoint, TableModel, make_pair

import quasar_core.demo
from quasar_core.config import GenerationConfig, SamplingConfig
from quasar_core.models.base import CausalLM
from quasar_core.models.hf.causal_lm import attach_verifier, load_target
from quasar_core.models.pair import Pair, end_of_text_ids, load_tokenizer
from quasar_core.serve.run import RunningServer
from quasar_core.serve.settings import Settings

DEMO = Path(quasar_core.demo.__file__).parent / "model"
QUESTION = "Write a function `count_lines` that counts the lines of a file."
LINES = [{"role": "user", "content": QUESTION}]
# Fixed lengths, so that nothing is measured.
FIXED = GenerationConfig(max_new_tokens=64, num_draft_tokens=4, window=6)


@cache
def demo_models() -> tuple[Any, Any]:
    """The demo model through transformers, and a copy rounded to 4 bits."""
    target = load_target(DEMO, torch.device("cpu"), torch.float32)
    checkpoint: Any = RoundedCheckpoint(target, 4, 128)
    return target, attach_verifier(target, checkpoint, "dense")


def demo_pair(**changes: Any) -> Pair:
    """A new pair of them."""
    target, verifier = changes.pop("models", None) or demo_models()
    tokenizer = load_tokenizer(DEMO)
    eos_ids = end_of_text_ids(DEMO, tokenizer)
    options: dict[str, Any] = {"tokenizer": tokenizer, "eos_ids": eos_ids, "max_context": 2048, "target_name": "demo"}
    return make_pair(target, verifier, **(options | changes))


class GatedModel(TableModel):
    """Each pass waits for a permit, and is counted."""

    def __init__(self) -> None:
        super().__init__(97, 1)
        self.permits, self.passes = threading.Semaphore(0), 0
        self.begun = threading.Event()  # whether a pass waits or ran

    def forward(self, tokens: Sequence[int], cache: Any, last_only: bool = False) -> torch.Tensor:
        self.begun.set()
        assert self.permits.acquire(timeout=60)
        self.passes += 1
        return super().forward(tokens, cache, last_only)


class ScriptedModel(CausalLM):
    """Writes one text, whatever it is asked: the token after n tokens of an answer is the text's n-th."""

    device = torch.device("cpu")
    vocab_size = 0

    def __init__(self, vocabulary: int, script: Sequence[int], prompt_end: int) -> None:
        self.vocab_size, self.script, self.prompt_end = vocabulary, list(script), prompt_end

    def new_cache(self, capacity: int) -> Any:
        from helpers.bench_pair import TokenCache

        return TokenCache(capacity)

    def forward(self, tokens: Sequence[int], cache: Any, last_only: bool = False) -> torch.Tensor:
        logits = torch.zeros(len(tokens), self.vocab_size)
        for row, token in enumerate(tokens):
            cache.tokens.append(token)
            written = self._written(cache.tokens)
            logits[row, self.script[min(written, len(self.script) - 1)]] = 20.0
        return logits[-1:] if last_only else logits

    def _written(self, tokens: Sequence[int]) -> int:
        """Tokens of the answer so far: those behind the last mark of the prompt's end."""
        at = max((i for i, token in enumerate(tokens) if token == self.prompt_end), default=len(tokens) - 1)
        return len(tokens) - 1 - at


def scripted(text: str, template: str) -> Pair:
    """A pair that writes a text, whatever it is asked, and goes on as it can where it may not."""
    pair = demo_pair()
    pair.tokenizer.chat_template = template
    script = [*pair.tokenizer(text)["input_ids"], 2]
    start = pair.tokenizer.convert_tokens_to_ids("<|im_start|>")
    newline = pair.tokenizer("assistant\n")["input_ids"]
    model = ScriptedModel(2048, [*newline, *script], start)
    return demo_pair(tokenizer=pair.tokenizer, models=(model, None))


@contextmanager
def serving(pair: Pair, defaults: GenerationConfig = FIXED, **options: Any) -> Iterator[RunningServer]:
    """A server on a free port, for as long as the context lasts."""
    server = RunningServer(pair, Settings(port=0, defaults=defaults, **options))
    server.start()
    try:
        yield server
        assert not server.server.metrics.defects
    finally:
        server.stop()


def client(server: RunningServer, **options: Any) -> httpx.Client:
    """A plain client of its address."""
    return httpx.Client(base_url=server.url, timeout=60, **options)


def plain(config: GenerationConfig, **changes: Any) -> GenerationConfig:
    """The same without speculation."""
    return replace(config, verify="full", draft="none", **changes)


def sampled(temperature: float, seed: int) -> SamplingConfig:
    return SamplingConfig(temperature=temperature, seed=seed)
