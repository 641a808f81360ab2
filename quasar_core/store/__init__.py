"""Where things are: model names, the hub, the verifiers' folders, and the pairs that `quantize` recorded.

Knows files and names only; it imports no torch, so that every command may ask it.
"""

from quasar_core.store.fingerprint import fingerprint
from quasar_core.store.folders import home
from quasar_core.store.hub import check_can_push, push_folder
from quasar_core.store.model_config import read_text_headers
from quasar_core.store.names import ModelSource, default_output, full_name, resolve_model
from quasar_core.store.pairs import (
    PairRecord,
    check_registry,
    current_pair,
    find_pair,
    list_pairs,
    pair_named,
    record_pair,
    remove_pair,
    use_pair,
    verifier_folder,
)
from quasar_core.store.safetensors_header import TensorEntry

__all__ = [
    "ModelSource",
    "PairRecord",
    "TensorEntry",
    "check_can_push",
    "check_registry",
    "current_pair",
    "default_output",
    "find_pair",
    "fingerprint",
    "full_name",
    "home",
    "list_pairs",
    "pair_named",
    "push_folder",
    "read_text_headers",
    "record_pair",
    "remove_pair",
    "resolve_model",
    "use_pair",
    "verifier_folder",
]
