"""The groups in which several commands take their options: which pair to load, and how to generate."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from quasar_cli.idle_options import note_idle_options
from quasar_cli.options import (
    Adapter,
    Assistant,
    CheckDigest,
    Compress,
    Device,
    Draft,
    DraftFrom,
    DraftMemory,
    Fast,
    Fidelity,
    Kernel,
    MaxContext,
    MaxDeviceMemory,
    MaxMemory,
    MaxNewTokens,
    MinP,
    Model,
    NgramMax,
    NgramMin,
    NumDraftTokens,
    OffloadOption,
    Precision,
    Processors,
    RepetitionPenalty,
    Seed,
    SeenByVerifier,
    Stop,
    Temperature,
    Threads,
    TopK,
    TopP,
    Trees,
    TrustRemoteCode,
    UseTarget,
    Verifier,
    Verify,
    Window,
    parse_auto,
    parse_size,
)
from quasar_core.config import DraftKind, GenerationConfig, LoadOptions, SamplingConfig, VerifyMode
from quasar_core.errors import UsageError


@dataclass(frozen=True)
class ModelOptions:
    """Which pair to load, and where."""

    model: Model = None
    adapter: Adapter = None
    verifier: Verifier = None
    assistant: Assistant = None
    use_target: UseTarget = True
    device: Device = "auto"
    dtype: Precision = "auto"
    kernel: Kernel = "auto"
    fast: Fast = False
    compress: Compress = None
    max_context: MaxContext = None
    trust_remote_code: TrustRemoteCode = False
    check_digest: CheckDigest = False
    offload: OffloadOption = "auto"
    max_memory: MaxMemory = None
    max_device_memory: MaxDeviceMemory = None
    threads: Threads = "auto"

    def to_load(self, verify: VerifyMode, draft: DraftKind = "none") -> LoadOptions:
        """What is to be loaded for a mode."""
        apart = ("threads", "adapter", "max_memory", "max_device_memory")
        chosen = {name: value for name, value in vars(self).items() if name not in apart}
        chosen["model"] = with_adapter(self.model, self.adapter)
        chosen["max_memory"] = parse_size("--max-memory", self.max_memory)
        chosen["max_device_memory"] = parse_size("--max-device-memory", self.max_device_memory)
        return LoadOptions(**chosen, verify=verify, draft=draft)


def with_adapter(model: str | None, adapter: Path | None) -> str | None:
    """The model's name, or the folder into which an adapter was merged with it."""
    if adapter is None:
        return model
    if model is None:
        raise UsageError("--adapter needs --model MODEL, the model that it was trained on.")
    from quasar_cli import console
    from quasar_core.api import decoding

    with console.progress_bar() as progress:
        return decoding.merge_adapter(model, adapter, progress)


@dataclass(frozen=True)
class DecodeOptions:
    """How to generate: the options that make a GenerationConfig."""

    max_new_tokens: MaxNewTokens = 256
    stop: Stop = None
    verify: Verify = "exact"
    fidelity: Fidelity = 0.999
    draft: Draft = "auto"
    draft_from: DraftFrom = None
    draft_memory: DraftMemory = False
    num_draft_tokens: NumDraftTokens = "auto"
    trees: Trees = True
    verifier_attention: SeenByVerifier = "auto"
    ngram_max: NgramMax = 3
    ngram_min: NgramMin = 1
    window: Window = "auto"
    temperature: Temperature = 0.0
    top_k: TopK = 0
    top_p: TopP = 1.0
    min_p: MinP = 0.0
    repetition_penalty: RepetitionPenalty = None
    processors: Processors = True
    seed: Seed = 0

    def config(self) -> GenerationConfig:
        """The checked config; UsageError for a value that cannot be."""
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            verify=self.verify,
            draft=self.draft,
            draft_from=tuple(self.draft_from or ()),
            draft_memory=self.draft_memory,
            num_draft_tokens=parse_auto("--num-draft-tokens", self.num_draft_tokens),
            trees=self.trees,
            verifier_attention=self.verifier_attention,
            ngram_max=self.ngram_max,
            ngram_min=self.ngram_min,
            window=parse_auto("--window", self.window),
            sampling=SamplingConfig(
                self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty, self.seed
            ),
            stop=tuple(self.stop or ()),
            processors=self.processors,
            fidelity=self.fidelity,
        )


def takes_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take its options in groups: a parameter typed as a dataclass becomes one option per field."""
    groups: dict[str, Any] = {}
    flat: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if is_dataclass(parameter.annotation):
            groups[name] = parameter.annotation
            flat += _field_parameters(parameter.annotation)
        else:
            flat.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def with_flat_options(**given: Any) -> None:
        values = dict(given)
        for name, group in groups.items():
            made = given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
            if hasattr(made, "config"):
                made.config()  # a value that cannot be is refused before anything is said
        note_idle_options(values, {parameter.name: parameter.default for parameter in flat})
        command(**given)

    flattened: Any = with_flat_options
    flattened.__signature__ = inspect.Signature(flat)
    flattened.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return with_flat_options


def _field_parameters(group: Any) -> list[inspect.Parameter]:
    """One keyword parameter for each field of an option group; every field has a default."""
    return [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(group)
    ]
