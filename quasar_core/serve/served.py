"""The served pair as requests use it: its name, tokenizer, chat template, modes and limits."""

import copy
import functools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, meta

from quasar_core.config import DRAFT_KINDS, VERIFY_MODES, VerifyMode
from quasar_core.decode.logits.grammar import Grammars
from quasar_core.decode.text import encode_prompt
from quasar_core.errors import QuasarError, UsageError
from quasar_core.models.pair import Pair
from quasar_core.serve.errors import ApiError, refused
from quasar_core.serve.settings import Settings

ALIASES = ("default", "quasar")
THINK, END_OF_THINKING = "<think>", "</think>"
BEGINNING = 16  # characters for each token of the longest prompt, by which a text is judged
# What a template is given by the server, or what would stand in for it.
OWN_VARIABLES = frozenset({"messages", "tools", "add_generation_prompt", "chat_template", "tokenize", "conversation"})


class Served:
    """Its tokenizer is a copy, as the engine's own decodes at the same time; one request encodes at a time."""

    def __init__(self, pair: Pair, settings: Settings) -> None:
        if settings.defaults.verify == "gated":
            raise UsageError(
                "--verify gated is not served: it decodes greedily, and requests may ask for other answers."
            )
        self.pair, self.settings = pair, settings
        self.name = Path(pair.target_name).name if Path(pair.target_name).is_absolute() else pair.target_name
        has_target, has_verifier = pair.target is not None, pair.verifier is not None
        runs = {"exact": has_target and has_verifier, "full": has_target, "quantized": has_verifier}
        self.modes: list[VerifyMode] = [mode for mode in VERIFY_MODES if runs.get(mode)]  # not gated
        needed = {"assistant": pair.assistant, "mtp": pair.head}
        kinds = [kind for kind in DRAFT_KINDS if needed.get(kind, kind) is not None]
        self.drafts = tuple(dict.fromkeys([*kinds, settings.defaults.draft]))
        self.most_prompt = min(settings.most_prompt or pair.max_context, pair.max_context - 1)
        self._tokenizer = copy.deepcopy(pair.tokenizer)
        self._lock = threading.Lock()

    @property
    def template(self) -> str:
        """The chat template; empty where the model has none."""
        template = self._tokenizer.chat_template
        return template if isinstance(template, str) else str((template or {}).get("default", ""))

    @functools.cached_property
    def variables(self) -> frozenset[str]:
        """What the chat template reads."""
        return frozenset(
            meta.find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(self.template))
        )

    @property
    def thinks(self) -> bool:
        """Whether answers of this model may begin with a part between <think> and </think>."""
        return END_OF_THINKING in self.template or END_OF_THINKING in self.added_tokens

    @property
    def end_of_thinking(self) -> int | None:
        """The token </think>, where it is one."""
        return self.added_tokens.get(END_OF_THINKING)

    @functools.cached_property
    def added_tokens(self) -> dict[str, int]:
        """The tokens that were added to the vocabulary, by their texts."""
        return {text: int(number) for text, number in self._tokenizer.get_added_vocab().items()}

    @functools.cached_property
    def grammars(self) -> Grammars:
        """The compiler of grammars."""
        return Grammars(self.pair)

    def check_model(self, name: Any) -> None:
        """Refuse a name that is not the served model's."""
        if name is not None and name not in (self.name, *ALIASES):
            raise ApiError(
                404, f"The model {str(name)[:200]} is not served here; {self.name} is.", "model", "model_not_found"
            )

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of a text; with `special`, as a prompt begins."""
        with self._lock:
            return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of tokens."""
        with self._lock:
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special))

    def encode_messages(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> list[int]:
        """Token ids of a conversation, through the model's template."""
        if any("tool_calls" in message for message in messages) and "tool_calls" not in self.template:
            raise refused("This model's chat template leaves tool_calls out.", "messages", "unsupported_field")
        foreign = sorted(variables.keys() & (OWN_VARIABLES - {"tools", "add_generation_prompt"}))
        unread = sorted(variables.keys() - self.variables - OWN_VARIABLES)
        for name in [*foreign, *unread]:
            sentence = f"chat_template_kwargs: this model's template does not take {name[:100]}."
            raise refused(sentence, "chat_template_kwargs", "unsupported_field")
        try:
            with self._lock:
                return encode_prompt(self._tokenizer, messages, **variables)
        except QuasarError as error:
            raise refused(str(error), "messages") from error

    def check_length(self, text: str, field: str) -> None:
        """Refuse by its beginning a text that is much too long: others would wait while all of it is encoded."""
        beginning = BEGINNING * self.most_prompt
        if len(text) > 2 * beginning and len(self.encode(text[:beginning])) > 2 * self.most_prompt:
            raise self._too_long(f"more than {self.most_prompt}", field)

    def _too_long(self, count: str, field: str) -> ApiError:
        bound = "--max-prompt" if self.most_prompt < self.pair.max_context - 1 else self.pair.context_words
        sentence = f"The prompt has {count} tokens, and at most {self.most_prompt} are served ({bound})."
        return refused(sentence, field, "context_length_exceeded")

    def check_prompt(self, ids: Sequence[int], field: str) -> None:
        """Refuse a prompt that is empty or too long, and tokens that there are not."""
        if not ids:
            raise refused("The prompt is empty.", field)
        if len(ids) > self.most_prompt:
            raise self._too_long(str(len(ids)), field)
        rows = self.pair.primary.vocab_size
        if not 0 <= min(ids) <= max(ids) < rows:
            raise refused(f"A token must be from 0 to {rows - 1}.", field)
