"""A pair as a model of lm-evaluation-harness, in each mode: `python -m quasar_core.harness --model quasar …`.

The command line is that of `lm_eval`, where `--model_args` are the fields of `LoadOptions` and `GenerationConfig`:

    python -m quasar_core.harness --model quasar --model_args model=demo,verify=quantized --tasks gsm8k

So the lossy modes are judged by the field's own tool. A log-likelihood is that of the model whose word is final: the
target's in `full` and `exact`, which therefore score alike; in `quantized` the verifier's behind a prompt that the
target has run, as it generates.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from quasar_core.api.decoding import Generator, load
from quasar_core.config import GenerationConfig, LoadOptions, SamplingConfig
from quasar_core.decode.text import render
from quasar_core.errors import UsageError
from quasar_core.models.base import CausalLM, KVCache
from quasar_core.models.pair import Pair
from quasar_core.models.rope import begin_text

NEW_TOKENS = 256  # where a task names no length, as the harness's own models
CHUNK = 64  # tokens of a pass whose logits are all needed
SAMPLING = ("temperature", "top_k", "top_p", "min_p")
# Of a harness's own making, which a pair has no use for, or reads elsewhere.
_LEFT_OUT = ("until", "max_gen_toks", "max_new_tokens", "do_sample", "seed", *SAMPLING)


@register_model("quasar")
class QuasarLM(TemplateLM):  # type: ignore[misc]  # its types are not known where the harness is not installed
    """Scores and generates with one pair in one mode."""

    def __init__(
        self, model: str | None = None, batch_size: Any = 1, device: str | None = None, **options: Any
    ) -> None:
        """Load the pair. Raises UsageError for a batch of several, and for options that there are not."""
        super().__init__()
        if str(batch_size) not in ("1", "auto"):
            raise UsageError(f"A pair answers one prompt at a time: --batch_size must be 1, not {batch_size}.")
        options.pop("max_batch_size", None)
        loading = {name: value for name, value in options.items() if name in LoadOptions.__dataclass_fields__}
        decoding = {name: value for name, value in options.items() if name in GenerationConfig.__dataclass_fields__}
        unknown = options.keys() - loading.keys() - decoding.keys()
        if unknown:
            raise UsageError(f"--model_args has {', '.join(sorted(unknown))}, which quasar does not know.")
        self.config = GenerationConfig(**decoding)
        place = device.partition(":")[0] if device == "cuda:0" and not torch.cuda.is_available() else device
        self.pair: Pair = load(LoadOptions(model=model, device=place or "auto", **loading))
        self._generators: dict[GenerationConfig, Generator] = {}

    @property
    def final(self) -> CausalLM:
        """The model whose word is final."""
        uses_verifier = self.config.verify == "quantized" and self.pair.verifier is not None
        return self.pair.verifier if uses_verifier and self.pair.verifier else self.pair.primary

    @property
    def tokenizer_name(self) -> str:
        """The name by which the harness tells its caches apart."""
        return self.pair.target_name.replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """A token that ends a text, which also stands before one that has no context."""
        own = self.pair.tokenizer.eos_token_id
        return int(own if isinstance(own, int) else min(self.pair.eos_ids))

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        own = self.pair.tokenizer.bos_token_id
        return int(own) if isinstance(own, int) else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """The tokens of a text; the tokenizer's own begin it, unless they stand there already."""
        if add_special_tokens is None:
            begin = self.pair.tokenizer.bos_token
            add_special_tokens = not (isinstance(begin, str) and string.startswith(begin))
        return list(self.pair.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation."""
        return render(self.pair.tokenizer, chat_history, add_generation_prompt=add_generation_prompt)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        """Each continuation's sum of log-probabilities, and whether greedy decoding writes it."""
        return [self.score(context, continuation) for _, context, continuation in requests]

    def score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """The log-probability of a continuation, and whether it is the greedy one.

        A context that is too long loses its beginning.
        """
        room = self.pair.max_context - len(continuation) + 1
        if room < 1:
            raise UsageError(f"A continuation has {len(continuation)} tokens: {self.pair.context_words} holds fewer.")
        kept = list(context)[-room:]
        cache = self.pair.new_cache(len(kept) + len(continuation))
        begin_text(cache, len(kept), 0)
        logits = _passed(self.pair.primary, kept, cache)[-1:]
        if len(continuation) > 1:
            logits = torch.cat([logits, _passed(self.final, continuation[:-1], cache)])
        wanted = torch.tensor(list(continuation), device=logits.device)
        chosen = logits.log_softmax(-1).gather(1, wanted[:, None])
        return float(chosen.sum()), bool((logits.argmax(-1) == wanted).all())

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, in windows of the model's context."""
        totals = []
        for request in requests:
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.pair.max_context, 1)
            totals.append(sum(self.score(*make_disjoint_window(window))[0] for window in windows))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text behind each context, up to the first of its stop strings."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        config = self._config_of(options)
        generator = self._generators.setdefault(config, Generator(self.pair, config))
        tokens = self.tok_encode(context)
        room = max(self.pair.max_context - config.max_new_tokens, 1)
        return generator.generate(tokens[-room:]).text

    def _config_of(self, options: dict[str, Any]) -> GenerationConfig:
        """What a task asks for, over what the model was given; UsageError for what it cannot be given."""
        unknown = options.keys() - set(_LEFT_OUT)
        if unknown:
            raise UsageError(f"The task asks for {', '.join(sorted(unknown))}, which quasar does not know.")
        until = options.get("until") or ()
        stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
        sampled = {name: options[name] for name in SAMPLING if options.get(name) is not None}
        if not options.get("do_sample", sampled.get("temperature", 0) > 0):
            sampled = {}
        length = options.get("max_gen_toks") or options.get("max_new_tokens") or NEW_TOKENS
        given = {name: getattr(self.config, name) for name in GenerationConfig.__dataclass_fields__}
        sampling = SamplingConfig(**sampled, seed=self.config.sampling.seed)
        return GenerationConfig(**{**given, "max_new_tokens": int(length), "stop": stop, "sampling": sampling})


def _passed(model: CausalLM, tokens: Sequence[int], cache: KVCache) -> torch.Tensor:
    """The logits [T, V] of passes over all tokens."""
    parts = [model.forward(tokens[at : at + CHUNK], cache) for at in range(0, len(tokens), CHUNK)]
    return torch.cat(parts)


def main() -> None:
    """The harness's own command line, with this model known to it."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
