"""Calls in free text: what may come next is what the slow way says, which reads the whole text anew for every token."""

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("llguidance")

from helpers.serving import demo_pair

from quasar_core.decode.logits.grammar import Grammars
from quasar_core.decode.logits.triggered_grammar import Trigger, TriggeredRule

PROMPT = [5, 6, 7]
CLOSING = b"!"
THINKING = ("[", "]")
# Openings within tokens of the demo model's, and beyond them: `):` is one token, `self` too.
TRIGGERS = [
    Trigger("def"),
    Trigger(")"),
    Trigger("(se"),
    Trigger("self", thinking=THINKING),
    Trigger("self", thinking=THINKING, inside=True),
    Trigger("(", only_first=True, closes=False),
    Trigger("def", only_first=True, closes=False, thinking=THINKING),
]


@pytest.fixture(scope="module")
def pair() -> Any:
    return demo_pair()


@pytest.fixture(scope="module")
def grammars(pair: Any) -> Grammars:
    return Grammars(pair)


@pytest.fixture(scope="module")
def texts(grammars: Grammars) -> list[bytes]:
    return grammars.token_texts(())


def rule(grammars: Grammars, trigger: Trigger) -> TriggeredRule:
    grammar = grammars.of_lark(f'start: "{trigger.opening}" /[a-c:]{{1,3}}/ "!"\n')
    return TriggeredRule(grammars, grammar, trigger, len(PROMPT))


def free_part(text: bytes, trigger: Trigger) -> bytes:
    """What of a text stands behind the thinking."""
    begin, end = (mark.encode() for mark in THINKING)
    given = text.lstrip()
    if trigger.inside or (trigger.thinking and given.startswith(begin)):
        given = text if trigger.inside else given[len(begin) :]
        return given.partition(end)[2]
    return b"" if trigger.thinking and begin.startswith(given) else text


def call_at(text: bytes, trigger: Trigger) -> int:
    """Where a call begins; −1 for nowhere."""
    if not trigger.only_first:
        return text.find(trigger.opening.encode())
    begins = text.lstrip().startswith(trigger.opening.encode())
    return len(text) - len(text.lstrip()) if begins else -1


def open_call(text: bytes, trigger: Trigger) -> bytes | None:
    """The call that a text ends in; None where it ends in none. ValueError where one breaks the grammar."""
    rest = free_part(text, trigger)
    while (at := call_at(rest, trigger)) >= 0:
        call = rest[at:]
        whole = re.match(re.escape(trigger.opening.encode()) + b"[a-c:]{1,3}!", call)
        if whole is None or not trigger.closes:
            if not re.fullmatch(re.escape(trigger.opening.encode()) + b"([a-c:]{0,3}|[a-c:]{1,3}!)", call):
                raise ValueError(call)
            return call
        rest = call[whole.end() :]
    return None


def may_follow(text: bytes, token: bytes, trigger: Trigger) -> bool:
    try:
        inside = open_call(text, trigger)
        open_call(text + token, trigger)
    except ValueError:
        return False
    if inside is None:
        return True
    return bool(token) and (CLOSING not in token or token.endswith(CLOSING))


def allowed_next(grammars: Grammars, texts: list[bytes], answer: list[int], trigger: Trigger) -> list[int]:
    """The slow way."""
    text = b"".join(texts[token] for token in answer)
    inside = open_call(text, trigger)
    if inside is not None and not trigger.closes and inside.endswith(CLOSING):
        return sorted(grammars.eos_ids)
    return [token for token in range(grammars.vocabulary) if may_follow(text, texts[token], trigger)]


@pytest.mark.parametrize("trigger", TRIGGERS, ids=lambda trigger: f"{trigger.opening} {trigger.only_first}")
@settings(max_examples=4)
@given(data=st.data())
def test_what_may_follow_is_what_the_slow_way_allows(
    grammars: Grammars, texts: list[bytes], trigger: Trigger, data: st.DataObject
) -> None:
    check_answer(grammars, texts, trigger, data)


@pytest.mark.slow
@pytest.mark.parametrize("trigger", TRIGGERS, ids=lambda trigger: f"{trigger.opening} {trigger.only_first}")
@settings(max_examples=500)
@given(data=st.data())
def test_and_so_it_is_for_thousands(
    grammars: Grammars, texts: list[bytes], trigger: Trigger, data: st.DataObject
) -> None:
    check_answer(grammars, texts, trigger, data)


def check_answer(grammars: Grammars, texts: list[bytes], trigger: Trigger, data: st.DataObject) -> None:
    marks = [trigger.opening, *(trigger.thinking or ()), "a", "!", "de", " "]
    liked = {t for t, text in enumerate(texts) if any(m.encode() in text or text == m.encode()[:1] for m in marks)}
    answer: list[int] = []
    for _ in range(data.draw(st.integers(0, 9))):
        may = allowed_next(grammars, texts, answer, trigger)
        narrow = [token for token in may if token in liked and token not in grammars.eos_ids]
        wide = [token for token in may if token not in grammars.eos_ids]
        chosen = narrow if narrow and data.draw(st.booleans()) else wide
        if not chosen:
            break
        answer.append(chosen[data.draw(st.integers(0, 10**6)) % len(chosen)])
    begins = (data.draw(st.integers(0, len(answer))), data.draw(st.integers(0, len(answer))), 0)
    check_rows(grammars, texts, trigger, answer, begins)


def check_rows(
    grammars: Grammars, texts: list[bytes], trigger: Trigger, answer: list[int], begins: Sequence[int]
) -> None:
    """Rows of passes that begin here and there in an answer, by one rule that goes to and fro."""
    followed = rule(grammars, trigger)
    for begin in begins:
        rows = torch.zeros(len(answer) - begin + 1, grammars.vocabulary)
        found = followed(rows, PROMPT + answer[:begin], answer[begin:])
        for offset, row in enumerate(found):
            wanted = allowed_next(grammars, texts, answer[: begin + offset], trigger)
            assert row.isfinite().nonzero()[:, 0].tolist() == wanted
        wrong = sorted(set(range(grammars.vocabulary)) - set(wanted))[:1]
        let_through = followed.allowed(PROMPT + answer[:begin], [*answer[begin:], *wrong, 9])
        assert let_through == len(answer) - begin if wrong else let_through >= len(answer) - begin


@pytest.mark.parametrize("trigger", TRIGGERS, ids=lambda trigger: f"{trigger.opening} {trigger.only_first}")
def test_text_goes_on_freely_behind_a_call_and_calls_behind_text(
    pair: Any, grammars: Grammars, texts: list[bytes], trigger: Trigger
) -> None:
    before = "".join(THINKING) if trigger.thinking and not trigger.inside else "]" if trigger.inside else ""
    again = f" and {trigger.opening}c!." if trigger.closes else ""
    for text in (f"{before}{trigger.opening}ab!{again}", f"{before} no"):
        answer = [token for character in text for token in pair.tokenizer(character)["input_ids"]]
        check_rows(grammars, texts, trigger, answer, (len(answer), 0))


def test_a_mark_of_the_vocabulary_may_be_written_as_plain_text_too() -> None:
    """The grammar knows the mark's own token; a model that spells it opens a call all the same."""
    pair = demo_pair()
    ids = [pair.tokenizer.convert_tokens_to_ids(mark) for mark in ("<|im_start|>", "<|im_end|>")]
    assert None not in ids
    grammars = Grammars(pair)
    grammar = grammars.of_lark('start: <|im_start|> /[ab]{2}/ "!"\n')
    trigger = Trigger("<|im_start|>", shown=("<|im_start|>",))
    plain = [t for character in "<|im_start|>" for t in pair.tokenizer(character)["input_ids"]]
    for opening in ([ids[0]], plain):
        followed = TriggeredRule(grammars, grammar, trigger, 0)
        row = followed(torch.zeros(1, grammars.vocabulary), opening, [])[0]
        texts = [pair.tokenizer.decode([int(token)]) for token in row.isfinite().nonzero()[:, 0]]
        assert set(texts) <= {"a", "b", "ab", "ba", "aa", "bb"}
        assert {"a", "b"} <= set(texts)
