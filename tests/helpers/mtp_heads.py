"""Heads that predict a further token, added to tiny models, and what transformers' own blocks make of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from helpers.multimodal_models import add_tensors
from torch.nn.functional import linear


def attending(model: Any) -> int:
    """A block of the model that a head's is like: the last one with attention."""
    return max(i for i, layer in enumerate(model.model.layers) if hasattr(layer, "self_attn"))


def add_head(folder: Path, model: Any, seed: int = 4) -> dict[str, torch.Tensor]:
    """A head of random weights in a model's folder, under the names that its family has; its tensors by these."""
    draw = torch.Generator().manual_seed(seed)
    size, centred = model.config.hidden_size, model.config.model_type == "qwen3_5_text"
    behind = f"model.layers.{model.config.num_hidden_layers}"
    own = (
        ("mtp.fc", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.norm")
        if centred
        else tuple(f"{behind}.{name}" for name in ("eh_proj", "enorm", "hnorm", "shared_head.norm"))
    )
    block = "mtp.layers.0" if centred else behind
    index = attending(model)
    prefix = f"model.layers.{index}"
    shapes = {
        f"{block}{name.removeprefix(prefix)}": tensor.shape
        for name, tensor in model.state_dict().items()
        if name.startswith(f"{prefix}.")
    }
    shapes |= {f"{own[0]}.weight": torch.Size((size, 2 * size))}
    shapes |= {f"{name}.weight": torch.Size((size,)) for name in own[1:]}
    tensors = {name: 0.15 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        if "norm" in name and not centred:
            tensor += 1
    if not centred:  # as GLM stores them: copies of the model's own
        tensors[f"{behind}.shared_head.head.weight"] = model.get_output_embeddings().weight.detach().clone()
        tensors[f"{behind}.embed_tokens.weight"] = model.get_input_embeddings().weight.detach().clone()
    add_tensors(folder, {name: tensor.contiguous() for name, tensor in tensors.items()})
    return tensors


class TheirHead:
    """A head by its definition: no cache, one text at a time, transformers' own block."""

    def __init__(self, model: Any, tensors: dict[str, torch.Tensor], embedding: torch.Tensor | None = None) -> None:
        self.model, self.tensors = model, tensors
        self.embedding = model.get_input_embeddings().weight if embedding is None else embedding
        index = attending(model)
        like = model.model.layers[index]
        self.block = type(like)(model.config, index).eval()
        start = next(name for name in tensors if ".self_attn." in name).split("self_attn")[0]
        parts = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
        own = self.block.state_dict()
        self.block.load_state_dict({name: parts[name] for name in own})

    def _norm(self, *endings: str) -> torch.Tensor:
        found = next(tensor for name, tensor in self.tensors.items() if name.endswith(endings))
        return found + (self.model.config.model_type == "qwen3_5_text")

    def _normed(self, x: torch.Tensor, *endings: str) -> torch.Tensor:
        eps = self.model.config.rms_norm_eps
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * self._norm(*endings)

    @torch.inference_mode()
    def rows(self, text: Sequence[int]) -> torch.Tensor:
        """What the model's head reads of a text [T, in]."""
        rows: torch.Tensor = self.model.model(input_ids=torch.tensor([list(text)]), use_cache=False)[0][0]
        return rows

    @torch.inference_mode()
    def __call__(self, rows: torch.Tensor, tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The head's own rows, and logits, of rows [T, in] and the token behind each."""
        embedded = self.embedding[list(tokens)]
        both = (
            self._normed(embedded, "pre_fc_norm_embedding.weight", "enorm.weight"),
            self._normed(rows, "pre_fc_norm_hidden.weight", "hnorm.weight"),
        )
        projection = next(
            tensor for name, tensor in self.tensors.items() if name.endswith(("fc.weight", "eh_proj.weight"))
        )
        x = linear(torch.cat(both, -1), projection)[None]
        count = len(tokens)
        places = torch.arange(count)[None]
        mask = torch.full((count, count), -torch.inf).triu(1)[None, None]
        turned = self.model.model.rotary_emb(x, places)
        x = self.block(x, position_embeddings=turned, attention_mask=mask, position_ids=places)
        x = self._normed((x[0] if isinstance(x, tuple) else x)[0], "mtp.norm.weight", "shared_head.norm.weight")
        return x, self.model.get_output_embeddings()(x)

    def guesses(self, rows: torch.Tensor, text: Sequence[int], count: int) -> list[int]:
        """The tokens that the head drafts behind a text of which all but the last have rows: by whole texts."""
        tokens = list(text)
        for _ in range(count):
            own, logits = self(rows, tokens[1:])
            tokens.append(int(logits[-1].argmax()))
            rows = torch.cat((rows, own[-1:]))
        return tokens[len(text) :]
