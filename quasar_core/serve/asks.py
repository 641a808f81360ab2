"""Read the request fields that chat and completions share, checked and in the library's own terms."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quasar_core.config import (
    MOST_TEMPERATURE,
    PENALTIES,
    VERIFY_MODES,
    DraftKind,
    Request,
    SamplingConfig,
    VerifyMode,
)
from quasar_core.decode.answering import TokenRule
from quasar_core.decode.logits.rules import Bias, NoEnd, WrittenPenalty
from quasar_core.decode.text import Reading
from quasar_core.serve.errors import refused
from quasar_core.serve.fields import Fields
from quasar_core.serve.served import Served

MOST_STOPS, MOST_STOP = 16, 200  # stop texts, and characters of one
MOST_TOP = 20  # tokens beside each, with their log-probabilities
MOST_ENDS = 64  # tokens of `stop_token_ids`
MOST_SEED = 2**62 - 1
MOST_DIGITS = 18  # of a number that names a token

Rules = Callable[[], list[TokenRule]]


@dataclass(frozen=True)
class Ask:
    """One answer to one prompt. With `score_prompt` the prompt's own tokens are scored before; `top` None scores none.

    `rules` makes the answer's rules; `ends` are the tokens that end it. `max_new_tokens` 0 asks for the prompt's scores
    alone.
    """

    prompt_ids: Sequence[int]
    request: Request
    verify: VerifyMode
    draft: DraftKind
    rules: Rules
    ends: frozenset[int]
    reading: Reading
    top: int | None = None
    score_prompt: bool = False
    trace: bool = False


@dataclass(frozen=True)
class Common:
    """The fields that both endpoints read alike."""

    stream: bool
    include_usage: bool
    count: int
    request: Request
    verify: VerifyMode
    draft: DraftKind
    presence: float
    frequency: float
    biases: dict[int, float]
    ends: frozenset[int]
    reading: Reading

    def rules(self, prompt_ids: Sequence[int]) -> list[TokenRule]:
        """The rules of penalties and biases, for an answer behind the prompt."""
        rules: list[TokenRule] = []
        if self.presence or self.frequency:
            rules.append(WrittenPenalty(len(prompt_ids), self.presence, self.frequency))
        if self.biases:
            rules.append(Bias(self.biases))
        if self.reading.least and self.ends:
            rules.append(NoEnd(len(prompt_ids), self.reading.least, self.ends))
        return rules

    def request_of(self, choice: int) -> Request:
        """The request of one of `count` choices: each has a seed of its own."""
        return replace(self.request, seed=self.request.seed + choice)


def read_common(fields: Fields, served: Served, usual_tokens: int, least_tokens: int = 1) -> Common:
    """Read what both endpoints have; `usual_tokens` is the length where none is asked for."""
    served.check_model(fields.take("model"))
    stream = fields.flag("stream")
    include_usage = _stream_options(fields, stream)
    sampling, penalties = _sampling(fields, served)
    tokens = _most_tokens(fields, usual_tokens, least_tokens)
    verify, draft = _mode(fields, served)
    request = Request(
        tokens,
        sampling.seed,
        prediction=_prediction(fields, served, draft),
        sampling=sampling,
        stop=_stop(fields),
    )
    return Common(
        stream=stream,
        include_usage=include_usage,
        count=fields.whole("n", 1, served.settings.most_choices) or 1,
        request=request,
        verify=verify,
        draft=draft,
        presence=penalties[0],
        frequency=penalties[1],
        biases=_biases(fields, served),
        ends=_ends(fields, served),
        reading=_reading(fields, tokens),
    )


def _stream_options(fields: Fields, stream: bool) -> bool:
    """Whether a chunk with the usage ends the stream."""
    given = fields.take("stream_options")
    if given is None:
        return False
    if not isinstance(given, dict) or not stream:
        raise refused("stream_options is an object, and goes with stream true.", "stream_options")
    options = Fields(given, "stream_options")
    wanted = options.flag("include_usage")
    options.flag("include_obfuscation")  # padding against who reads the network; there is none here either way
    options.end()
    return wanted


def _sampling(fields: Fields, served: Served) -> tuple[SamplingConfig, tuple[float, float]]:
    """How tokens are drawn, and the presence and frequency penalties."""
    usual = served.settings.defaults.sampling
    temperature = fields.number("temperature", 0, MOST_TEMPERATURE, usual.temperature)
    seed = fields.whole("seed", -MOST_SEED, MOST_SEED)
    top_k = fields.take("top_k", usual.top_k)
    penalty = fields.take("repetition_penalty", usual.repetition_penalty)
    number = Fields({"top_k": 0 if top_k == -1 else top_k, "repetition_penalty": penalty})
    config = SamplingConfig(
        temperature=temperature,
        top_k=number.whole("top_k", 0) or 0,
        top_p=fields.number("top_p", 0, 1, usual.top_p),
        min_p=fields.number("min_p", 0, 1, usual.min_p),
        repetition_penalty=None if penalty is None else number.number("repetition_penalty", *PENALTIES, 1.0),
        seed=secrets.randbits(48) if seed is None else seed,
    )
    presence = fields.number("presence_penalty", -2, 2, 0.0)
    return config, (presence, fields.number("frequency_penalty", -2, 2, 0.0))


def _most_tokens(fields: Fields, usual: int, least: int) -> int:
    """`max_completion_tokens`, or by its older name `max_tokens`."""
    older, newer = fields.whole("max_tokens", least), fields.whole("max_completion_tokens", least)
    if older is not None and newer is not None and older != newer:
        raise refused("max_tokens and max_completion_tokens name different lengths.", "max_completion_tokens")
    given = newer if newer is not None else older
    return usual if given is None else given


def _stop(fields: Fields) -> tuple[str, ...]:
    given = fields.take("stop", [])
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or len(texts) > MOST_STOPS:
        raise refused(f"stop must be a text or a list of at most {MOST_STOPS} texts.", "stop")
    for text in texts:
        if not isinstance(text, str) or not 0 < len(text) <= MOST_STOP:
            raise refused(f"stop must hold texts of 1 to {MOST_STOP} characters.", "stop")
    return tuple(texts)


def _ends(fields: Fields, served: Served) -> frozenset[int]:
    """The tokens that end an answer: the model's own, unless `ignore_eos` leaves them out, and `stop_token_ids`."""
    given, rows = fields.take("stop_token_ids", []), served.pair.primary.vocab_size
    if not isinstance(given, list) or len(given) > MOST_ENDS:
        raise refused(f"stop_token_ids must be a list of at most {MOST_ENDS} tokens.", "stop_token_ids")
    for token in given:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < rows:
            raise refused(f"stop_token_ids must be tokens from 0 to {rows - 1}.", "stop_token_ids")
    ignores = fields.flag("ignore_eos", served.settings.defaults.ignore_eos)
    return frozenset(given) | (frozenset() if ignores else served.pair.eos_ids)


def _reading(fields: Fields, most_tokens: int) -> Reading:
    """Which tokens are text: `min_tokens`, `skip_special_tokens` and `include_stop_str_in_output`, as vLLM has them."""
    least = fields.whole("min_tokens", 0) or 0
    if least > most_tokens:
        raise refused(f"min_tokens is {least}, and the answer has at most {most_tokens} tokens.", "min_tokens")
    skips = fields.flag("skip_special_tokens", True)
    return Reading(special=not skips, keeps_stop=fields.flag("include_stop_str_in_output"), least=least)


def _mode(fields: Fields, served: Served) -> tuple[VerifyMode, DraftKind]:
    """Who decides each token, and who drafts."""
    defaults = served.settings.defaults
    verify: Any = fields.one_of("verify", VERIFY_MODES, defaults.verify)
    draft = fields.one_of("draft", served.drafts, defaults.draft)
    if verify not in served.modes:
        raise refused(f"verify {verify} is not served: this server has {', '.join(served.modes)}.", "verify")
    return verify, draft


def _biases(fields: Fields, served: Served) -> dict[int, float]:
    given = fields.mapping("logit_bias")
    if len(given) > 1024:
        raise refused("logit_bias must name at most 1024 tokens.", "logit_bias")
    values = Fields(given, "logit_bias")
    vocabulary = served.pair.primary.vocab_size
    for name in given:
        if not name.isdecimal() or len(name) > MOST_DIGITS or int(name) >= vocabulary:
            raise refused(f"logit_bias must name tokens by their numbers, from 0 to {vocabulary - 1}.", "logit_bias")
    return {int(name): values.number(name, -100, 100, 0.0) for name in given}


def _prediction(fields: Fields, served: Served, draft: DraftKind) -> str:
    """What the answer may well be: `{"type": "content", "content": …}`."""
    given = fields.mapping("prediction")
    if not given:
        return served.settings.defaults.prediction if draft != "none" else ""
    inner = Fields(given, "prediction")
    inner.one_of("type", ("content",), "content")
    text = content_text(inner.take("content"), "prediction")
    inner.end()
    if draft == "none":
        raise refused("prediction is a draft, and draft none takes none.", "prediction")
    return text


def content_text(content: Any, field: str) -> str:
    """The text of a content: a text, or parts of which each is a text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise refused(f"{field}: content must be a text or a list of parts.", field)
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind not in ("text", "input_text"):
            raise refused(f"{field}: a part of type {kind} is not served; text is.", field, "unsupported_field")
        text = part.get("text")
        if not isinstance(text, str):
            raise refused(f"{field}: a part's text must be a text.", field)
        texts.append(text)
    return "".join(texts)
