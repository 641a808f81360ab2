"""Where an answer ends and which of its tokens are text: fields that vLLM has beside OpenAI's."""

from quasar_core.decode.text import Reading
from quasar_core.serve.errors import refused
from quasar_core.serve.fields import Fields
from quasar_core.serve.served import Served

MOST_ENDS = 64  # tokens of `stop_token_ids`


def read_ends(fields: Fields, served: Served) -> frozenset[int]:
    """The tokens that end an answer: the model's own, unless `ignore_eos` leaves them out, and `stop_token_ids`."""
    given, rows = fields.take("stop_token_ids", []), served.pair.primary.vocab_size
    if not isinstance(given, list) or len(given) > MOST_ENDS:
        raise refused(f"stop_token_ids must be a list of at most {MOST_ENDS} tokens.", "stop_token_ids")
    for token in given:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < rows:
            raise refused(f"stop_token_ids must be tokens from 0 to {rows - 1}.", "stop_token_ids")
    ignores = fields.flag("ignore_eos", served.settings.defaults.ignore_eos)
    return frozenset(given) | (frozenset() if ignores else served.pair.eos_ids)


def read_reading(fields: Fields, most_tokens: int) -> Reading:
    """`min_tokens`, `skip_special_tokens` and `include_stop_str_in_output`."""
    least = fields.whole("min_tokens", 0) or 0
    if least > most_tokens:
        raise refused(f"min_tokens is {least}, and the answer has at most {most_tokens} tokens.", "min_tokens")
    skips = fields.flag("skip_special_tokens", True)
    return Reading(special=not skips, keeps_stop=fields.flag("include_stop_str_in_output"), least=least)
