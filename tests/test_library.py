"""The library's front: what it yields, returns and refuses, and what importing it costs."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from helpers.tiny_models import make_pair, quantized_copy, random_model

import quasar_core as quasar
from quasar_core import library
from quasar_core.models.pair import Pair

PROMPT = "w5"


def tiny_pair() -> Pair:
    return make_pair(random_model("llama"), quantized_copy("llama", 8))


def count_passes(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the target's passes, as they come."""
    passes: list[int] = []
    assert pair.target is not None
    forward = pair.target.forward

    def counted(tokens: Sequence[int], *arguments: object, **options: object) -> object:
        passes.append(len(tokens))
        return forward(tokens, *arguments, **options)

    monkeypatch.setattr(pair.target, "forward", counted)
    return passes


def test_importing_the_library_loads_no_torch() -> None:
    code = "import sys, quasar_core as q; q.__version__; q.UsageError; dir(q); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_everything_that_is_named_is_there() -> None:
    for name in quasar.__all__:
        assert getattr(quasar, name) is not None
    assert set(quasar.__all__) <= set(dir(quasar))
    assert quasar.load is library.load
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = quasar.nothing


def test_the_pieces_are_the_answer() -> None:
    pair = tiny_pair()
    result = quasar.generate(pair, PROMPT, max_new_tokens=12)
    pieces = list(quasar.stream(pair, PROMPT, max_new_tokens=12))
    assert len(pieces) > 3
    assert "".join(pieces) == result.text
    assert result.stats.new_tokens == len(result.token_ids) == 12


def test_a_stream_returns_the_result() -> None:
    kept: list[quasar.GenerationResult] = []

    def keeping() -> Iterator[str]:
        kept.append((yield from quasar.stream(tiny_pair(), PROMPT, max_new_tokens=4)))

    assert "".join(keeping()) == kept[0].text
    assert kept[0].finish_reason == "length"


def test_nothing_is_decoded_before_a_piece_is_asked_for_or_after_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = tiny_pair()
    options = {"verify": "full", "draft": "none", "max_new_tokens": 12}
    whole = quasar.generate(pair, PROMPT, **options)
    passes = count_passes(pair, monkeypatch)
    pieces = quasar.stream(pair, PROMPT, **options)
    assert passes == []
    first = next(pieces)
    assert 0 < len(passes) <= 2
    done = len(passes)
    pieces.close()
    assert len(passes) == done
    assert whole.text.startswith(first)
    assert quasar.generate(pair, PROMPT, **options).token_ids == whole.token_ids


@pytest.mark.parametrize("verify", ["full", "exact"])
def test_a_cache_goes_with_its_answer(verify: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when Python looks for what refers to itself: by then many may have gathered."""
    pair, caches = tiny_pair(), list[weakref.ref[Any]]()
    original = Pair.new_cache

    def watched(self: Pair, capacity: int) -> Any:
        cache = original(self, capacity)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(Pair, "new_cache", watched)
    gc.collect()
    gc.disable()
    try:
        quasar.generate(pair, "one two", raw=True, max_new_tokens=6, verify=verify)
        for _ in quasar.stream(pair, "one two", raw=True, max_new_tokens=6, verify=verify):
            pass
        quasar.stream(pair, "one two", raw=True, max_new_tokens=6, verify=verify).close()
        assert len(caches) >= 2
        assert not any(cache() for cache in caches)
    finally:
        gc.enable()


def test_two_streams_of_one_pair_take_turns() -> None:
    pair = tiny_pair()
    alone = [list(quasar.stream(pair, prompt, max_new_tokens=10)) for prompt in (PROMPT, "w9")]
    both = zip(*(quasar.stream(pair, prompt, max_new_tokens=10) for prompt in (PROMPT, "w9")), strict=False)
    first, second = zip(*both, strict=True)
    assert list(first) == alone[0][: len(first)]
    assert list(second) == alone[1][: len(second)]


def test_an_error_within_a_stream_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = tiny_pair()
    pieces = quasar.stream(pair, PROMPT, verify="full", draft="none", max_new_tokens=12)
    next(pieces)
    assert pair.target is not None

    def broken(*_: object, **__: object) -> object:
        raise quasar.QuasarError("The device is gone.")

    monkeypatch.setattr(pair.target, "forward", broken)
    monkeypatch.setattr(pair.target, "choose", broken)
    with pytest.raises(quasar.QuasarError, match="gone"):
        list(pieces)


def test_what_cannot_be_is_refused_by_the_call() -> None:
    pair = tiny_pair()
    with pytest.raises(TypeError, match=r"no option tokens; there are .*max_new_tokens.*temperature"):
        quasar.stream(pair, PROMPT, tokens=3)
    with pytest.raises(quasar.UsageError, match="--temperature must be from 0 to 100"):
        quasar.stream(pair, PROMPT, temperature=-1)
    with pytest.raises(quasar.UsageError, match="The prompt is empty"):
        quasar.stream(pair, "")
    with pytest.raises(quasar.UsageError, match="With raw, the prompt is a text"):
        quasar.stream(pair, [{"role": "user", "content": PROMPT}], raw=True)


def test_the_default_mode_is_the_best_promise_of_what_is_loaded() -> None:
    both = tiny_pair()
    target = make_pair(random_model("llama"))
    verifier = make_pair(None, quantized_copy("llama", 8))
    modes = [library.generation_config(pair).verify for pair in (both, target, verifier)]
    assert modes == ["exact", "full", "quantized"]
    assert library.generation_config(both, verify="quantized").verify == "quantized"


def test_options_reach_the_config() -> None:
    config = library.generation_config(tiny_pair(), temperature=0.5, seed=3, window=8, stop="\n\n")
    assert (config.sampling.temperature, config.sampling.seed, config.window) == (0.5, 3, 8)
    assert config.stop == ("\n\n",)
    assert library.generation_config(tiny_pair(), stop=["a", "b"]).stop == ("a", "b")


def test_a_fraction_of_bits_is_widths_by_layer() -> None:
    config = library.QuantizeConfig.of(bits=4.25, samples=16)
    assert (config.bits, config.mean_bits, config.samples) == (4, 4.25, 16)
    assert library.QuantizeConfig.of(method="w8a8").bits == 8


@pytest.mark.parametrize("bits", ["best", "4.5", ""])
def test_bits_are_a_number_or_auto(bits: str) -> None:
    with pytest.raises(quasar.UsageError, match="--bits must be auto or a number"):
        quasar.quantize_model("demo", bits=bits)
