"""Logits processors of a model's generation_config.json, in transformers' own classes and in their order.

They change logits by the text so far, before a token is chosen or drawn, so greedy decoding equals `generate` only
with them. Target and verifier go through the same ones, so p and q are compared after them.
Letters: T rows of a pass, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.generation import logits_process as library

from quasar_core.config import GenerationConfig
from quasar_core.errors import QuasarError
from quasar_core.files import read_json

LEAVE_OUT = "--no-processors leaves all of them out"
# What changes the tokens and is no function of logits and text, with the values that ask for nothing.
NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "guidance_scale": (1, 1.0),
    "watermarking_config": (),
    "penalty_alpha": (0, 0.0),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
    "token_healing": (False,),
}


@dataclass(frozen=True)
class Text:
    """What a processor may depend on beside the tokens so far: `limit` is the most tokens, prompt included."""

    prompt: Any  # ids [1, P], which transformers types more narrowly than torch makes them
    begin: int  # the tokens before the first that is not forced: P, or 2 where the second of all is forced
    limit: int
    eos_ids: list[int]
    device: str

    @property
    def prompt_length(self) -> int:
        """P."""
        return int(self.prompt.shape[1])


@dataclass(frozen=True)
class Option:
    """How an option becomes a processor, and the values that ask for none.

    `rows_at_once`: whether it serves rows of texts of different lengths in one call, as it looks at no length.
    """

    make: Callable[[Any, Text], library.LogitsProcessor]
    idle: tuple[Any, ...] = ()
    needs_eos: bool = False
    rows_at_once: bool = False


def _bad_words(words: Any, text: Text) -> library.LogitsProcessor:
    return library.NoBadWordsLogitsProcessor(words, text.eos_ids or None)


def _encoder_penalty(penalty: Any, text: Text) -> library.LogitsProcessor:
    return library.EncoderRepetitionPenaltyLogitsProcessor(float(penalty), text.prompt)


def _decay(options: Any, text: Text) -> library.LogitsProcessor:
    start, factor = options
    return library.ExponentialDecayLengthPenalty((start, factor), text.eos_ids, text.prompt_length)


# In the order in which `generate` applies them.
OPTIONS: dict[str, Option] = {
    "sequence_bias": Option(lambda value, _: library.SequenceBiasLogitsProcessor(value)),
    "encoder_repetition_penalty": Option(_encoder_penalty, (1,)),
    "repetition_penalty": Option(
        lambda value, _: library.RepetitionPenaltyLogitsProcessor(float(value)), (1,), rows_at_once=True
    ),
    "no_repeat_ngram_size": Option(lambda value, _: library.NoRepeatNGramLogitsProcessor(value), (0,)),
    "encoder_no_repeat_ngram_size": Option(
        lambda value, text: library.EncoderNoRepeatNGramLogitsProcessor(value, text.prompt), (0,)
    ),
    "bad_words_ids": Option(_bad_words),
    "min_length": Option(
        lambda value, text: library.MinLengthLogitsProcessor(value, text.eos_ids, device=text.device), (0,), True
    ),
    "min_new_tokens": Option(
        lambda value, text: library.MinNewTokensLengthLogitsProcessor(
            text.prompt_length, value, text.eos_ids, device=text.device
        ),
        (0,),
        True,
    ),
    "forced_bos_token_id": Option(lambda value, _: library.ForcedBOSTokenLogitsProcessor(value)),
    "forced_eos_token_id": Option(
        lambda value, text: library.ForcedEOSTokenLogitsProcessor(text.limit, value, device=text.device)
    ),
    "remove_invalid_values": Option(lambda _, __: library.InfNanRemoveLogitsProcessor(), (False,), rows_at_once=True),
    "exponential_decay_length_penalty": Option(_decay, needs_eos=True),
    "suppress_tokens": Option(
        lambda value, text: library.SuppressTokensLogitsProcessor(value, device=text.device), rows_at_once=True
    ),
    "begin_suppress_tokens": Option(
        lambda value, text: library.SuppressTokensAtBeginLogitsProcessor(value, text.begin, device=text.device)
    ),
}


def read_processors(folder: Path) -> dict[str, Any]:
    """The options of a model's folder that ask for something, by their names in generation_config.json.

    Without that file they are those of config.json, where older models have them.
    """
    path = folder / "generation_config.json"
    content = read_json(path) if path.exists() else _of_config(folder)
    idle = {name: option.idle for name, option in OPTIONS.items()} | NOT_SERVED
    return {name: content[name] for name in idle if _asks(content.get(name), idle[name])}


def _of_config(folder: Path) -> Mapping[str, Any]:
    config = read_json(folder / "config.json")
    text_config = config.get("text_config")
    return {**(text_config if isinstance(text_config, Mapping) else {}), **config}


def _asks(value: Any, idle: tuple[Any, ...]) -> bool:
    return value is not None and value not in idle


class Processors:
    """The processors of one generation; called with the logits of a pass.

    They depend on the prompt, so `begin` comes before the first call.
    """

    def __init__(self, options: Mapping[str, Any], config: GenerationConfig) -> None:
        self.options = _chosen(options, config)
        self._chain: list[tuple[str, library.LogitsProcessor, bool]] = []

    def __bool__(self) -> bool:
        """Whether any logits are changed."""
        return bool(self.options)

    def begin(self, prompt: Sequence[int], limit: int, eos_ids: frozenset[int], device: torch.device) -> None:
        """A text begins, of at most `limit` tokens; QuasarError that names the option whose value cannot be."""
        forced = len(prompt) == 1 and "forced_bos_token_id" in self.options
        ids = torch.tensor([list(prompt)], device=device)
        text = Text(ids, len(prompt) + forced, limit, sorted(eos_ids), str(device))
        self._chain = [
            (name, _make(name, value, text), OPTIONS[name].rows_at_once)
            for name, value in self.options.items()
            if eos_ids or not OPTIONS[name].needs_eos
        ]

    def __call__(self, logits: torch.Tensor, prefix: Sequence[int], continuation: Sequence[int]) -> torch.Tensor:
        """Processed logits [T, V], a new tensor where any is changed; row i follows `prefix` and i tokens."""
        if not self._chain:
            return logits
        text = torch.tensor([*prefix, *continuation[: len(logits) - 1]], device=logits.device)
        for name, process, at_once in self._chain:
            try:
                logits = (_apply_at_once if at_once else _apply_by_row)(process, text, logits)
            except (ValueError, TypeError, IndexError, RuntimeError) as error:
                raise _refused(name, error) from error
        return logits


def _chosen(options: Mapping[str, Any], config: GenerationConfig) -> dict[str, Any]:
    """The model's options, unless they are left out, and the penalty of the command line in the place of its own."""
    chosen = dict(options) if config.processors else {}
    foreign = [name for name in NOT_SERVED if name in chosen]
    if foreign:
        raise QuasarError(
            f"The model's generation_config.json asks for {foreign[0]} {chosen[foreign[0]]}, which quasar does not "
            f"do; {LEAVE_OUT}."
        )
    penalty = config.sampling.repetition_penalty
    if penalty is not None:
        chosen["repetition_penalty"] = penalty
    return {name: chosen[name] for name in OPTIONS if name in chosen and _asks(chosen[name], OPTIONS[name].idle)}


def _make(name: str, value: Any, text: Text) -> library.LogitsProcessor:
    try:
        return OPTIONS[name].make(value, text)
    except (ValueError, TypeError, AttributeError, IndexError, KeyError, RuntimeError, OverflowError) as error:
        raise _refused(name, error) from error


def _apply_by_row(process: library.LogitsProcessor, text: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """One processor on each row of logits [T, V]; `text` [N] is that of the last row, and each before has one less."""
    shortest = len(text) - len(logits) + 1
    rows = [process(text[None, : shortest + row], logits[row : row + 1]) for row in range(len(logits))]
    return torch.cat(rows)


def _apply_at_once(process: library.LogitsProcessor, text: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """One processor on all rows in one call: shorter texts repeat their last token, as it looks at no length."""
    rows = torch.arange(len(logits), device=text.device)[:, None]
    last = len(text) - len(logits) + rows
    places = torch.arange(len(text), device=text.device)[None].minimum(last)
    return process(text[places], logits)  # type: ignore[no-any-return]


def _refused(name: str, error: Exception) -> QuasarError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return QuasarError(f"The {name} of the model's generation_config.json cannot be applied: {first}; {LEAVE_OUT}.")


def describe_processors(options: Mapping[str, Any], config: GenerationConfig) -> str | None:
    """A note of what changes the logits, or of what is left out; None where the model asks for nothing."""
    if not config.processors:
        return f"processors: left out, as asked: {', '.join(options)}" if options else None
    chosen = _chosen(options, config)
    listed = ", ".join(f"{name} {_short(value)}" for name, value in chosen.items())
    return f"processors: {listed}, as transformers' generate applies them" if chosen else None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"of {len(value)} entries" if hasattr(value, "__len__") else text[:40]
