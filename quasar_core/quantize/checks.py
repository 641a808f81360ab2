"""Checks before any work: weights that are no numbers, tokenizers of another model, calibration text."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.config import QuantizeConfig
from quasar_core.errors import QuasarError, reason
from quasar_core.models.hf.skeleton import Weights, emptied
from quasar_core.quantize.blocks.activations import capture_first_inputs, run_block
from quasar_core.quantize.blocks.streaming import StreamedModel
from quasar_core.quantize.calibration import HUB_TEXTS, Calibration, read_documents
from quasar_core.records import Progress, no_progress
from quasar_core.store.safetensors_header import read_headers

FLOATS = ("F64", "F32", "F16", "BF16")


def check_dtypes(folder: Path, model: StreamedModel) -> None:
    """Refuse a model whose matrices are stored in anything but floating point of 16 bits and more: headers suffice.

    8-bit blocks with scales are read as bfloat16.
    """
    wanted = {model.weights.stored(name) for name, _ in model.skeleton.named_parameters()}
    for entry in read_headers(folder):
        read_as_float = entry.dtype in FLOATS or model.weights.files.dequantizes(entry.name)
        if entry.name in wanted and not read_as_float:
            raise QuasarError(
                f"The tensor {entry.name} in {entry.file} is stored as {entry.dtype}: a target has weights of 16 or "
                "32 bits, so name the model that this one was made from."
            )


def check_names(model: StreamedModel) -> None:
    """Refuse a model whose files do not hold its tensors one by one: a verifier is written under their names."""
    if model.whole_because is None:
        return
    empty = emptied(model.skeleton)
    files = model.weights.files
    missing = Weights(empty, files).missing(empty)
    if missing:
        raise QuasarError(f"{files.folder} holds no tensor {missing[0]} of its own, so its verifier cannot be written.")


@torch.inference_mode()
def check_blocks(model: StreamedModel) -> None:
    """Run a few tokens through the first block on its own; QuasarError where the architecture does not allow it."""
    tokens = torch.zeros(2, 4, dtype=torch.long)
    states = capture_first_inputs(model.ends(torch.device("cpu")), tokens, model.device)
    try:
        run_block(model.block(0), states.first_row())
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        name = type(model.skeleton).__name__
        raise QuasarError(f"The blocks of {name} do not run one by one ({reason(error)}).") from error


def check_finite(files: TensorFiles, progress: Progress = no_progress) -> None:
    """Read every weight once; QuasarError that names the first tensor that holds a value that is not finite."""
    names = files.names()
    for done, (name, tensor) in enumerate(files.load_many(names)):
        progress("checking weights", done, len(names))
        if tensor.is_floating_point() and tensor.numel():
            comparable = tensor.to(torch.bfloat16) if tensor.itemsize == 1 else tensor  # 8-bit floats have no order
            low, high = torch.aminmax(comparable)
            if not bool(torch.isfinite(low)) or not bool(torch.isfinite(high)):
                raise QuasarError(f"The tensor {name} in {files.folder} holds values that are not finite (NaN or inf).")
    progress("checking weights", len(names), len(names))


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """QuasarError where the tokenizer's own tokens do not fit the model's embedding; added ones may never be used."""
    if tokenizer.vocab_size > vocabulary:
        raise QuasarError(
            f"The tokenizer has {tokenizer.vocab_size:,} tokens and the model's embedding {vocabulary:,}: "
            "they do not belong together."
        )


def check_calibration_file(config: QuantizeConfig) -> None:
    """UsageError for a calibration file that is not there or does not begin as one; hub texts are fetched later."""
    if config.calibration not in ("self", *HUB_TEXTS):
        next(read_documents(config.calibration), None)


def check_calibration(calibration: Calibration, vocabulary: int, reads_text: bool = True) -> None:
    """QuasarError for a text without rows, and for tokens that the model does not have."""
    texts = [calibration.samples] if reads_text else []
    for rows in (*texts, calibration.held_out, calibration.greedy):
        if not rows.numel():
            raise QuasarError(f"The calibration text {calibration.name} has no tokens.")
        highest = int(rows.max())
        if highest >= vocabulary:
            raise QuasarError(
                f"The calibration text {calibration.name} has the token {highest}, and the model's embedding "
                f"{vocabulary:,} rows: tokenizer and model do not belong together."
            )
