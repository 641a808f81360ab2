"""Run the target as transformers' own `generate` does, plain and with prompt lookup, as arms of a bench."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from quasar_core.config import GenerationConfig, Request
from quasar_core.decode.processors import OPTIONS
from quasar_core.errors import UsageError
from quasar_core.models.hf.causal_lm import load_target
from quasar_core.models.pair import Pair
from quasar_core.records import FinishReason, GenerationResult, Stats, Step

PROMPT_LOOKUP_TOKENS = 10  # as transformers' documentation advises


class TransformersPeer:
    """Answers as `decode.generator.Generator` does, by `generate` of a transformers model loaded beside the pair.

    A step is a forward pass after the prompt's. UsageError where the target's folder is not known.
    """

    def __init__(self, pair: Pair, config: GenerationConfig) -> None:
        if pair.target_folder is None:
            raise UsageError("The arm transformers needs the target's files.")
        self.pair, self.config = pair, config
        self.model: Any = load_target(pair.target_folder, pair.device, pair.dtype).model
        self._leave_out_processors()
        self._passes = 0
        self.model.register_forward_hook(self._count)

    def _leave_out_processors(self) -> None:
        """Of the model's own, which `generate` applies: all, as asked, or those of an end of text that is ignored."""
        for name in self.pair.processors:
            if not self.config.processors or (self.config.ignore_eos and OPTIONS[name].needs_eos):
                setattr(self.model.generation_config, name, None)

    def reset(self) -> None:
        """Nothing is kept between answers."""

    def generate(
        self,
        prompt_ids: Sequence[int],
        on_text: Callable[[str], None] | None = None,
        request: Request | None = None,
    ) -> GenerationResult:
        """One answer; the text comes whole at the end."""
        request = request or self.config.request
        start = time.perf_counter()
        self._passes = 0
        torch.manual_seed(request.seed)
        room = min(request.max_new_tokens, self.pair.max_context - len(prompt_ids))
        ids = torch.tensor([list(prompt_ids)], device=self.pair.device)
        arrival = _FirstToken()
        with torch.inference_mode():
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=room,
                stopping_criteria=StoppingCriteriaList([arrival]),
                **self._options(),
            )
        end = time.perf_counter()
        new = output[0, len(prompt_ids) :].tolist()
        text = str(self.pair.tokenizer.decode(new, skip_special_tokens=True))
        if on_text:
            on_text(text)
        reason: FinishReason = "eos" if new and new[-1] in self._eos_ids() else "length"
        stats = Stats(
            new_tokens=len(new),
            prompt_tokens=len(prompt_ids),
            prefill_tokens=arrival.length - len(prompt_ids),
            step_log=[Step(0, 0)] * (self._passes - 1),  # of a pass it is known that it ran, not what it drafted
            prefill_s=arrival.time - start,
            decode_s=end - arrival.time,
            ttft_s=arrival.time - start,
        )
        return GenerationResult(list(prompt_ids), new, text, reason, stats)

    def _options(self) -> dict[str, Any]:
        sampling = self.config.sampling
        never = self.pair.primary.vocab_size  # older versions cannot do without a token that ends
        options: dict[str, Any] = {"do_sample": not sampling.greedy, "eos_token_id": sorted(self._eos_ids()) or [never]}
        if not sampling.greedy:
            options |= {"temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
        if self.config.draft == "ngram":
            options["prompt_lookup_num_tokens"] = PROMPT_LOOKUP_TOKENS
        return options

    def _eos_ids(self) -> frozenset[int]:
        return frozenset() if self.config.ignore_eos else self.pair.eos_ids

    def _count(self, *_: Any) -> None:
        self._passes += 1


class _FirstToken(StoppingCriteria):
    """Stops nothing; remembers when the first pass was done, and the tokens that there were then."""

    time, length = 0.0, 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        if not self.length:
            self.time, self.length = time.perf_counter(), input_ids.shape[1]
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
