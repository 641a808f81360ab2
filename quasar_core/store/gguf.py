"""A GGUF file as a model: unpacked once into a folder of quasar's own, by transformers' reader, and used from there.

The reader dequantizes whatever the file holds (F32, F16, BF16, Q8_0, K-quants), and makes config and tokenizer of what
the file says, chat template included. Weights become float32 or float16 where the file's are, else bfloat16.
"""

import hashlib
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from quasar_core.errors import QuasarError, foreign_errors
from quasar_core.files import is_file, is_folder, opened, read_json_if_there, write_json
from quasar_core.foreign_bars import hidden_bars
from quasar_core.store.folders import home

NOTE = "gguf.json"  # in the unpacked folder: where its weights are from
_MAGIC = b"GGUF"
_MOST_BYTES = 1 << 50
_DTYPES = {"F32": "float32", "F16": "float16"}
_FLOATS = frozenset(("F32", "F16", "BF16"))


def is_gguf(path: Path) -> bool:
    """Whether a file is a GGUF file, by its first bytes."""
    if not is_file(path):
        return False
    with opened(path, _MOST_BYTES) as file:
        return file.read(len(_MAGIC)) == _MAGIC


def unpacked(path: Path) -> Path:
    """The folder with the model of a GGUF file, made where it is not there yet; QuasarError where it cannot be."""
    folder = home() / "gguf" / _key(path) / path.stem
    if not is_folder(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="unpacking-") as beside:
            made = Path(beside) / folder.name
            made.mkdir()
            _unpack(path, made)
            if not is_folder(folder):  # another process may have been first
                made.replace(folder)
    return folder


def describe_gguf(folder: Path) -> str | None:
    """A note of a model that was unpacked: what its text is a text of."""
    note = read_json_if_there(folder / NOTE)
    if note is None:
        return None
    said = f"weights: unpacked from {note['file']} ({', '.join(note['types'])}) to {note['dtype']}"
    if not note["quantized"]:
        return said
    return f"{said}; what is generated is the text of these rounded weights, not of the model they were made from"


def _key(path: Path) -> str:
    """Another one where the file has changed."""
    status = path.stat()
    identity = f"{path}\0{status.st_size}\0{status.st_mtime_ns}"
    return hashlib.sha256(identity.encode("utf-8", "backslashreplace")).hexdigest()[:12]


def _unpack(path: Path, folder: Path) -> None:
    """Config, weights, tokenizer and note, in a folder that is there."""
    types = _stored_types(path)
    matrices = Counter(types)
    usual = max(matrices, key=lambda kind: matrices[kind])
    dtype = _DTYPES.get(usual, "bfloat16")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place: Any = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, "local_files_only": True}
    with hidden_bars(), foreign_errors(f"{path} could not be unpacked"):
        AutoTokenizer.from_pretrained(**place).save_pretrained(folder)
        AutoModelForCausalLM.from_pretrained(**place, dtype=dtype, **_in_full()).save_pretrained(folder)
    quantized = sorted(set(types) - _FLOATS)
    content = {"file": path.name, "types": sorted(set(types)), "dtype": dtype, "quantized": quantized}
    write_json(folder / NOTE, content)


def _in_full() -> dict[str, Any]:
    """What asks transformers for whole weights; versions without packed ones of GGUF give no others."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _stored_types(path: Path) -> list[str]:
    """The type of each matrix, as GGUF names it; vectors are in float32 everywhere."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise QuasarError(f"{path.name} needs the gguf package: pip install 'quasar-cli[gguf]'.") from error
    with foreign_errors(f"{path} is not a readable GGUF file"):
        reader = GGUFReader(str(path))
        parts = reader.fields.get("split.count")
        if parts is not None and int(parts.contents()) > 1:
            raise QuasarError(f"{path.name} is one of several parts: join them first (llama-gguf-split --merge).")
        types = [tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1]
    if not types:
        raise QuasarError(f"{path} holds no weights.")
    return types
