"""openai-python against a real server: what is answered is what the library generates."""

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette")
openai = pytest.importorskip("openai")

from helpers.serving import FIXED, LINES, QUESTION, demo_pair, plain, serving  # noqa: E402

from quasar_core.config import SamplingConfig  # noqa: E402
from quasar_core.decode.generator import Generator  # noqa: E402
from quasar_core.decode.text import encode_prompt  # noqa: E402

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "lines": {"type": "integer", "minimum": 0, "maximum": 999},
        "kind": {"enum": ["text", "code"]},
    },
    "required": ["name", "lines", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    with serving(demo_pair()) as running:
        yield running


@pytest.fixture(scope="module")
def api(server: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as api:
        yield api


def expected(count: int = 40, **options: Any) -> Any:
    """The library's own answer, by plain decoding."""
    pair = demo_pair()
    return Generator(pair, plain(FIXED, max_new_tokens=count, **options)).generate(encode_prompt(pair.tokenizer, LINES))


def ask(api: Any, **options: Any) -> Any:
    return api.chat.completions.create(**{"model": "demo", "messages": LINES, "max_tokens": 40, **options})


def test_the_model_is_listed_and_any_other_is_refused(api: Any) -> None:
    assert [model.id for model in api.models.list()] == ["demo"]
    assert api.models.retrieve("demo").owned_by == "quasar"
    with pytest.raises(openai.NotFoundError, match="demo is"):
        ask(api, model="/etc/passwd")


def test_an_answer_is_plain_decodings_own_whole_and_streamed(api: Any) -> None:
    wanted = expected()
    whole = ask(api)
    assert whole.choices[0].message.content == wanted.text
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 40
    assert whole.usage.total_tokens == len(wanted.prompt_token_ids) + 40
    assert whole.timings["draft_n"] >= whole.timings["draft_n_accepted"] >= 0
    assert whole.quasar["lossless"]
    for mode in ({"verify": "full"}, {"draft": "none"}, {"verify": "full", "draft": "none"}):
        assert ask(api, extra_body=mode).choices[0].message.content == wanted.text
    chunks = list(ask(api, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted.text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert all(chunk.usage is None for chunk in chunks)


def test_the_usage_comes_in_a_chunk_without_choices_where_it_is_asked_for(api: Any) -> None:
    chunks = list(ask(api, stream=True, stream_options={"include_usage": True}, max_tokens=5))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 5
    assert all(chunk.usage is None and chunk.choices for chunk in chunks[:-1])


def test_stop_texts_end_an_answer_before_them(api: Any) -> None:
    text = expected().text
    stop = text[20:24]
    for given in (stop, ["never", stop]):
        choice = ask(api, stop=given).choices[0]
        assert choice.message.content == text[: text.index(stop)]
        assert choice.finish_reason == "stop"


def test_a_seed_fixes_a_sampled_answer_and_choices_differ(api: Any) -> None:
    options: Any = {"temperature": 1.2, "seed": 11, "top_p": 0.95, "max_tokens": 24, "extra_body": {"top_k": 50}}
    first, again = ask(api, n=3, **options), ask(api, n=3, **options)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert first.usage.completion_tokens <= 3 * 24
    assert first.usage.prompt_tokens == again.usage.prompt_tokens == len(expected(1).prompt_token_ids)
    unseeded = {ask(api, temperature=1.5, max_tokens=24).choices[0].message.content for _ in range(4)}
    assert len(unseeded) > 1


def test_a_sampled_answer_is_the_librarys(api: Any) -> None:
    sampling = SamplingConfig(temperature=0.8, seed=5)
    wanted = expected(sampling=sampling)
    options = {"verify": "full", "draft": "none"}
    assert ask(api, temperature=0.8, seed=5, extra_body=options).choices[0].message.content == wanted.text


def test_parts_and_both_names_of_the_length(api: Any) -> None:
    parts = [{"type": "text", "text": QUESTION[:10]}, {"type": "text", "text": QUESTION[10:]}]
    reply = ask(api, messages=[{"role": "user", "content": parts}], max_tokens=openai.omit, max_completion_tokens=12)
    assert reply.choices[0].message.content == expected(12).text
    assert reply.usage.completion_tokens == 12


def test_log_probabilities_are_the_targets_in_every_mode(api: Any) -> None:
    import torch

    wanted = expected(16)
    pair = demo_pair()
    ids = [*wanted.prompt_token_ids, *wanted.token_ids]
    logits = pair.primary.forward(ids, pair.new_cache(len(ids)))[len(wanted.prompt_token_ids) - 1 : -1]
    logprobs = logits.log_softmax(-1)
    for mode in ({}, {"verify": "full"}):
        reply = ask(api, max_tokens=16, logprobs=True, top_logprobs=3, extra_body=mode)
        found = reply.choices[0].logprobs.content
        assert [entry.token for entry in found] == [pair.tokenizer.decode([token]) for token in wanted.token_ids]
        own = [float(row[token]) for row, token in zip(logprobs, wanted.token_ids, strict=True)]
        assert [entry.logprob for entry in found] == pytest.approx(own, abs=1e-3)
        for entry, row in zip(found, logprobs, strict=True):
            best = [float(value) for value in torch.topk(row, 3).values]
            assert [other.logprob for other in entry.top_logprobs] == pytest.approx(best, abs=1e-3)
        chunks = list(ask(api, max_tokens=16, logprobs=True, stream=True, extra_body=mode))
        streamed = [e for chunk in chunks if chunk.choices[0].logprobs for e in chunk.choices[0].logprobs.content]
        assert [entry.logprob for entry in streamed] == pytest.approx(own, abs=1e-3)


def test_json_by_a_schema_is_the_plain_constrained_text_in_every_mode(api: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "found", "schema": SCHEMA, "strict": True}}
    pairs = itertools.product(("full", "exact", "quantized"), ("none", "ngram"))
    modes = [{"verify": verify, "draft": draft} for verify, draft in pairs]
    replies = [ask(api, response_format=form, max_tokens=80, extra_body=mode) for mode in modes]
    texts = [reply.choices[0].message.content for reply in replies]
    for text in texts:
        value = json.loads(text)
        assert set(value) == set(SCHEMA["required"])
        assert value["kind"] in ("text", "code")
    assert texts[0] == texts[1] == texts[2] == texts[3]
    assert texts[4] == texts[5]
    assert all(reply.choices[0].finish_reason == "stop" for reply in replies)
    sampled = [ask(api, response_format=form, max_tokens=80, temperature=1.5, seed=seed) for seed in range(4)]
    assert all(set(json.loads(reply.choices[0].message.content)) == set(SCHEMA["required"]) for reply in sampled)
    any_object = ask(api, response_format={"type": "json_object"}, max_tokens=60)
    assert any_object.choices[0].message.content.startswith("{")


def test_penalties_and_biases_change_the_text_alike_in_every_mode(api: Any) -> None:
    plain_text = expected().text
    for option in ({"frequency_penalty": 1.5}, {"presence_penalty": 2.0}, {"logit_bias": {"100": 30}}):
        replies = [ask(api, extra_body={"verify": mode}, **option) for mode in ("full", "exact")]
        texts = [reply.choices[0].message.content for reply in replies]
        assert texts[0] == texts[1] != plain_text


def test_a_prediction_is_a_draft_and_counted(api: Any) -> None:
    """The crude copy of these tests refuses much of it in exact; the text is the same."""
    wanted = expected()
    given = {"type": "content", "content": wanted.text}
    assert ask(api, prediction=given).choices[0].message.content == wanted.text
    reply = ask(api, prediction=given, extra_body={"verify": "full"})
    assert reply.choices[0].message.content == wanted.text
    details = reply.usage.completion_tokens_details
    assert details.rejected_prediction_tokens == 0
    assert 0 < details.accepted_prediction_tokens <= reply.timings["draft_n_accepted"]  # as many as measured costs let
    assert ask(api).usage.completion_tokens_details.accepted_prediction_tokens is None


def test_completions_take_texts_lists_and_token_ids(api: Any) -> None:
    pair = demo_pair()
    ids = pair.tokenizer("def count")["input_ids"]
    texts = [api.completions.create(model="demo", prompt=prompt, max_tokens=8).choices for prompt in ("def count", ids)]
    assert texts[0][0].text == texts[1][0].text == Generator(pair, plain(FIXED, max_new_tokens=8)).generate(ids).text
    several = api.completions.create(model="demo", prompt=["def count", "import"], max_tokens=4, n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text == texts[0][0].text[: len(several.choices[0].text)]
    streamed = list(api.completions.create(model="demo", prompt="def count", max_tokens=8, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == texts[0][0].text
    assert streamed[-1].choices[0].finish_reason == "length"


def test_an_echoed_prompt_has_its_own_log_probabilities(api: Any) -> None:
    pair = demo_pair()
    text = "def count_lines(path):\n    return"
    ids = pair.tokenizer(text)["input_ids"]
    logprobs = pair.primary.forward(ids, pair.new_cache(len(ids))).log_softmax(-1)
    own = [float(logprobs[i - 1, ids[i]]) for i in range(1, len(ids))]
    for tokens in (0, 1):
        choice = api.completions.create(model="demo", prompt=ids, max_tokens=tokens, echo=True, logprobs=1).choices[0]
        found = choice.logprobs
        assert choice.text.startswith(text)
        assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(ids) + tokens
        assert found.token_logprobs[0] is None
        assert found.token_logprobs[1 : len(ids)] == pytest.approx(own, abs=1e-3)
        best = [float(row.max()) for row in logprobs[: len(ids) - 1]]
        assert [max(top.values()) for top in found.top_logprobs[1 : len(ids)]] == pytest.approx(best, abs=1e-3)
        assert found.text_offset[:3] == [0, len(found.tokens[0]), len(found.tokens[0]) + len(found.tokens[1])]
