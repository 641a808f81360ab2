"""Hold the rotary embeddings of a transformers model to the frequencies of one text length during a pass.

transformers takes them from the last position of each pass, and dynamic NTK from the longest text since the model was
loaded. See `models/rope.py`.
"""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from quasar_core.errors import QuasarError
from quasar_core.models.rope import spans

KINDS = ("dynamic", "longrope")


@dataclass(frozen=True)
class Rotation:
    """One kind of layers' rotary embedding: a module, and a layer type where the module serves several."""

    module: Any
    layer_type: str | None
    kind: str
    limit: int  # the longest text that has the frequencies of training
    config: Any

    @classmethod
    def of(cls, module: Any, layer_type: str | None, kind: str) -> "Rotation":
        """The rotation as the module's config has it."""
        config = module.config
        parameters = config.rope_parameters[layer_type] if layer_type else config.rope_parameters
        longest = module.original_max_seq_len if kind == "dynamic" else parameters["original_max_position_embeddings"]
        return cls(module, layer_type, kind, int(longest), config)

    def frequencies(self, length: int) -> torch.Tensor:
        """The frequencies of a text of `length` tokens, in radians per position."""
        if length <= self.limit:
            trained: torch.Tensor = getattr(self.module, self._named("original_inv_freq"))
            return trained.to(self._buffer.device)
        options = {"layer_type": self.layer_type} if self.layer_type else {}
        compute = ROPE_INIT_FUNCTIONS[self.kind]
        frequencies: torch.Tensor = compute(self.config, self._buffer.device, seq_len=length, **options)[0]
        return frequencies

    @contextmanager
    def held(self, length: int) -> Iterator[None]:
        """Rotate as a text of `length` tokens does; transformers' own updates are left out meanwhile."""
        module, name = self.module, self._named("inv_freq")
        before = {key: getattr(module, key) for key in ("rope_type", "config", name)}
        setattr(module, name, self.frequencies(length))
        module.rope_type = {**before["rope_type"], self.layer_type: "default"} if self.layer_type else "default"
        if self.layer_type is None and self.kind == "longrope":
            module.config = self._config_that_is(length > self.limit)
        try:
            yield
        finally:
            for key, value in before.items():
                setattr(module, key, value)

    def _config_that_is(self, beyond: bool) -> Any:
        """A config by which every text is beyond the limit or none: Phi-3.5-MoE reads it in each pass."""
        config = copy.copy(self.config)
        limit = 0 if beyond else sys.maxsize
        given = {"factor": 1.0, "attention_factor": 1.0}  # which would be computed of the limit
        config.rope_parameters = {**config.rope_parameters, "original_max_position_embeddings": limit, **given}
        config.original_max_position_embeddings = limit  # which goes before the other, where there is one
        return config

    @property
    def _buffer(self) -> torch.Tensor:
        buffer: torch.Tensor = getattr(self.module, self._named("inv_freq"))
        return buffer

    def _named(self, name: str) -> str:
        return f"{self.layer_type}_{name}" if self.layer_type else name


class TextRope:
    """The rotary embeddings of a model that depend on the text's length."""

    def __init__(self, rotations: list[Rotation], recomputes: bool) -> None:
        self.rotations, self.recomputes = rotations, recomputes
        self.limit = rotations[0].limit
        # Beyond the limit, whether each length has frequencies of its own.
        self.grows = rotations[0].kind == "dynamic"

    @classmethod
    def of(cls, model: PreTrainedModel) -> "TextRope | None":
        """None where no rotary embedding depends on it; QuasarError where several do so in different ways."""
        rotations = list(_rotations(model))
        if not rotations:
            return None
        if len({(rotation.kind, rotation.limit) for rotation in rotations}) > 1:
            raise QuasarError("This model's rotary embeddings change at several lengths of text: quasar knows one.")
        # Phi-3 and its kin compute all keys anew where a text grows beyond the limit.
        kind: Any = type(model)
        own = kind.prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation
        return cls(rotations, own and rotations[0].kind == "longrope")

    def runs(self, start: int, end: int, prompt_length: int) -> Iterator[tuple[int, int, int]]:
        """The positions of a pass in runs that are rotated alike, each with a text length that stands for it."""
        if self.grows or end <= self.limit:
            yield from spans(start, end, prompt_length, self.limit)
            return
        middle = start if prompt_length > self.limit else max(start, self.limit)
        if start < middle:
            yield start, middle, self.limit
        yield middle, end, self.limit + 1

    @contextmanager
    def held(self, length: int) -> Iterator[None]:
        """Rotate as a text of `length` tokens does."""
        with _all_held(self.rotations, length):
            yield


@contextmanager
def _all_held(rotations: list[Rotation], length: int) -> Iterator[None]:
    if not rotations:
        yield
        return
    with rotations[0].held(length), _all_held(rotations[1:], length):
        yield


def _rotations(model: PreTrainedModel) -> Iterator[Rotation]:
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, str) and kind in KINDS:
            yield Rotation.of(module, None, kind)
        if isinstance(kind, dict):
            yield from (Rotation.of(module, name, one) for name, one in kind.items() if one in KINDS)
