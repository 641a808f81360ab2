"""Make the trace of a generated answer: its tokens, and which model or drafter made each."""

from quasar_core.config import GenerationConfig
from quasar_core.decode.text import token_texts
from quasar_core.models.pair import Pair
from quasar_core.records import GenerationResult
from quasar_core.trace import Trace, refused_ids, show


def trace_of(pair: Pair, config: GenerationConfig, result: GenerationResult, prompt: str) -> Trace:
    """The trace of a result, for the prompt's text."""
    pieces = token_texts(pair.tokenizer, result.token_ids)
    return Trace(
        model=pair.target_name,
        verifier=pair.verifier_name,
        verify=config.verify,
        draft=config.draft,
        prompt=prompt,
        tokens=show(pieces, result.stats, refused_texts(pair, result), config.draft),
        stats=result.stats,
    )


def refused_texts(pair: Pair, result: GenerationResult) -> list[str]:
    """The texts of the tokens that confirms refused, in order."""
    return [str(pair.tokenizer.decode([token])) for token in refused_ids(result.stats)]
