"""Map stored tensors to the parameters of a transformers model: files may have names of their own.

transformers renames while it loads: it adds or takes away the base model's prefix (`model.`), and for some
architectures it has patterns, such as those of a vision tower. The same is done here, by its own patterns.
"""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from quasar_core.checkpoint.compressed_tensors import CompressedTensorsFormat
from quasar_core.checkpoint.formats import PACKED_SUFFIXES
from quasar_core.errors import QuasarError
from quasar_core.models.hf.experts import module_name

# What the files of a quantized layer hold in place of, or beside, its `weight`.
_PARTS = frozenset((*PACKED_SUFFIXES, *CompressedTensorsFormat.suffixes))


class StoredNames:
    """The names in the files by the model's own, and the other way round; layers and the parts of packed ones too."""

    def __init__(self, model: PreTrainedModel, stored: Iterable[str], where: str) -> None:
        self._own = _Renaming(model)
        self._stored: dict[str, str] = {}
        self.unknown: list[str] = []  # stored, and not of the model
        for name in stored:
            own = self._own(_as_weight(name))
            if own is None:
                self.unknown.append(name)
                continue
            known = self._stored.setdefault(own, _as_weight(name))
            if known != _as_weight(name):
                raise QuasarError(f"{where} holds {own} twice: as {known} and as {name}.")

    def stored(self, name: str) -> str:
        """The name in the files of a parameter, a layer, or a part of a packed layer; its own where there is none."""
        if name in self._stored:
            return self._stored[name]
        layer, _, part = name.rpartition(".")
        for of_layer, ending in ((f"{name}.weight", ""), (f"{layer}.weight", f".{part}")):
            if of_layer in self._stored:
                return self._stored[of_layer].removesuffix(".weight") + ending
        return name

    def of_layer(self, stored: str) -> str:
        """The model's name of a stored layer; the stored one where the model has no such layer."""
        return (self._own(f"{stored}.weight") or stored).removesuffix(".weight")


class _Renaming:
    """From a stored name to the model's, as transformers does it; None where the model has no such tensor."""

    def __init__(self, model: PreTrainedModel) -> None:
        tensors = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        self._names: dict[str, Any] = {name: tensor for found in tensors for name, tensor in found}
        self._prefix = model.base_model_prefix
        self._patterns = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]

    def __call__(self, stored: str) -> str | None:
        for name in (stored, module_name(stored)):
            for patterns in (self._patterns, []):
                renamed, _ = rename_source_key(name, patterns, [], self._prefix, self._names)
                if renamed in self._names:
                    return renamed
        return None


def _as_weight(name: str) -> str:
    """The name of a packed layer's weight for a part of it; any other name as it is."""
    layer, _, part = name.rpartition(".")
    return f"{layer}.weight" if part in _PARTS else name
