"""Which cache a prompt takes: those of other conversations stay, and memory is bounded."""

import gc
import weakref
from typing import Any

import pytest
from helpers.tiny_models import TableModel, make_pair

from quasar_core.config import GenerationConfig
from quasar_core.decode.answering import Answering, Stopped
from quasar_core.decode.generator import Generator
from quasar_core.decode.prefixes import BLOCK, Prefixes


def prefixes(most: int, positions: int | None = None, **changes: Any) -> Prefixes:
    return Prefixes(make_pair(TableModel(97, 1), max_context=8 * BLOCK, **changes), most, positions)


def use(kept: Prefixes, prompt: list[int], answer: list[int], room: int = 64) -> int:
    """Answer a prompt; how many of its tokens were kept."""
    prefix, common = kept.take(prompt, len(prompt) + room)
    prefix.cache.tokens += prompt[common:] + answer
    kept.keep(prefix, prompt + answer[:-1])
    return common


TALK, TITLE = list(range(40)), [90] * 30


def test_another_task_leaves_the_conversation() -> None:
    for most, wanted in ((1, 0), (2, 45), (3, 45)):
        kept = prefixes(most)
        use(kept, TALK, [50] * 6)
        use(kept, TITLE, [60] * 6)
        assert use(kept, [*TALK, *[50] * 6, 51], [52] * 6) == wanted
        assert use(kept, TITLE, [60]) == (29 if most > 1 else 0)


def test_a_conversation_whose_answer_is_rewritten_stays_in_its_place() -> None:
    """Templates leave thinking out of later turns, however long it was."""
    kept = prefixes(2)
    use(kept, TALK, [50] * 200, 300)
    use(kept, TITLE, [60] * 6, 300)
    assert use(kept, [*TALK, 51], [52] * 6, 300) == 40
    assert use(kept, TITLE, [60], 300) == 29


def test_the_oldest_goes_first() -> None:
    kept = prefixes(2)
    for number in (1, 2, 3):
        use(kept, [number] * 20, [number] * 4)
    assert use(kept, [1] * 20, [1]) == 0
    assert use(kept, [3] * 20, [3]) == 19


def test_none_keeps_nothing_and_positions_are_bounded() -> None:
    none = prefixes(0)
    assert [use(none, TALK, [50] * 4) for _ in range(3)] == [0, 0, 0]
    bounded = prefixes(5, 2 * BLOCK)
    for number in range(4):
        use(bounded, [number] * 20, [number] * 4)
        assert bounded._positions <= 2 * BLOCK
    use(bounded, [9] * 20, [9] * 4, 3 * BLOCK)
    assert bounded._positions == 4 * BLOCK  # one that is needed is made, and it alone
    assert len(bounded._kept) == 1


def test_a_larger_cache_is_made_when_the_smaller_one_is_gone() -> None:
    """On a GPU there is not room for both."""
    pair = make_pair(TableModel(97, 1), max_context=8 * BLOCK)
    generator = Generator(pair, GenerationConfig(4, verify="full", draft="none"))
    generator.generate([5, 6, 7])
    (kept,) = generator._prefixes._kept
    old, make, alive = weakref.ref(kept.cache), pair.primary.new_cache, list[bool]()
    del kept

    def new_cache(capacity: int) -> Any:
        gc.collect()
        alive.append(old() is not None)
        return make(capacity)

    pair.primary.new_cache = new_cache  # type: ignore[method-assign]
    generator.generate([5, 6, 7] * BLOCK)
    assert alive == [False]


def test_what_cannot_roll_back_is_not_kept() -> None:
    kept = prefixes(3, rolls_back=False)
    assert [use(kept, TALK, [50] * 4) for _ in range(2)] == [0, 0]


@pytest.mark.parametrize("passes", [1, 2, 3, 4])
def test_a_prompt_that_is_stopped_keeps_what_was_passed(passes: int) -> None:
    pair = make_pair(TableModel(97, 1), max_context=4096)
    generator = Generator(pair, GenerationConfig(8, "full", "none"))
    left = passes

    def before_pass() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Stopped

    prompt = [token % 97 for token in range(1300)]
    with pytest.raises(Stopped):
        list(generator.stream(prompt, answering=Answering(before_pass=before_pass)))
    again = generator.generate(prompt)
    assert again.stats.cached_tokens == min(512 * passes, 1299)
    assert again.token_ids == Generator(pair, GenerationConfig(8, "full", "none")).generate(prompt).token_ids
