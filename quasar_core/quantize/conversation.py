"""Conversations that a chat model writes by itself, both sides: the template's tokens open and end its turns.

It starts where its template opens a user's turn, and where a turn ends the template's own tokens open the next one
(Magpie, Xu et al., 2024).
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from quasar_core.decode.text import render
from quasar_core.errors import QuasarError

_MARK = "QUASAR-MARK"


@dataclass(frozen=True)
class TurnTokens:
    """Token ids that open a conversation, and those that follow a user's and an assistant's turn."""

    opening: list[int]
    after_user: list[int]
    after_assistant: list[int]
    ends: frozenset[int]


def turn_tokens(tokenizer: PreTrainedTokenizerBase) -> TurnTokens | None:
    """Read off the chat template, by rendering marked messages; None without a template or a marked rendering."""
    if not tokenizer.chat_template or tokenizer.eos_token_id is None:
        return None
    user, assistant = f"{_MARK}-1", f"{_MARK}-2"
    messages = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": assistant},
        {"role": "user", "content": f"{_MARK}-3"},
    ]
    try:
        text = render(tokenizer, messages)
        asked = render(tokenizer, messages[:1], add_generation_prompt=True)
    except QuasarError:  # what no conversation can be written with is written without one
        return None
    if not (user in asked and user in text and assistant in text and messages[2]["content"] in text):
        return None
    opening = text.split(user)[0]
    after_user = asked.split(user)[1]
    after_assistant = text.split(assistant)[1].split(messages[2]["content"])[0]
    end = tokenizer.eos_token_id

    def without_end(piece: str) -> list[int]:
        ids = list(tokenizer(piece, add_special_tokens=False)["input_ids"])
        return ids[1:] if ids[:1] == [end] else ids

    return TurnTokens(without_end(opening), without_end(after_user), without_end(after_assistant), frozenset([end]))


def text_opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Find the token ids that the tokenizer puts before every text, such as Gemma's <bos>; often none.

    A model that never read a text without them writes, without them, what it would never be asked to write.
    """
    bare = list(tokenizer(_MARK, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(_MARK)["input_ids"])
    starts = (at for at in range(len(whole) - len(bare) + 1) if whole[at : at + len(bare)] == bare)
    return whole[: next(starts, 0)]


class Conversations:
    """Whose turn it is in each row, and the template's tokens that must come next."""

    def __init__(self, turns: TurnTokens | None, rows: int) -> None:
        self.turns = turns
        self.user_speaks = [True] * rows
        self.forced: list[list[int]] = [[] for _ in range(rows)]

    def direct(self, chosen: torch.Tensor) -> torch.Tensor:
        """Replace sampled tokens by forced ones where a turn has just ended."""
        if self.turns is None:
            return chosen
        tokens = chosen.tolist()
        for row, token in enumerate(tokens):
            if self.forced[row]:
                tokens[row] = self.forced[row].pop(0)
            elif token in self.turns.ends:
                after = self.turns.after_user if self.user_speaks[row] else self.turns.after_assistant
                self.forced[row] = list(after)
                self.user_speaks[row] = not self.user_speaks[row]
        return torch.tensor(tokens, device=chosen.device)
