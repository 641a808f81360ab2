"""Every source of drafts, in every mode and window: greedy text is the target's own, and forgetting never drifts.

The model is a table, so that thousands of answers take seconds; `test_fuzz_generations.py` does the same with
decoders, in float32 and on the C++ pass.
"""

from collections.abc import Sequence

import pytest
from helpers.drafters import SOURCES, source_factory, spaced_words
from helpers.tiny_models import TableModel, make_pair
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_core.config import GenerationConfig
from quasar_core.decode.generator import Generator
from quasar_core.decode.logits.sampling import accept_matching

SIZE = 6
TARGET = TableModel(SIZE, seed=3)
VERIFIERS = {"good": TARGET.disturbed(0.2), "bad": TableModel(SIZE, seed=4)}
CASES = {
    "kind": st.sampled_from(SOURCES),
    "verify": st.sampled_from(["full", "exact", "exact", "quantized"]),
    "verifier": st.sampled_from(sorted(VERIFIERS)),
    "window": st.integers(1, 40),
    "drafts": st.integers(1, 20),
    "prompt": st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=20),
    "length": st.integers(1, 50),
    "seed": st.integers(0, 1000),
    "end": st.one_of(st.none(), st.integers(0, 49)),
    "stop": st.one_of(st.none(), st.integers(0, 49)),
}


def plainly(model: TableModel, prompt: Sequence[int], count: int) -> list[int]:
    """The prompt's last row is the target's; then one token after another by the model that decides."""
    text = [0, *prompt]
    for i in range(count):
        table = TARGET.table if i == 0 else model.table
        text.append(int(table[text[-2], text[-1]].argmax()))
    return text[1 + len(prompt) :]


def cut(text: list[int], ends: frozenset[int]) -> list[int]:
    """Up to the first token that ends a text, that one included."""
    place = next((i for i, token in enumerate(text) if token in ends), len(text))
    return text[: place + 1]


def check(
    kind: str,
    verify: str,
    verifier: str,
    window: int,
    drafts: int,
    prompt: list[int],
    length: int,
    seed: int,
    end: int | None,
    stop: int | None,
) -> None:
    deciding = VERIFIERS[verifier] if verify == "quantized" else TARGET
    expected = plainly(deciding, prompt, length)
    ends = frozenset() if end is None else frozenset([expected[end % length]])
    words = () if stop is None else (f"w{expected[stop % length]}",)
    expected = cut(cut(expected, ends), frozenset(int(word[1:]) for word in words))
    pair = make_pair(TARGET, VERIFIERS[verifier], eos_ids=ends)
    config = GenerationConfig(length, verify, num_draft_tokens=drafts, window=window, stop=words)  # type: ignore[arg-type]
    make = source_factory(kind, expected, seed, SIZE)
    result = Generator(pair, config, make).generate(prompt)
    assert list(result.token_ids) == expected


@given(**CASES)
@settings(deadline=None, derandomize=True, max_examples=300)
def test_greedy_text_is_plain_decodings(**case: object) -> None:
    check(**case)  # type: ignore[arg-type]


@pytest.mark.slow
@given(**CASES)
@settings(deadline=None, derandomize=True, max_examples=10_000)
def test_greedy_text_is_plain_decodings_ten_thousand_times(**case: object) -> None:
    check(**case)  # type: ignore[arg-type]


def test_a_pass_that_accepts_too_much_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The property above can fail."""

    def too_much(choices: Sequence[int], offered: Sequence[int]) -> tuple[int, int]:
        accepted, bonus = accept_matching(choices, offered)
        return (accepted + 1, choices[accepted + 1]) if accepted + 1 < len(choices) else (accepted, bonus)

    monkeypatch.setattr("quasar_core.decode.passes.accept_matching", too_much)
    with pytest.raises(AssertionError):
        check("auto", "full", "good", 4, 6, [1, 2, 3], 40, 0, None, None)


@pytest.mark.parametrize("draft", ["auto", "suffix"])
def test_answers_of_one_generator_stay_the_same_and_are_drafted_from(draft: str) -> None:
    """With `auto` the second answer to a prompt is drafted from the first."""
    pair = make_pair(TARGET, VERIFIERS["good"])
    generator = Generator(pair, GenerationConfig(40, "exact", draft, num_draft_tokens=4, window=4))
    first, second = generator.generate([1, 2]), generator.generate([1, 2])
    assert first.token_ids == second.token_ids == plainly(TARGET, [1, 2], 40)
    assert "memory" not in first.stats.drafters
    assert ("memory" in second.stats.drafters) == (draft == "auto")


def test_a_prediction_saves_passes() -> None:
    pair = make_pair(TARGET, tokenizer=spaced_words(SIZE))
    plain = Generator(pair, GenerationConfig(40, "full", "none")).generate([1, 2])
    config = GenerationConfig(40, "full", num_draft_tokens=8, prediction=plain.text)
    predicted = Generator(pair, config).generate([1, 2])
    assert predicted.token_ids == plain.token_ids
    assert predicted.stats.drafters["prediction"].accepted > 30
    assert predicted.stats.steps < 8
