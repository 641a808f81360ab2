"""The kind of each token of a vocabulary, by its text."""

import torch
from transformers import PreTrainedTokenizerBase

KINDS = ("letters", "digits", "punctuation", "whitespace", "part of a character", "special")


def token_kinds(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> torch.Tensor:
    """For each of `vocab_size` ids an index into `KINDS`; ids that the tokenizer does not know count as special."""
    known = min(vocab_size, len(tokenizer))
    texts = tokenizer.batch_decode([[token] for token in range(known)], clean_up_tokenization_spaces=False)
    special = set(tokenizer.all_special_ids)
    names = ["special" if token in special else kind_of(text) for token, text in enumerate(texts)]
    return torch.tensor([KINDS.index(name) for name in names + ["special"] * (vocab_size - known)])


def kind_of(text: str) -> str:
    """A token with a letter counts as letters, else one with a digit as digits."""
    if "\ufffd" in text:
        return "part of a character"
    if any(character.isalpha() for character in text):
        return "letters"
    if any(character.isdigit() for character in text):
        return "digits"
    return "punctuation" if text.strip() else "whitespace"
