"""Helpers of the tests."""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

BEGIN, END, USER, ASSISTANT, SYSTEM, NEWLINE = 1, 2, 3, 4, 5, 6


CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def chat_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Words, and the marks of a Qwen3-style template as tokens of their own."""
    marks = ["<|im_start|>", "<|im_end|>", "user", "assistant", "system", "\n"]
    vocabulary = {"w0": 0} | {mark: i for i, mark in enumerate(marks, start=1)} | {f"w{i}": i for i in range(7, 97)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = Split("\n", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.add_tokens(marks[:5], special_tokens=True)
    fast.chat_template = template
    return fast
