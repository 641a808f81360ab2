"""Greedy texts that rounding cannot change: prompts whose best tokens lead clearly, and ties that may fall either way.

A logit in float32 is off by some 1e-6 of the largest; `CLEAR` is a thousand times that.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

CLEAR = 1e-3  # of the largest logit
TIE = 1e-4


@torch.inference_mode()
def least_lead(model: Any, prompt: Sequence[int], count: int, penalty: float = 1.0) -> float:
    """The smallest lead of a best token over the second, in transformers' greedy text, ÷ the largest logit.

    Of the text up to a token that does not lead clearly: it is of no use then, whatever follows.
    """
    ids = torch.tensor([list(prompt)])
    options = {"do_sample": False, "max_new_tokens": count, "eos_token_id": None, "repetition_penalty": penalty}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    options |= {"stopping_criteria": StoppingCriteriaList([_Unclear()])}
    return float(_leads(torch.cat(model.generate(ids, attention_mask=torch.ones_like(ids), **options).scores)).min())


def _leads(scores: torch.Tensor) -> torch.Tensor:
    best = scores.topk(2, dim=-1).values
    return (best[:, 0] - best[:, 1]) / scores.abs().amax(dim=-1)


class _Unclear(StoppingCriteria):
    """Ends a text whose last token does not lead clearly."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **named: Any) -> torch.Tensor:
        return _leads(scores[-1]) <= CLEAR


def clear_prompt(model: Any, prompts: Iterable[Sequence[int]], count: int) -> list[int]:
    """The first of the prompts after which every best token leads clearly."""
    return next(list(prompt) for prompt in prompts if least_lead(model, prompt, count) > CLEAR)


def first_clear(make: Callable[[int], Any], prompt: Sequence[int], count: int, penalties: Sequence[float]) -> Any:
    """The model of the first seed after whose prompt every best token leads clearly."""
    models = map(make, itertools.count())
    return next(m for m in models if all(least_lead(m, prompt, count, penalty) > CLEAR for penalty in penalties))


@torch.inference_mode()
def assert_same_but_for_ties(model: Any, found: Sequence[int], expected: Sequence[int]) -> None:
    """Two texts are equal, or part where transformers has both tokens for equally good; then they go on apart."""
    assert len(found) == len(expected)
    parted = next((i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]), None)
    if parted is not None:
        logits = model(input_ids=torch.tensor([list(found[:parted])])).logits[0, -1]
        lead = float((logits[found[parted]] - logits[expected[parted]]).abs() / logits.abs().max())
        assert lead < TIE, f"token {parted} is {found[parted]}, not {expected[parted]}"
