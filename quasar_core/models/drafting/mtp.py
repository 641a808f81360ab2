"""A checkpoint's own head that predicts a further token (multi-token prediction), as a decoder of one block.

Such a head is one more block behind a joint: of the last row of the model at position i and the embedding of the token
at i + 1 it makes a row that the model's own head reads as the token at i + 2 (DeepSeek-V3, 2024, §2.2; Qwen3-Next and
Qwen3.5 store theirs under `mtp.`, GLM-4.5 as a block behind the last). The row is read behind the model's last norm, as
transformers and vLLM do and as acceptance of Qwen3.5 is best; the head's own row, behind its own last norm, stands in
its place for the token after. Embedding and head are the model's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.errors import QuasarError
from quasar_core.models.config.decoder import DecoderConfig
from quasar_core.models.cpu.compressed_weights import compress, saved_bytes
from quasar_core.models.decoder.layer import Joint
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.decoder.linear import Product, dense_only
from quasar_core.models.drafting.skipping import bytes_of, bytes_read
from quasar_core.models.loading import attach
from quasar_core.models.pair import Pair
from quasar_core.models.weights.filling import Filling
from quasar_core.models.weights.lean_weights import build_layer, why_folder_not_lean
from quasar_core.store.model_config import read_text_config


@dataclass(frozen=True)
class HeadNames:
    """What a head's tensors are called in the files: its own ones, and those of its block by their beginning."""

    projection: str
    embedding_norm: str
    rows_norm: str
    norm: str
    block: str
    embedding: str = ""  # of its own, where there is one
    shared: tuple[str, ...] = ()  # copies of the model's own tensors


def find_head(config: DecoderConfig, files: TensorFiles) -> HeadNames | None:
    """The names of a folder's head, the first where there are several; None where there is none."""
    behind = f"model.layers.{config.num_layers}."
    styles = (
        HeadNames(
            "mtp.fc",
            "mtp.pre_fc_norm_embedding",
            "mtp.pre_fc_norm_hidden",
            "mtp.norm",
            "mtp.layers.0.",
            "mtp.embed_tokens.weight",
        ),
        HeadNames(
            f"{behind}eh_proj",
            f"{behind}enorm",
            f"{behind}hnorm",
            f"{behind}shared_head.norm",
            behind,
            shared=(f"{behind}embed_tokens.weight", f"{behind}shared_head.head.weight"),
        ),
    )
    return next((names for names in styles if f"{names.projection}.weight" in files), None)


def require_head(folder: Path) -> HeadNames:
    """The names of a folder's head; QuasarError where there is none, or where transformers runs the model."""
    if reason := why_folder_not_lean(folder):
        raise QuasarError(f"--draft mtp needs our own decoder, and this model runs through transformers: {reason}.")
    names = find_head(DecoderConfig.parse(read_text_config(folder)), TensorFiles(folder))
    if names is None:
        raise QuasarError(
            f"--draft mtp needs a head that predicts further tokens, and {folder} has none: no tensors mtp.*, and no "
            "block behind the last one."
        )
    return names


def head_bytes(folder: Path, dtype: torch.dtype) -> int:
    """What a folder's head takes in memory."""
    files = TensorFiles(folder)
    return dtype.itemsize * sum(math.prod(files.shape(name)) for name in _own_tensors(require_head(folder), files))


def head_of(pair: Pair) -> LeanDecoder:
    """The head in the files of a pair's target, read once; from then on the caches of the pair keep rows."""
    model = pair.primary
    if pair.target_folder is None or not isinstance(model, LeanDecoder):
        raise QuasarError("--draft mtp needs our own decoder, and this model runs through transformers.")
    pair.head = pair.head or load_head(pair.target_folder, model)
    model.keeps_rows = True
    head: LeanDecoder = pair.head
    return head


def load_head(folder: Path, model: LeanDecoder) -> LeanDecoder:
    """The head in a model's files over the model's own embedding and head, without a fast pass.

    QuasarError where the files have none, or one of another make.
    """
    config, files, names = model.config, TensorFiles(folder), require_head(folder)
    block = next(block for block in reversed(config.blocks) if block.recurrence is None)
    place = config.num_layers
    extended = replace(config, num_layers=place + 1, blocks=(*config.blocks, replace(block, states_of=place)))
    renamed = ((f"model.layers.{place}.", names.block),)
    filling = Filling(files, model.device, model.dtype, extended, renamed=renamed)
    layer = build_layer(extended, place, filling, dense_only)
    size = config.hidden_size
    joint = Joint(
        filling.norm(f"{names.embedding_norm}.weight", size),
        filling.norm(f"{names.rows_norm}.weight", size),
        filling.linear(Product((names.projection,), (size,), 2 * size, bias=False)),
    )
    norm, embedding = filling.norm(f"{names.norm}.weight", size), model.embedding
    if names.embedding in files:
        embedding = filling.tensor([names.embedding], [config.vocab_size], size)
    filling.refuse_left_over(_own_tensors(names, files))
    filling.fill()
    alone = replace(block, states_of=0)
    own = replace(config, num_layers=1, blocks=(alone,))
    return LeanDecoder(own, embedding, [replace(layer, shape=alone)], norm, model.head, model.ropes, joint=joint)


def _own_tensors(names: HeadNames, files: TensorFiles) -> Sequence[str]:
    """The tensors of the head that drafts, without copies of the model's; of further heads there are other blocks."""
    beginning = "mtp." if names.block.startswith("mtp.") else names.block
    found = (name for name in files.names() if name.startswith(beginning) and name not in names.shared)
    return [name for name in found if name.startswith(names.block) or not name.startswith("mtp.layers.")]


def over(head: LeanDecoder, model: LeanDecoder) -> LeanDecoder:
    """The head over another model: with that one's last product and its passes."""
    own = LeanDecoder(head.config, head.embedding, head.layers, head.norm, model.head, head.ropes, joint=head.joint)
    if saved_bytes(model):
        compress([own], True)
    attach(own)
    return own


def share_of_pass(head: LeanDecoder, model: LeanDecoder) -> float:
    """The bytes that a pass of the head reads ÷ those that a pass of the model reads."""
    assert head.joint is not None
    last = bytes_of(model.head)
    own = sum(map(bytes_read, head.layers)) + bytes_of(head.joint.projection)
    return (own + last) / (sum(map(bytes_read, model.layers)) + last)
