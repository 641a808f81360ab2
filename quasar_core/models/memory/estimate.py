"""Estimate how much memory a pair takes on a device, before it is loaded: the formula of docs/cuda.md.

    target + verifier + workspace + tokens × bytes per token

Letters: T tokens of a pass, H hidden size, I inner size of the MLP, V vocabulary, D head size.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.errors import QuasarError
from quasar_core.models.config.decoder import DecoderConfig
from quasar_core.models.decoder.linear import (
    Product,
    all_block_products,
    beside_shapes,
    block_products,
    head_product,
    inputs_product,
    recurrent_shapes,
)
from quasar_core.models.recurrent.states import REACH
from quasar_core.models.weights.lean_weights import tied_as_stored, why_folder_not_lean
from quasar_core.models.weights.verifier_head import is_rounded, rounded_bytes
from quasar_core.store.model_config import read_text_config, read_text_headers

PROMPT_CHUNK = 2048  # tokens of a prompt's pass on a GPU
LONGEST_PASS = 40  # tokens of the longest recorded pass: a confirm of the longest window takes 33
LONGEST_SWEEP = 320  # of a pass over weights that come block by block: such windows have up to 256
ANCHORS = 5  # states of a layer that a cache keeps: of the prompt's end, of a window's and a pass's ends, a new one
SMALLEST_CONTEXT = 1024  # tokens: what a cache is made for at least
LEAST_SLACK, SLACK_SHARE = 700_000_000, 0.03  # bytes that must stay free, and their share of what is held
STEP = 256  # tokens: contexts that are advised are a multiple of it


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of a pair; `per_token` of keys and values and rotary tables."""

    target: int
    verifier: int
    workspace: int
    per_token: int

    @property
    def slack(self) -> int:
        """What is in no formula: cuBLAS' workspaces, compiled kernels, graphs, and what measuring kernels takes."""
        held = self.target + self.verifier + self.workspace
        return max(LEAST_SLACK, int(SLACK_SHARE * held))

    def total(self, tokens: int) -> int:
        """Bytes with a cache for so many tokens."""
        return self.target + self.verifier + self.workspace + tokens * self.per_token

    def tokens_in(self, available: int) -> int:
        """The longest cache, a multiple of 256, that fits beside the rest; 0 where nothing fits."""
        return max((available - self.slack - self.total(0)) // self.per_token // STEP * STEP, 0)


def pair_need(
    folder: Path,
    checkpoint: VerifierCheckpoint | None,
    dtype: torch.dtype,
    use_target: bool = True,
    rounds_head: bool = False,
) -> MemoryNeed | None:
    """What the models of these folders take; None where our own decoder does not run them.

    `rounds_head` counts a verifier's head in 8 bits, which loading makes of one that is stored in more.
    """
    if why_folder_not_lean(folder):
        return None
    config = tied_as_stored(DecoderConfig.parse(read_text_config(folder)), TensorFiles(folder))
    plain = sum(tensor_elements(config).values()) * dtype.itemsize + rule_bytes(config)
    target = plain if use_target else 0
    verifier = 0
    if checkpoint is not None:
        verifier = stored_bytes(checkpoint)
        if not use_target:
            verifier += plain - replaced_elements(config, checkpoint.layer_names) * dtype.itemsize
        if rounds_head and (use_target or config.tied):  # alone, it takes no more than the one that it replaces
            verifier += rounded_head_bytes(config, checkpoint)
    models = int(use_target) + int(checkpoint is not None)
    return MemoryNeed(target, verifier, workspace_bytes(config, dtype, models), token_bytes(config, dtype))


def tensor_elements(config: DecoderConfig) -> dict[str, int]:
    """Elements of everything that a decoder in 16 or 32 bits holds; a tied head is the embedding."""
    products = all_block_products(config)
    norms = config.hidden_size * (len(config.norms.names) * config.num_layers + 1)
    if config.head_norms:
        norms += sum(
            (config.num_heads + block.kv_heads * (block.states_of == index)) * block.head_size
            for index, block in enumerate(config.blocks)
            if block.recurrence is None
        )
    return {
        "embedding": config.vocab_size * config.hidden_size,
        "blocks": sum(map(elements, products)),
        "norms": norms + (4 * config.num_layers if config.activation == "xielu" else 0) + mixture_elements(config),
        "inputs": input_elements(config),
        "head": 0 if config.tied else elements(head_product(config)),
    }


def mixture_elements(config: DecoderConfig) -> int:
    """Elements of what mixtures have beside products: corrections of routers' scores, norms, factors."""
    if config.mixture is None:
        return 0
    sparse = sum(block.sparse for block in config.blocks)
    corrections = config.mixture.count * sparse if config.mixture.correction else 0
    beside = (sum(map(math.prod, beside_shapes(config, index).values())) for index in range(config.num_layers))
    return corrections + sum(beside)


def input_elements(config: DecoderConfig) -> int:
    """Elements of the inputs that each block has of its own, and of the numbers that multiply what blocks give."""
    scalars = config.num_layers if config.blocks_are_scaled else 0
    if not config.inputs_size:
        return scalars
    embedding = config.inputs_vocab * config.num_layers * config.inputs_size
    norms = config.inputs_size + config.num_layers * config.hidden_size
    return scalars + embedding + norms + elements(inputs_product(config))


def elements(product: Product) -> int:
    """Weights and biases of a product."""
    rows = sum(product.rows)
    return rows * product.columns + (rows if product.bias else 0)


def replaced_elements(config: DecoderConfig, packed: list[str]) -> int:
    """Weights that a verifier without its target holds in codes only; a tied head's are the embedding's, and stay."""
    products = all_block_products(config)
    if not config.tied:
        products.append(head_product(config))
    parts = {name: rows * p.columns for p in products for name, rows in zip(p.names, p.rows, strict=True)}
    return sum(parts.get(name, 0) for name in packed)


def rounded_head_bytes(config: DecoderConfig, checkpoint: VerifierCheckpoint) -> int:
    """Bytes of the head in 8 bits that loading makes of a checkpoint's in more; 0 where it leaves the head as it is."""
    head = head_product(config)
    if head.names[0] in checkpoint.layer_names or not is_rounded(head.rows[0], head.columns, bias=head.bias):
        return 0
    return rounded_bytes(head.rows[0], head.columns)


def stored_bytes(checkpoint: VerifierCheckpoint) -> int:
    """Codes, scales and zeros as they are stored; kernels bring them into another order, of about the same size."""
    packed = set(checkpoint.packed_names)
    return sum(entry.size for entry in read_text_headers(checkpoint.folder) if entry.name in packed)


def token_bytes(config: DecoderConfig, dtype: torch.dtype) -> int:
    """Keys and values of one position in all layers, a cosine and a sine for each channel."""
    own = (block for index, block in enumerate(config.blocks) if block.states_of == index)
    states = sum(2 * block.kv_heads * block.head_size for block in own)
    return (states + sum(2 * rope.head_size for rope in config.ropes)) * dtype.itemsize


def workspace_bytes(config: DecoderConfig, dtype: torch.dtype, models: int) -> int:
    """What passes hold at once: a prompt's chunk in the MLP or in attention, and logits of the longest short pass.

    A chunk holds, per token, its hidden state, the norm of it and the block's output (3·H), gate, up and two products
    of them (4·I); or queries, keys and values before and after their rotation, and the mixed values. Logits stand in
    the graph, in their place, and in float32.
    """
    products = [block_products(config, index) for index in range(config.num_layers)]
    wide = max(sum(sum(some[name].rows) for name in ("qkv", "mix_gate") if name in some) for some in products)
    inner = max(block.inner for block in config.blocks)
    chunk = PROMPT_CHUNK * (3 * config.hidden_size + max(4 * inner, 3 * wide)) * dtype.itemsize
    return chunk + models * logits_bytes(config, dtype, LONGEST_PASS) + state_bytes(config, dtype)


def logits_bytes(config: DecoderConfig, dtype: torch.dtype, tokens: int) -> int:
    """Bytes of the logits of a pass over so many tokens, in the three places that `workspace_bytes` names."""
    return tokens * config.vocab_size * (2 * dtype.itemsize + torch.float32.itemsize)


def sweep_bytes(config: DecoderConfig, dtype: torch.dtype) -> int:
    """What logits take more where the target's passes are as long as they are over streamed weights."""
    return logits_bytes(config, dtype, LONGEST_SWEEP) - logits_bytes(config, dtype, LONGEST_PASS)


def rule_bytes(config: DecoderConfig) -> int:
    """What recurrent layers hold beside their products, in float32."""
    shapes = (shape for index in range(config.num_layers) for shape in recurrent_shapes(config, index).values())
    return sum(4 * math.prod(shape) for shape in shapes)


def state_bytes(config: DecoderConfig, dtype: torch.dtype) -> int:
    """States of recurrent layers that a cache keeps: anchors, and the inputs of the tokens behind them."""
    total = 0
    for block in config.blocks:
        if block.recurrence is not None:
            window, matrices = block.recurrence.state_elements
            channels, rates = block.recurrence.journal_elements
            total += ANCHORS * (window * dtype.itemsize + 4 * matrices)
            total += 2 * REACH * (channels * dtype.itemsize + 4 * rates)
    return total


def require_room(need: MemoryNeed, alone: MemoryNeed | None, device: torch.device, tokens: int) -> str:
    """A note of what the pair takes; QuasarError that says what would fit where the GPU has less memory free.

    `alone` is the need of the verifier without its target; `tokens` the longest context asked for.
    """
    free, _ = torch.cuda.mem_get_info(device)
    if need.total(min(tokens, SMALLEST_CONTEXT)) + need.slack > free:
        raise QuasarError(advice(need, alone, free, min(tokens, SMALLEST_CONTEXT)))
    return f"memory: {describe(need, free, tokens)}"


def describe(need: MemoryNeed, free: int, tokens: int) -> str:
    """The formula with its numbers, and how long a context fits."""
    fits = min(need.tokens_in(free), tokens)
    return (
        f"{_gigabytes(need.total(0))} GB (target {_gigabytes(need.target)}, verifier {_gigabytes(need.verifier)}, "
        f"workspace {_gigabytes(need.workspace)}) and {need.per_token / 1000:.0f} KB per token; "
        f"{_gigabytes(free)} GB are free, enough for {fits} of {tokens} tokens"
    )


def advice(need: MemoryNeed, alone: MemoryNeed | None, free: int, tokens: int) -> str:
    """Why a pair does not fit, and what would."""
    sentence = (
        f"The GPU has {_gigabytes(free)} GB free, and the pair needs {_gigabytes(need.total(tokens))} GB "
        f"and {_gigabytes(need.slack)} GB to spare"
    )
    if need.tokens_in(free) >= STEP:
        return f"{sentence}: --max-context {need.tokens_in(free)} would fit."
    if alone is not None and need.target and alone.total(tokens) + alone.slack <= free:
        return f"{sentence}: --verify quantized --no-target would fit ({_gigabytes(alone.total(tokens))} GB)."
    return (
        f"{sentence}: a verifier made with --lm-head-bits 4 takes the least when it runs alone "
        "(--verify quantized --no-target); or try a smaller model."
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f}"
