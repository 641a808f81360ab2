"""The composition root: what the command line calls, and what a program that imports quasar calls."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from quasar_core.bench.run import run_bench
from quasar_core.checkpoint.reader import VerifierCheckpoint, read_json
from quasar_core.checkpoint.writer import refuse_existing
from quasar_core.config import QuantizeConfig, VerifyMode
from quasar_core.decode.generator import Generator
from quasar_core.errors import QuasarError, UsageError
from quasar_core.models.device import choose_device, choose_dtype
from quasar_core.models.load import load_models
from quasar_core.models.pair import Pair, context_limit, end_of_text_ids, load_tokenizer
from quasar_core.models.transformers_lm import load_target
from quasar_core.quantize.run import Job, quantize_checkpoint
from quasar_core.records import Progress, QuantizeReport, no_progress
from quasar_core.store import (
    ModelSource,
    current_pair,
    default_output,
    fingerprint,
    list_pairs,
    record_pair,
    resolve_model,
)
from quasar_core.store.safetensors_header import weight_files

__all__ = ["Generator", "load_pair", "quantize", "run_bench"]


def quantize(
    model: str,
    config: QuantizeConfig,
    *,
    output: Path | None = None,
    force: bool = False,
    resume: bool = True,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> QuantizeReport:
    """Write the verifier of `model` and make the pair current.

    Raises UsageError where the output exists without `force`, QuasarError where the model cannot be read or held.
    """
    source = resolve_model(model)
    destination = (output or default_output(source, config)).expanduser().resolve()
    refuse_existing(destination, force)
    place = choose_device(device)
    _refuse_quantized(source)
    dtype, _ = _choose_dtype(source.folder, "auto", place)
    progress("loading the target", 0, 1)
    target = load_target(source.folder, place, dtype, trust_remote_code)
    progress("loading the target", 1, 1)
    tokenizer = load_tokenizer(source.folder)
    job = Job(source.label, source.folder, fingerprint(source.folder), destination, config)
    report = quantize_checkpoint(job, target, tokenizer, resume, progress)
    record_pair(source.name, destination)
    return report


def _refuse_quantized(source: ModelSource) -> None:
    if "quantization_config" in read_json(source.folder / "config.json"):
        raise UsageError(f"{source.label} is quantized already; name the model that it was made from.")


def load_pair(
    model: str | None = None,
    verifier: str | None = None,
    *,
    verify: VerifyMode = "exact",
    use_target: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    kernel: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> Pair:
    """Load target and verifier over one cache; what the mode does not need is left out.

    Without `model` it is the current pair. Raises UsageError where there is none, or no verifier, and QuasarError for
    a verifier that was made from another target.
    """
    if not use_target and verify != "quantized":
        raise UsageError(f"--no-target goes with --verify quantized; --verify {verify} needs the target.")
    source, checkpoint = _find_pair(model, verifier, needs_verifier=verify != "full")
    place = choose_device(device)
    precision, reason = _choose_dtype(source.folder, dtype, place)
    models = load_models(
        source.folder,
        checkpoint,
        place,
        precision,
        kernel=kernel,
        use_target=use_target,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    tokenizer = load_tokenizer(source.folder)
    return Pair(
        tokenizer=tokenizer,
        target=models.target,
        verifier=models.verifier,
        target_name=source.label,
        verifier_name=checkpoint.folder.name if checkpoint else None,
        max_context=context_limit(source.folder),
        eos_ids=end_of_text_ids(source.folder, tokenizer),
        device=place,
        dtype=precision,
        fidelity=checkpoint.fidelity if checkpoint else None,
        notes=[
            f"dtype: {str(precision).removeprefix('torch.')}, {reason}",
            f"device: {_describe_device(place)}",
            *models.notes,
        ],
    )


def _find_pair(
    model: str | None, verifier: str | None, needs_verifier: bool
) -> tuple[ModelSource, VerifierCheckpoint | None]:
    """The target's folder and its verifier's checkpoint, checked to belong together."""
    if model is None:
        current = current_pair()
        if current is None:
            raise UsageError("No pair is current: make one with `quasar quantize MODEL`, or name one with --model.")
        model, verifier = current.target, verifier or current.verifier
    source = resolve_model(model)
    if not needs_verifier:
        return source, None
    folder = Path(verifier).expanduser() if verifier else _known_verifier(source)
    if folder is None:
        raise UsageError(
            f"{source.label} has no verifier yet: make one with `quasar quantize {model}`, or pass --verify full."
        )
    checkpoint = VerifierCheckpoint(folder)
    made_from = checkpoint.target_fingerprint
    if made_from is not None and made_from != fingerprint(source.folder):
        raise QuasarError(f"The verifier {folder} was not made from {source.label}: their fingerprints differ.")
    return source, checkpoint


def _known_verifier(source: ModelSource) -> Path | None:
    """The verifier last recorded for the target, else the one where `quantize` puts it by default."""
    recorded: Sequence[Any] = [pair for pair in list_pairs() if pair.target == source.name]
    places = [Path(pair.verifier) for pair in reversed(recorded)] + [default_output(source, QuantizeConfig())]
    return next((place for place in places if place.is_dir()), None)


def _choose_dtype(folder: Path, requested: str, device: torch.device) -> tuple[torch.dtype, str]:
    config = read_json(folder / "config.json")
    text_config = config.get("text_config", {})
    stored = config.get("dtype") or config.get("torch_dtype") or text_config.get("dtype")
    weight_bytes = sum(path.stat().st_size for path in weight_files(folder))
    return choose_dtype(requested, stored, weight_bytes, device)


def _describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu, {torch.get_num_threads()} threads"
