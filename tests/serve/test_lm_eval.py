"""lm-eval's `local-completions`: log-likelihoods through the server are transformers' own."""

from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'lm-eval[api]'")

from helpers.serving import DEMO, FIXED, demo_pair, plain, serving

PAIRS = [
    ("def count_lines(path):\n    return", " len(lines)"),
    ("def count_lines(path):\n    return", " None"),
    ("import", " os\nimport sys"),
    ("Write a function `f`.", " x"),
]


def reference(context: str, continuation: str) -> tuple[float, bool]:
    """Log-likelihood of the continuation, and whether it is the greedy one, by one pass of transformers' model."""
    pair: Any = demo_pair()
    whole, begin = pair.tokenizer(context + continuation)["input_ids"], len(pair.tokenizer(context)["input_ids"])
    logprobs = pair.target.forward(whole, pair.new_cache(len(whole))).log_softmax(-1)
    rows = [(logprobs[i - 1], whole[i]) for i in range(begin, len(whole))]
    return sum(float(row[token]) for row, token in rows), all(int(row.argmax()) == token for row, token in rows)


@pytest.mark.parametrize("token_ids", [True, False])
def test_log_likelihoods_are_transformers_own(token_ids: bool) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    with serving(demo_pair()) as server:
        lm = LocalCompletionsAPI(
            base_url=f"{server.url}/v1/completions",
            model="demo",
            tokenizer=str(DEMO),
            tokenizer_backend="huggingface",
            tokenized_requests=token_ids,
            num_concurrent=1,
        )
        asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(PAIRS)]
        found = lm.loglikelihood(asked, disable_tqdm=True)
        until = {"until": ["\n\n"], "max_gen_toks": 12, "temperature": 0}
        written = lm.generate_until([Instance("generate_until", {}, ("def count", until), 0)], disable_tqdm=True)
    for (logprob, greedy), pair in zip(found, PAIRS, strict=True):
        wanted, is_greedy = reference(*pair)
        assert logprob == pytest.approx(wanted, abs=1e-3)
        assert greedy == is_greedy
    from quasar_core.decode.generator import Generator

    pair = demo_pair()
    ids = pair.tokenizer("def count")["input_ids"]
    assert written == [Generator(pair, plain(FIXED, max_new_tokens=12, stop=("\n\n",))).generate(ids).text]
