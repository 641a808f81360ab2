"""The library's front: load a pair, stream or generate text with it, quantize a model. docs/library.md shows each."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from quasar_core.api import decoding, quantizing
from quasar_core.choose_bits import Wanted, choose
from quasar_core.config import GenerationConfig, Offload, QuantizeConfig, SamplingConfig
from quasar_core.decode.generator import Generator, TextPieces
from quasar_core.decode.text import encode_prompt
from quasar_core.errors import UsageError
from quasar_core.models.pair import Pair
from quasar_core.records import GenerationResult, Progress, QuantizeReport, Tell, no_progress, tell_nobody

Prompt = str | Sequence[Mapping[str, str]]  # a text, or messages with a role and a content

_SAMPLING = {field.name for field in fields(SamplingConfig)}
_GENERATION = {field.name for field in fields(GenerationConfig)} - {"sampling"}


def load(model: str | None = None, verifier: str | None = None, **options: Any) -> Pair:
    """Load a target and its verifier; without `model` the current pair. `options` are those of `decoding.load_pair`.

    Raises UsageError where there is no such pair, QuasarError where it cannot be read.
    """
    return decoding.load_pair(model, verifier, **options)


def stream(pair: Pair, prompt: Prompt, **options: Any) -> TextPieces:
    """Yield the answer piece by piece, decoding as pieces are asked for; returns the GenerationResult.

    A text is one user message, or with `raw=True` the prompt as it is; `system` is a message before it, and `think`
    goes to templates that know it. All other options are fields of GenerationConfig and of SamplingConfig. What
    cannot be is refused (UsageError, TypeError) by this call, not by the first piece.
    """
    generator, prompt_ids = _begin(pair, prompt, **options)
    return _and_release(generator, generator.stream(prompt_ids))


def generate(pair: Pair, prompt: Prompt, **options: Any) -> GenerationResult:
    """Generate the whole answer: its text, token ids and counts; takes what `stream` takes."""
    generator, prompt_ids = _begin(pair, prompt, **options)
    try:
        return generator.generate(prompt_ids)
    finally:
        generator.release()


def _and_release(generator: Generator, pieces: TextPieces) -> TextPieces:
    """The pieces; the caches go with the last one."""
    try:
        return (yield from pieces)
    finally:
        generator.release()


def _begin(
    pair: Pair,
    prompt: Prompt,
    *,
    system: str | None = None,
    raw: bool = False,
    think: bool | None = None,
    **options: Any,
) -> tuple[Generator, list[int]]:
    prompt_ids = encode_prompt(pair.tokenizer, _messages(prompt, system, raw), raw=raw, think=think)
    return Generator(pair, generation_config(pair, **options)), prompt_ids


def quantize_model(
    model: str,
    *,
    output: str | Path | None = None,
    force: bool = False,
    resume: bool = True,
    device: str = "auto",
    max_memory: int | None = None,
    trust_remote_code: bool = False,
    offload: Offload = "auto",
    decode_memory: int | None = None,
    progress: Progress = no_progress,
    tell: Tell = tell_nobody,
    **options: Any,
) -> QuantizeReport:
    """Write the verifier of `model` and make the pair current; `options` are those of `QuantizeConfig.of`.

    With `bits="auto"` the verifier is made that decodes fastest on this device; a group size and a head's width that
    are given stay; `offload` and `decode_memory`, in bytes, say how decoding will stream the target. `tell` hears what
    was chosen, and what would help. A run that was interrupted goes on. Raises as `quantizing.quantize` does.
    """
    folder = None if output is None else Path(output)
    run: dict[str, Any] = {"force": force, "max_memory": max_memory, "progress": progress, "tell": tell}
    place: dict[str, Any] = {"output": folder, "device": device, "trust_remote_code": trust_remote_code}
    if isinstance(options.get("bits"), str):
        streaming = {"offload": offload, "decode_memory": decode_memory}
        config = _chosen(model, options, {**place, **streaming}, {**run, "resume": resume})
        resume = True  # of the verifier that was chosen nothing is made yet but its text
    elif offload != "auto" or decode_memory is not None:
        raise UsageError('offload and decode_memory go with bits="auto", which chooses for them.')
    else:
        config = QuantizeConfig.of(**options)
    return quantizing.quantize(model, config, resume=resume, **place, **run)


def _chosen(model: str, options: Mapping[str, Any], place: Mapping[str, Any], run: Mapping[str, Any]) -> QuantizeConfig:
    """The config of `bits="auto"`; UsageError for another text."""
    others = dict(options)
    if (bits := others.pop("bits")) != "auto":
        raise UsageError(f"--bits must be auto or a number such as 4 or 4.25, not {bits!r}.")
    groups, heads = (() if others.get(name) is None else (others[name],) for name in ("group_size", "lm_head_bits"))
    config, choice = choose(Wanted(model, QuantizeConfig.of(**others), groups, heads, **place), **run)
    for sentence in choice.sentences():
        run["tell"](sentence)
    return config


def generation_config(pair: Pair, **options: Any) -> GenerationConfig:
    """The config of keyword arguments. Unless `verify` is given it is the best promise that the loaded models keep.

    That is `exact` for target and verifier, `full` for a target alone and `quantized` for a verifier alone. Raises
    TypeError for an option that there is not, UsageError for a value that cannot be.
    """
    unknown = options.keys() - _SAMPLING - _GENERATION
    if unknown:
        known = ", ".join(sorted(_SAMPLING | _GENERATION))
        raise TypeError(f"no option {', '.join(sorted(unknown))}; there are {known}")
    if "stop" in options:
        options["stop"] = (options["stop"],) if isinstance(options["stop"], str) else tuple(options["stop"])
    sampling = SamplingConfig(**{name: options.pop(name) for name in _SAMPLING & options.keys()})
    alone = "full" if pair.verifier is None else "quantized" if pair.target is None else "exact"
    return GenerationConfig(sampling=sampling, **{"verify": alone, **options})


def _messages(prompt: Prompt, system: str | None, raw: bool) -> list[dict[str, str]] | str:
    """The prompt as `encode_prompt` takes it, with the system message in front."""
    if raw and (system is not None or not isinstance(prompt, str)):
        raise UsageError("With raw, the prompt is a text, without a system message.")
    if isinstance(prompt, str):
        if system is None:
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    opening = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, *(dict(message) for message in prompt)]
