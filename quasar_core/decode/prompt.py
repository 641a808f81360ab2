"""From what the user typed to token ids."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from quasar_core.decode.template import render
from quasar_core.files import require_characters
from quasar_core.foreign import foreign_errors


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]] | str,
    *,
    raw: bool = False,
    think: bool | None = None,
) -> list[int]:
    """Token ids of a raw text, or of messages through the chat template.

    A text with `raw` False is one user message; where the tokenizer has no chat template it is taken as it is.
    `think` is handed to templates that know `enable_thinking` (Qwen3's).
    """
    if isinstance(messages, str):
        if raw or not tokenizer.chat_template:
            return _encode(tokenizer, messages)
        messages = [{"role": "user", "content": messages}]
    options: dict[str, Any] = {} if think is None else {"enable_thinking": think}
    if not tokenizer.chat_template:
        return _encode(tokenizer, "\n".join(message["content"] for message in messages))
    text = render(tokenizer, messages, add_generation_prompt=True, **options)
    return _encode(tokenizer, text, add_special_tokens=False)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> list[int]:
    require_characters(text, "The prompt")
    with foreign_errors("The tokenizer cannot encode the prompt"):
        return list(tokenizer(text, **options)["input_ids"])
