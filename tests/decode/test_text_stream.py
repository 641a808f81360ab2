"""Streaming: whole characters only, stop strings held back, and pieces that join to the final text."""

import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from quasar_core.decode.text import BROKEN, Reading, TextStream
from tools.demo.tokenizer import TURN_END, train_tokenizer

TEXT = "def größe(x):\n    return 'naïve 日本語 😀👩‍👩‍👧' + x\n"


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """Merges from ASCII text only: every other character is split over tokens of one byte."""
    return train_tokenizer(["def size(x):\n    return x + 1\n"] * 8, 280)


@cache
def with_byte_fallback() -> PreTrainedTokenizerFast:
    """In the style of Llama 2: words begin with ▁, the first one's space is stripped, unknown characters are bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁the", "▁wor", "ld", "é"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def stream(
    tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int], stop: tuple[str, ...] = ()
) -> tuple[list[str], str, int]:
    """The pieces handed on, the final text, and how many tokens were taken before a stop string."""
    pieces: list[str] = []
    text = TextStream(tokenizer, stop)
    taken = 0
    for token in tokens:
        taken += 1
        pieces.append(text.add(token))
        if text.stopped:
            break
    pieces.append(text.finish())
    return [piece for piece in pieces if piece], text.text, taken


def ids_of(text: str) -> list[int]:
    return list(byte_level()(text)["input_ids"])


def test_characters_split_over_tokens_come_whole() -> None:
    tokens = ids_of(TEXT)
    pieces, text, _ = stream(byte_level(), tokens)
    assert len(tokens) > len(TEXT)
    assert text == TEXT
    assert "".join(pieces) == TEXT
    assert not any(BROKEN in piece for piece in pieces)
    assert len(pieces) > 20


def test_text_is_handed_on_as_soon_as_it_is_whole() -> None:
    text = TextStream(byte_level(), ())
    seen = []
    for token in ids_of("x日"):
        text.add(token)
        seen.append(text.text)
    assert seen == ["x", "x", "x", "x日"]


def test_bytes_that_never_become_a_character_are_left_out() -> None:
    pieces, text, _ = stream(byte_level(), ids_of("a日")[:-1])
    assert text == "a"
    assert pieces == ["a"]


def test_a_broken_character_in_the_middle_does_not_end_the_text() -> None:
    tokens = ids_of("日")[:1] + ids_of("abc")
    assert stream(byte_level(), tokens)[1] == f"{BROKEN}abc"


def test_the_space_before_a_word_survives() -> None:
    ids = with_byte_fallback().convert_tokens_to_ids(["▁the", "▁wor", "ld", "▁the"])
    assert stream(with_byte_fallback(), ids) == (["the", " wor", "ld", " the"], "the world the", 4)


def test_special_tokens_have_no_text() -> None:
    end = byte_level().convert_tokens_to_ids(TURN_END)
    assert stream(byte_level(), [*ids_of("a"), end, *ids_of("b")])[:2] == (["a", "b"], "ab")


@pytest.mark.parametrize("make", [byte_level, with_byte_fallback])
def test_random_tokens_never_fail(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer, luck = make(), random.Random(0)
    for _ in range(100):
        tokens = [luck.randrange(3, len(tokenizer)) for _ in range(25)]
        pieces, text, _ = stream(tokenizer, tokens)
        assert "".join(pieces) == text
        assert not text.endswith(BROKEN)


def test_random_bytes_read_as_the_tokenizer_decodes_them() -> None:
    tokenizer, luck = byte_level(), random.Random(1)
    for _ in range(100):
        tokens = [*(luck.randrange(3, len(tokenizer)) for _ in range(25)), *ids_of("end")]
        assert stream(tokenizer, tokens)[1] == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_stop_string_is_cut_and_never_shown() -> None:
    pieces, text, taken = stream(byte_level(), ids_of("one STOP two"), stop=("STOP",))
    assert text == "one "
    assert "".join(pieces) == "one "
    assert taken == len(ids_of("one STOP"))


def test_what_may_become_a_stop_string_waits_and_then_comes() -> None:
    text = TextStream(byte_level(), ("##END",))
    shown = []
    for token in ids_of("a##b#"):
        text.add(token)
        shown.append(text.text)
    assert shown[-1] == "a##b"
    assert not any(s.endswith("#") for s in shown)
    assert text.finish() == "#"
    assert text.text == "a##b#"


def test_of_several_stop_strings_the_first_in_the_text_counts() -> None:
    assert stream(byte_level(), ids_of("a b c d"), stop=("c", "b c"))[1] == "a "


@pytest.mark.parametrize("stop", ["日本", "本語 ", "'naïve", "return '"])
def test_a_stop_string_of_any_characters_ends_the_text(stop: str) -> None:
    assert stream(byte_level(), ids_of(TEXT), stop=(stop,))[1] == TEXT[: TEXT.index(stop)]


END = byte_level().convert_tokens_to_ids(TURN_END)


@pytest.mark.parametrize(
    ("stop", "tokens", "text", "taken"),
    [
        ((TURN_END,), [*ids_of("ab"), END, *ids_of("c")], "ab", 3),
        ((f"b{TURN_END}",), [*ids_of("a"), END, *ids_of("b"), END, *ids_of("c")], "a", 4),
        ((f"{TURN_END}\n",), [*ids_of("a"), END, *ids_of("b"), END, *ids_of("\n"), *ids_of("c")], "ab", 5),
        (("d", TURN_END), [*ids_of("a"), END], "a", 2),
        ((f"{TURN_END}{TURN_END}",), [*ids_of("a"), END, *ids_of("b"), END, END], "ab", 5),
    ],
)
def test_a_stop_string_of_special_tokens_ends_the_text(
    stop: tuple[str, ...], tokens: list[int], text: str, taken: int
) -> None:
    pieces, whole, count = stream(byte_level(), tokens, stop)
    assert (whole, count) == (text, taken)
    assert "".join(pieces) == text


def test_special_tokens_that_no_stop_string_names_still_have_no_text() -> None:
    tokens = [*ids_of("a"), END, *ids_of("b")]
    assert stream(byte_level(), tokens, stop=("ab",))[1] == ""  # the text as it is shown
    assert stream(byte_level(), tokens, stop=(f"{TURN_END}never",))[1] == "ab"


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"\x90G", f"{BROKEN}G"),
        (b"K\x9e2", f"K{BROKEN}2"),
        (b"\xcf\x9b\xf4", "\u03db"),
        ("日本".encode(), "日本"),
        (b"\xe6\x97A", f"{BROKEN}A"),
    ],
)
def test_a_stray_byte_is_one_replacement_mark(raw: bytes, text: str) -> None:
    """Tokens of bytes read as Python decodes the bytes, whatever stands beside them."""
    tokens = with_byte_fallback().convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in raw])
    assert stream(with_byte_fallback(), tokens)[1] == text  # broken bytes at the end are left out
    word = with_byte_fallback().convert_tokens_to_ids(["▁the"])
    expected = raw.decode(errors="replace")
    assert stream(with_byte_fallback(), word + tokens + word)[1] == f"the{expected} the"


def test_random_bytes_by_name_read_as_python_decodes_them() -> None:
    luck = random.Random(2)
    for _ in range(200):
        raw = bytes(luck.choice((0x41, 0xE6, 0x97, 0xA5, 0xC3, 0x80, 0xF4)) for _ in range(8))
        tokens = with_byte_fallback().convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in raw] + ["a"])
        assert stream(with_byte_fallback(), tokens)[1] == raw.decode(errors="replace") + "a"


def test_a_token_that_only_looks_like_a_byte_is_text() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<0x41>": 0, "b": 1}, "b")))
    assert stream(tokenizer, [0, 1])[1] == "<0x41> b"


class InPython(PreTrainedTokenizer):
    """A tokenizer without a backend of its own: a token is a character, `<end>` a special one."""

    def __init__(self, **options: Any) -> None:
        self.letters = {letter: number for number, letter in enumerate("abc ")}
        super().__init__(eos_token="<end>", **options)

    @property
    def vocab_size(self) -> int:
        return len(self.letters)

    def get_vocab(self) -> dict[str, int]:
        return {**self.letters, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.letters[token]

    def _convert_id_to_token(self, index: int) -> str:
        return "abc "[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def test_a_tokenizer_in_python_decodes_too() -> None:
    tokenizer: Any = InPython()
    tokens = [*tokenizer("a bca")["input_ids"], tokenizer.eos_token_id, *tokenizer("b")["input_ids"]]
    assert stream(tokenizer, tokens)[1] == "a bcab"
    assert stream(tokenizer, tokens, stop=("<end>",))[1] == "a bca"


WORDS = st.lists(st.sampled_from([*"abc", " a", "ab\n"]), max_size=14)


@given(
    WORDS,
    st.lists(st.sampled_from(["a", "ab", "ca", "b a", "\na"]), max_size=2, unique=True),
    st.integers(0, 6),
    st.booleans(),
)
def test_stops_behind_the_fewest_tokens_and_in_the_text(
    words: list[str], stop: list[str], least: int, keeps: bool
) -> None:
    """The slow way: after each token beyond the fewest, whether a stop text ends within what that token brought."""
    tokens = [token for word in words for token in ids_of(word)]
    stream, written = TextStream(byte_level(), tuple(stop), Reading(keeps_stop=keeps, least=least)), ""
    for number, token in enumerate(tokens):
        before, written = written, written + byte_level().decode([token])
        stream.add(token)
        found = [(at, len(s)) for s in stop for at in places(written, s) if at + len(s) > len(before)]
        if number >= least and found:
            at, length = min(found)
            assert stream.stopped
            assert stream.text == written[: at + length * keeps]
            return
        assert not stream.stopped
    stream.finish()
    assert stream.text == written


def places(text: str, stop: str) -> list[int]:
    return [at for at in range(len(text)) if text.startswith(stop, at)]


@pytest.mark.parametrize("make", [byte_level, with_byte_fallback])
def test_with_special_tokens_it_is_what_the_tokenizer_decodes(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer, luck = make(), random.Random(2)
    special = tokenizer.all_special_ids
    words = [
        number for number in range(len(tokenizer)) if tokenizer.decode([number]).isascii() and number not in special
    ]
    for _ in range(100):
        tokens = [luck.choice(special if luck.random() < 0.2 else words) for _ in range(20)]
        stream = TextStream(tokenizer, (), Reading(special=True))
        pieces = [stream.add(token) for token in tokens]
        pieces.append(stream.finish())
        assert "".join(pieces) == stream.text == tokenizer.decode(tokens, skip_special_tokens=False)
