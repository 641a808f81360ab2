"""A peer's process: transformers' `generate`, plain, with prompt lookup, or with an assistant model."""

import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from quasar_core.bench.peers.talk import Ask, Told, peak_memory, serve
from quasar_core.decode.logits.processors import OPTIONS
from quasar_core.models.hf.causal_lm import load_target

PROMPT_LOOKUP_TOKENS = 10  # as transformers' documentation advises
# What a model's files say of sampling is left out, as in our own arms. (None would stand for what they say.)
_OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}


class TransformersPeer:
    """Answers by `generate` of a model of its own. A step is a forward pass of it after the prompt's.

    `settings` name the folder, device, dtype, threads, end-of-text tokens, room, the way of drafting, the assistant,
    and the logits processors to leave out.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        if settings["threads"]:
            torch.set_num_threads(settings["threads"])
        self.device, dtype = torch.device(settings["device"]), getattr(torch, settings["dtype"])
        self.model: Any = load_target(Path(settings["folder"]), self.device, dtype).model
        self.assistant = self._load_assistant(dtype)
        for name in settings["left_out"]:
            setattr(self.model.generation_config, name, None)
        self._passes = 0
        self.model.register_forward_hook(self._count)

    def _load_assistant(self, dtype: torch.dtype) -> Any:
        folder = self.settings["assistant"]
        if folder is None:
            return None
        assistant: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return assistant.to(self.device).eval()

    def answer(self, ask: Ask) -> Told:
        """One answer."""
        start = time.perf_counter()
        self._passes = 0
        torch.manual_seed(ask.seed)
        ids = torch.tensor([ask.prompt_ids], device=self.device)
        arrival = _FirstToken()
        with torch.inference_mode():
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=min(ask.max_new_tokens, self.settings["max_context"] - len(ask.prompt_ids)),
                stopping_criteria=StoppingCriteriaList([arrival]),
                **self._options(ask),
            )
        end = time.perf_counter()
        return Told(
            token_ids=output[0, len(ask.prompt_ids) :].tolist(),
            prefill_s=arrival.time - start,
            decode_s=end - arrival.time,
            passes=self._passes - 1,
            prefill_tokens=arrival.length - len(ask.prompt_ids),
            peak_memory_bytes=peak_memory(),
        )

    def _options(self, ask: Ask) -> dict[str, Any]:
        never = self.model.config.get_text_config().vocab_size  # older versions need a token that ends
        options: dict[str, Any] = {
            "do_sample": ask.temperature > 0,
            "eos_token_id": self.settings["eos_ids"] or [never],
        }
        if ask.temperature > 0:
            options |= {"temperature": ask.temperature, **_OFF}
        if self.settings["draft"] == "ngram":
            options["prompt_lookup_num_tokens"] = PROMPT_LOOKUP_TOKENS
        if self.assistant is not None:
            options["assistant_model"] = self.assistant
        return options

    def _count(self, *_: Any) -> None:
        self._passes += 1


class _FirstToken(StoppingCriteria):
    """Stops nothing; remembers when the first pass was done, and the tokens that there were then."""

    time, length = 0.0, 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        """Called after each pass."""
        if not self.length:
            self.time, self.length = time.perf_counter(), input_ids.shape[1]
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def left_out_processors(names: list[str], use: bool, ignore_eos: bool) -> list[str]:
    """The model's own processors to leave out: all unless `use`, else those of an end of text that is ignored."""
    return [name for name in names if not use or (ignore_eos and OPTIONS[name].needs_eos)]


def begin(settings: dict[str, Any]) -> tuple[str, Any]:
    """Load the model."""
    peer = TransformersPeer(settings)
    return f"transformers {transformers.__version__}, torch {torch.__version__}", peer.answer


if __name__ == "__main__":
    serve(begin)
