"""From what the user typed to token ids."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from quasar_core.decode.template import render


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
            return list(tokenizer(messages)["input_ids"])
        messages = [{"role": "user", "content": messages}]
    options: dict[str, Any] = {} if think is None else {"enable_thinking": think}
    if not tokenizer.chat_template:
        return list(tokenizer("\n".join(message["content"] for message in messages))["input_ids"])
    text = render(tokenizer, messages, add_generation_prompt=True, **options)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
