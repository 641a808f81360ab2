"""Grammars: what is forbidden is never written, drafts are cut where they break it, and modes agree."""

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("llguidance")

from helpers.serving import demo_pair

from quasar_core.decode.logits.grammar import GrammarRule, Grammars
from quasar_core.errors import QuasarError, UsageError

SCHEMA: Any = {
    "type": "object",
    "properties": {
        "a": {"enum": ["x", "yy", "zzz"]},
        "b": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def pair() -> Any:
    return demo_pair()


@pytest.fixture(scope="module")
def grammars(pair: Any) -> Grammars:
    return Grammars(pair)


def rule(grammars: Grammars, behind: int | None = None) -> GrammarRule:
    return grammars.rule(grammars.of_schema(SCHEMA), len(PROMPT), behind)


def allowed_next(grammars: Grammars, answer: list[int], behind: int | None = None) -> list[int]:
    """By a rule that has seen nothing else."""
    row = rule(grammars, behind)(torch.zeros(1, grammars.vocabulary), PROMPT + answer, [])[0]
    return [int(token) for token in row.isfinite().nonzero()[:, 0]]


@given(choices=st.lists(st.integers(0, 10**6), min_size=1, max_size=14), jumps=st.lists(st.integers(0, 14), max_size=6))
def test_one_rule_that_follows_a_text_to_and_fro_is_a_new_rule_each_time(
    grammars: Grammars, choices: list[int], jumps: list[int]
) -> None:
    answer: list[int] = []
    new_rules: dict[int, list[int]] = {}  # what a new one allows behind so much of the answer

    def allowed_behind(length: int) -> list[int]:
        if length not in new_rules:
            new_rules[length] = allowed_next(grammars, answer[:length])
        return new_rules[length]

    for choice in choices:
        may = [token for token in allowed_behind(len(answer)) if token not in grammars.eos_ids]
        if not may:
            break
        answer.append(may[choice % len(may)])
    followed = rule(grammars)
    for jump in (*jumps, len(answer)):
        place = min(jump, len(answer))
        rows = followed(
            torch.zeros(len(answer) - place + 1, grammars.vocabulary), PROMPT + answer[:place], answer[place:]
        )
        for offset, row in enumerate(rows):
            fresh = allowed_behind(place + offset)
            assert row.isfinite().nonzero()[:, 0].tolist() == fresh
        wrong = next(token for token in range(grammars.vocabulary) if token not in fresh)
        draft = [*answer[place:], wrong, *answer[:2]]
        assert followed.allowed(PROMPT + answer[:place], draft) == len(answer) - place


def test_the_end_of_the_text_comes_when_the_value_is_whole_and_not_before(pair: Any, grammars: Grammars) -> None:
    answer = pair.tokenizer('{"a": "x", "b": []}')["input_ids"]
    assert set(allowed_next(grammars, answer)) == set(pair.eos_ids)
    assert not set(allowed_next(grammars, answer[:-1])) & set(pair.eos_ids)


def test_a_text_before_a_mark_is_free(pair: Any, grammars: Grammars) -> None:
    mark = 11
    before = [40, 41]
    assert len(allowed_next(grammars, before, mark)) == grammars.vocabulary
    assert allowed_next(grammars, [*before, mark], mark) == allowed_next(grammars, [])
    first = allowed_next(grammars, [])[0]
    followed = rule(grammars, mark)
    assert followed.allowed(PROMPT, [*before, mark, first, mark]) == 4
    rows = followed(torch.zeros(4, grammars.vocabulary), PROMPT, [*before, mark])
    assert [int(row.isfinite().sum()) for row in rows[:3]] == [grammars.vocabulary] * 3
    assert rows[3].isfinite().nonzero()[:, 0].tolist() == allowed_next(grammars, [])


def test_what_is_no_schema_is_refused_in_a_sentence(grammars: Grammars) -> None:
    for schema in ({"type": "odd"}, {"$ref": "#/nowhere"}, {"type": "string", "pattern": "("}):
        with pytest.raises(UsageError, match="cannot be served") as refused:
            grammars.of_schema(schema)
        assert "\n" not in str(refused.value)


def test_a_schema_that_nothing_fits_is_refused(grammars: Grammars) -> None:
    with pytest.raises(UsageError, match="nothing fits it"):
        grammars.of_schema({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"})
    assert grammars.of_schema({})


def test_what_is_too_complex_to_follow_is_refused_in_a_sentence(grammars: Grammars) -> None:
    followed = grammars.rule(grammars.of_regex("(a{1000}){1000}"), 0)

    def write(answer: list[int]) -> None:
        for _ in range(50):
            followed.follow(answer)
            answer.append(int(followed.mask().nonzero()[-1]))

    with pytest.raises(UsageError, match="too complex") as refused:
        write([])
    assert "\n" not in str(refused.value)
    assert "<state>" not in str(refused.value)


def test_a_regular_expression_that_nothing_fits_is_refused(grammars: Grammars) -> None:
    with pytest.raises(UsageError, match="cannot be served"):
        grammars.of_regex(r"[^\s\S]a")


def test_more_than_a_grammar_may_take_is_refused_at_once(grammars: Grammars) -> None:
    with pytest.raises(UsageError, match="regular expression cannot be served"):
        grammars.of_regex("|".join(f"w{number}q" for number in range(60_000)))
    assert grammars.of_regex("|".join(f"w{number}q" for number in range(1_000)))


def test_a_token_that_does_not_fit_is_no_fault_of_the_request(grammars: Grammars) -> None:
    followed = grammars.rule(grammars.of_regex("[0-9]+"), 0)
    wrong = int((~followed.mask()).nonzero()[0])
    with pytest.raises(QuasarError, match="could not be followed") as failed:
        followed.follow([wrong])
    assert not isinstance(failed.value, UsageError)


@pytest.mark.parametrize(("drafts", "window"), [*product((1, 4, 8), (1, 3, 9))])
def test_the_constrained_text_is_the_plain_one_whatever_is_drafted(
    pair: Any, grammars: Grammars, drafts: int, window: int
) -> None:
    from helpers.tiny_models import drafter_factory

    from quasar_core.config import GenerationConfig
    from quasar_core.decode.answering import Answering
    from quasar_core.decode.generator import Generator

    prompt = pair.tokenizer("Some JSON: ")["input_ids"]
    grammar = grammars.of_schema(SCHEMA)

    def write(verify: str, draft: str, make: Any = None) -> Any:
        config = GenerationConfig(40, verify, draft, num_draft_tokens=drafts, window=window)  # type: ignore[arg-type]
        answering = Answering(rules=[grammars.rule(grammar, len(prompt))])
        pieces = Generator(pair, config, make).stream(prompt, answering=answering)
        while True:
            try:
                next(pieces)
            except StopIteration as end:
                return end.value

    plain = write("full", "none")
    assert plain.finish_reason == "eos"
    for verify, kind in product(("full", "exact"), ("ngram", "oracle", "wrong")):
        make = drafter_factory(kind, [*prompt, *plain.token_ids], grammars.vocabulary)
        found = write(verify, "ngram", make)
        assert found.token_ids == plain.token_ids
        if kind == "oracle" and drafts > 1:
            assert found.stats.accepted > 0
