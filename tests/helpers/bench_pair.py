"""A pair whose models count: small, exact, and able to fail on demand, for the tests of a bench run."""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from quasar_core.bench.arms import BenchConfig
from quasar_core.bench.datasets import Dataset, Question
from quasar_core.models.base import CausalLM
from quasar_core.models.pair import Pair

VOCABULARY = 12
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"


class TokenCache:
    """A cache that holds the tokens themselves."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.tokens: list[int] = []

    @property
    def length(self) -> int:
        return len(self.tokens)

    def rollback(self, length: int) -> None:
        del self.tokens[length:]


class CountingModel(CausalLM):
    """The best next token is the last one + 1, from 3 to 9 and round again; `wrong_after` it errs by one."""

    vocab_size = VOCABULARY
    device = torch.device("cpu")

    def __init__(self, wrong_after: int = -1, fails_on: int = -1) -> None:
        self.wrong_after, self.fails_on = wrong_after, fails_on

    def new_cache(self, capacity: int) -> TokenCache:
        return TokenCache(capacity)

    def forward(self, tokens: Sequence[int], cache: TokenCache, last_only: bool = False) -> torch.Tensor:
        if self.fails_on in tokens and len(tokens) > 1:
            raise RuntimeError("out of memory")
        cache.tokens += tokens
        logits = torch.zeros(len(tokens), VOCABULARY)
        for row, token in enumerate(tokens):
            logits[row, 3 + (token - 2 + (token == self.wrong_after)) % 7] = 9.0
        return logits[-1:] if last_only else logits


def make_pair(verifier: CountingModel | None = None, target: CountingModel | None = None) -> Pair:
    """Words `w3` to `w11` are the tokens 3 to 11; `w11` never follows by counting."""
    words = {"user": 0, "assistant": 1, "?": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE)
    return Pair(
        tokenizer=fast,
        target=target or CountingModel(),
        verifier=verifier,
        target_name="counting",
        verifier_name="counting-4bit" if verifier else None,
        max_context=256,
        eos_ids=frozenset(),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


ALL = ("vanilla", "ngram", "quantized", "exact")
DATASET = Dataset(
    "d",
    (
        Question(1, "one", ("w3 w4 w5 w3",)),
        Question(2, "two", ("w7 w8", "w5 w6")),
        Question("third", "one", ("w9",)),
    ),
    "nowhere",
)


def config(arms: tuple[str, ...] = ALL, **changes: object) -> BenchConfig:
    """Short answers of these arms; `changes` are other fields."""
    fields: dict[str, object] = {"max_new_tokens": 12, "num_draft_tokens": 4, "window": 3}
    return BenchConfig(arms, **{**fields, **changes})  # type: ignore[arg-type]
