"""What the proofs of decoding share: tiny random models, pairs of them, drafters that are always right or wrong."""

import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from helpers.bench_pair import TokenCache
from helpers.near_ties import first_clear
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from quasar_core.checkpoint.gptq_format import QuantizedWeight, trivial_groups
from quasar_core.config import GenerationConfig, SamplingConfig
from quasar_core.decode.costs.pass_costs import PairCosts, PassCost
from quasar_core.decode.engine import Engine
from quasar_core.decode.generator import Generator
from quasar_core.decode.policy.agreement import AgreementCurve, RunningAgreement
from quasar_core.decode.policy.check import Check, Checker
from quasar_core.decode.policy.checking import Checking
from quasar_core.decode.policy.lengths import FixedLength, WindowPolicy
from quasar_core.decode.policy.window_values import prospect_of
from quasar_core.draft.base import Draft, Drafter
from quasar_core.draft.ngram import NgramDrafter
from quasar_core.models.base import CausalLM
from quasar_core.models.hf.causal_lm import TransformersLM, attach_verifier
from quasar_core.models.pair import Pair
from quasar_core.quantize.solve.grid import fit_grid, round_to_nearest
from quasar_core.records import MarginTable

VOCABULARY = 97
CONTEXT = 128
DRAFTERS = ("ngram", "oracle", "wrong")
CPU = torch.device("cpu")
PROMPT = [5, 17, 42, 8, 5, 17, 42, 9, 61, 5, 17]
ARCHITECTURES = ("llama", "mistral", "mistral-sliding", "qwen2", "qwen3")
_CLASSES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "mistral-sliding": (MistralConfig, MistralForCausalLM, {"sliding_window": 9}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": True, "head_dim": 16}),
}


@cache
def random_model(architecture: str, seed: int = 0) -> TransformersLM:
    """Two layers in float32; weights are drawn wide, and such that after PROMPT the best token leads clearly."""
    config_class, model_class, options = _CLASSES[architecture]
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
        **options,
    )

    def make(attempt: int) -> Any:
        torch.manual_seed(100 * attempt + seed)
        return model_class(config).eval()

    return TransformersLM(first_clear(make, PROMPT, 48, penalties=(1.0, 1.4)))


class RoundedCheckpoint:
    """In the place of a checkpoint on disk: every linear layer of the decoder, rounded to nearest."""

    folder = Path("rounded")
    own_norms = False

    def __init__(self, target: TransformersLM, bits: int = 4, group_size: int = 32) -> None:
        self.layers = {
            name: _round_layer(module.weight.detach(), bits, group_size)
            for name, module in target.model.named_modules()
            if isinstance(module, torch.nn.Linear) and name != "lm_head"
        }
        self.layer_names = list(self.layers)

    def layer(self, name: str) -> QuantizedWeight:
        return self.layers[name]


def _round_layer(weight: torch.Tensor, bits: int, group_size: int) -> QuantizedWeight:
    grid = fit_grid(weight, bits, group_size, sym=True, search=False)
    groups = trivial_groups(weight.shape[1], group_size)
    codes = round_to_nearest(weight, grid, groups.long())
    return QuantizedWeight(
        bits,
        group_size,
        codes.t().to(torch.uint8).contiguous(),
        grid.scales.t().to(torch.float16).contiguous(),
        grid.zeros.t().to(torch.int32).contiguous(),
        groups,
    )


@cache
def quantized_copy(architecture: str, bits: int = 4) -> TransformersLM:
    """A verifier of packed codes over the target's own embedding, norms and head."""
    target = random_model(architecture)
    checkpoint: Any = RoundedCheckpoint(target, bits)
    return attach_verifier(target, checkpoint, "reference")


def words() -> PreTrainedTokenizerFast:
    """Token i is the word `wi`; texts are words between spaces. A new one each time: some tests change theirs."""
    vocabulary = {f"w{i}": i for i in range(VOCABULARY)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="w0")))


def make_pair(target: Any, verifier: Any = None, **changes: Any) -> Pair:
    """A pair of the models on the CPU, without a token that ends a text unless one is named."""
    options: dict[str, Any] = {
        "tokenizer": words(),
        "target": target,
        "verifier": verifier,
        "target_name": "tiny",
        "verifier_name": "tiny-rounded" if verifier else None,
        "max_context": CONTEXT,
        "eos_ids": frozenset(),
        "device": CPU,
        "dtype": torch.float32,
    }
    return Pair(**(options | changes))


@cache
def greedy_reference(architecture: str, count: int, penalty: float = 1.0, prompt: tuple[int, ...] = ()) -> list[int]:
    """The new tokens of transformers' own greedy `generate`."""
    ids = torch.tensor([prompt or PROMPT])
    output = random_model(architecture).model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        repetition_penalty=penalty,
    )
    return list(output[0, ids.shape[1] :].tolist())


class TableModel(CausalLM):
    """The logits are a fixed random function of the last two tokens: fast, and its distribution can be counted out."""

    device = CPU
    vocab_size = VOCABULARY

    def __init__(self, vocabulary: int, seed: int, scale: float = 1.5) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.vocab_size = vocabulary
        self.table = scale * torch.randn(vocabulary, vocabulary, vocabulary, generator=generator)

    def disturbed(self, noise: float, seed: int = 9) -> "TableModel":
        """A copy with Gaussian noise on every logit: a verifier, worse the larger the noise."""
        copy = TableModel(self.vocab_size, seed, noise)
        copy.table = self.table + copy.table
        return copy

    def new_cache(self, capacity: int) -> TokenCache:
        return TokenCache(capacity)

    def forward(self, tokens: Sequence[int], cache: TokenCache, last_only: bool = False) -> torch.Tensor:
        before = [*cache.tokens[-1:], *tokens[:-1]] if cache.tokens else [0, *tokens[:-1]]
        cache.tokens += tokens
        assert len(cache.tokens) <= cache.capacity
        logits = self.table[before, list(tokens)]
        return logits[-1:] if last_only else logits


class TreeTable(TableModel):
    """A table that passes trees: a node's row is that of its own last two tokens."""

    longest_tree = 16  # type: ignore[assignment]

    def forward_tree(self, tokens: Sequence[int], parents: Sequence[int], cache: Any) -> torch.Tensor:
        before = [tokens[parent] if parent >= 0 else cache.tokens[-1] for parent in parents]
        cache.tokens += tokens
        return self.table[before, list(tokens)]

    def new_cache(self, capacity: int) -> Any:
        return TreeTokens(capacity)


class TreeTokens(TokenCache):
    """Keeps a path of a tree."""

    def keep(self, start: int, nodes: Sequence[int]) -> None:
        self.tokens[start:] = [self.tokens[start + node] for node in nodes]


class OracleDrafter(Drafter):
    """Knows the text that plain decoding yields; with `shift`, proposes other tokens instead: always wrong."""

    def __init__(self, text: Sequence[int], shift: int = 0, vocabulary: int = VOCABULARY) -> None:
        self.text, self.shift, self.vocabulary = text, shift, vocabulary
        self.position = 0

    def observe(self, tokens: Sequence[int]) -> None:
        self.position += len(tokens)

    def forget(self, count: int) -> None:
        self.position -= count

    def propose(self, limit: int, after: Sequence[int] = ()) -> Draft:
        begin = self.position + len(after)
        known = self.text[begin : begin + limit] if limit > 0 else []
        return Draft.of([(token + self.shift) % self.vocabulary for token in known], "oracle", 1)


def drafter_factory(kind: str, text: Sequence[int], vocabulary: int = VOCABULARY) -> Callable[[], Drafter]:
    """`text` is prompt and answer; the oracle drafts from it, the adversary always drafts something else."""
    if kind == "ngram":
        return NgramDrafter
    return lambda: OracleDrafter(text, shift=int(kind == "wrong"), vocabulary=vocabulary)


def generate(
    pair: Pair,
    verify: str,
    drafts: int = 4,
    window: int = 4,
    count: int = 24,
    make_draft: Callable[[], Drafter] | None = None,
    **options: Any,
) -> Any:
    """One answer to PROMPT by a new generator."""
    config = GenerationConfig(count, verify, num_draft_tokens=drafts, window=window, **options)  # type: ignore[arg-type]
    return Generator(pair, config, make_draft).generate(PROMPT)


def verifier_of(architecture: str, kind: str) -> TransformersLM:
    """A 4-bit or 8-bit copy of the target, or a model that has nothing to do with it."""
    return random_model(architecture, seed=1) if kind == "random" else quantized_copy(architecture, int(kind))


def greedy_by_hand(first: Any, then: Any, count: int) -> list[int]:
    """The prompt through `first`, every later token through `then`, one by one."""
    cache, tokens = first.new_cache(CONTEXT), []
    logits = first.forward(PROMPT, cache)
    for _ in range(count):
        tokens.append(int(logits[-1].argmax()))
        logits = then.forward(tokens[-1:], cache)
    return tokens


def drawn_decisions(seed: int, decisions: str = "both") -> Callable[..., Check]:
    """In the place of `Checker.choose`: the target, the verifier, or one of both by chance, and any length."""
    luck = random.Random(seed)

    def choose(
        window: int, survival: float, at_target: Sequence[float], at_verifier: Sequence[float], whole: bool = False
    ) -> Check:
        by_target = decisions == "target" or window > 9 or (decisions == "both" and luck.random() < 0.4)
        return Check(by_target, luck.randint(0, len(at_target if by_target else at_verifier)), 0.0)

    return choose


@cache
def _any_checker() -> Checker:
    costs = PairCosts(PassCost((1,), (1.0,)), PassCost((1,), (3.0,)))
    curve = AgreementCurve(MarginTable([0.5], [100, 900], [60, 890]))
    return Checker(costs, RunningAgreement(curve), [prospect_of((), (), costs, 0.0)])


def routed_engine(
    pair: Pair,
    drafter: Drafter,
    choose: Callable[..., Check],
    count: int,
    sampling: SamplingConfig | None = None,
) -> Engine:
    """An engine of `exact` in which `choose` says who checks a draft."""
    checker = _any_checker()
    checker.choose = choose  # type: ignore[method-assign]
    config = GenerationConfig(count, sampling=sampling or SamplingConfig())
    limit = len(PROMPT) + count
    return Engine(
        pair,
        pair.new_cache(limit),
        config,
        drafter,
        FixedLength(4),
        WindowPolicy(1),
        limit,
        checking=Checking(checker, FixedLength(4), FixedLength(6)),
    )


class LastTokenModel:
    """Logits [V] are the row of a table that the last token names."""

    device = CPU

    def __init__(self, probabilities: list[list[float]]) -> None:
        self.table = torch.tensor(probabilities).log()
        self.vocab_size = len(probabilities)

    def new_cache(self, capacity: int) -> TokenCache:
        return TokenCache(capacity)

    def forward(self, tokens: list[int], cache: TokenCache, last_only: bool = False) -> torch.Tensor:
        assert cache.length == 0, "every row is read from its beginning"
        cache.tokens += tokens
        return self.table[tokens]
