"""A verifier whose head knows some tokens only: the frequent ones, and those of the text at hand.

A pass reads the whole head, V·D bytes in 8 bits: a third of what SmolLM2's verifier reads, three quarters of Gemma 3
270M's. Most of these rows are of tokens that a text never has. What the verifier proposes and the target confirms may
go without them: a token that its head does not know costs agreement, and nothing else. For draft models this is
frequency-ranked speculation (FR-Spec: Zhao et al., 2025). Letters: V the vocabulary, D the hidden size, R rows kept.
"""

from copy import copy

import torch

from quasar_core.kernels.cpu.vnni import VnniWeight, picked_rows
from quasar_core.kernels.linear import PackedLinear
from quasar_core.models import loading
from quasar_core.models.base import CausalLM
from quasar_core.models.decoder.layer import FusedLinear, Linear
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.drafting.skipping import bytes_of
from quasar_core.models.verifier.variants import with_head

LEAST_SHARE = 0.15  # of what a pass reads, that must be saved


def why_not_short(verifier: CausalLM, rows: int) -> str | None:
    """Why a verifier's head stays whole, where `rows` of it would be kept; None where it is better short."""
    if not isinstance(verifier, LeanDecoder) or verifier.fast is None:
        return "its passes do not run in C++"
    head = verifier.head
    if not isinstance(head, PackedLinear) or not isinstance(head.prepared, VnniWeight) or head.bias is not None:
        return "it is not of packed codes for the CPU"
    saved = bytes_of(head) * (1 - rows / verifier.vocab_size)
    read = bytes_of(head) + sum(bytes_of(product) for layer in verifier.layers for product in layer.linears)
    if saved < LEAST_SHARE * read:
        return f"it would save {saved / read:.0%} of what a pass reads, and must save {LEAST_SHARE:.0%}"
    return None


def short_headed(verifier: LeanDecoder, tokens: torch.Tensor) -> LeanDecoder:
    """The verifier with a head of these tokens [R], rising, and the C++ pass."""
    return _with_head(verifier, _picked(verifier.head, tokens), tokens.int())


def also_knowing(short: LeanDecoder, verifier: LeanDecoder, tokens: torch.Tensor) -> LeanDecoder:
    """A verifier with a short head, with the head's rows for these tokens [M] behind its own."""
    assert short.head_tokens is not None
    head = FusedLinear((short.head, _picked(verifier.head, tokens)))
    return _with_head(short, head, torch.cat((short.head_tokens, tokens.int())))


def _with_head(verifier: LeanDecoder, head: PackedLinear | FusedLinear, tokens: torch.Tensor) -> LeanDecoder:
    own = with_head(verifier, head, tokens)
    loading.attach(own)
    return own


def _picked(head: Linear, tokens: torch.Tensor) -> PackedLinear:
    """A packed head's rows for these tokens, as a head on the same kernel."""
    assert isinstance(head, PackedLinear)
    own = copy(head)
    own.prepared, own.out_features = picked_rows(head.prepared, tokens.long()), len(tokens)
    return own
