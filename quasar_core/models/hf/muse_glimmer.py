"""Muse Glimmer's text part as a causal language model: transformers has its blocks, and its head in a multimodal class.

Letters: B texts, T tokens of each, V vocabulary.
"""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationMixin,
    MuseGlimmerPreTrainedModel,
    MuseGlimmerTextConfig,
    MuseGlimmerTextModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast


class MuseGlimmerForCausalLM(MuseGlimmerPreTrainedModel, GenerationMixin):
    """As `MuseGlimmerForConditionalGeneration` passes text."""

    config: MuseGlimmerTextConfig  # type: ignore[assignment]  # as `MuseGlimmerTextModel` has it
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - as transformers declares it

    def __init__(self, config: MuseGlimmerTextConfig) -> None:
        super().__init__(config)
        self.model = MuseGlimmerTextModel(config)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Token ids [B, T] → logits [B, T, V], of the last `logits_to_keep` tokens where that is not 0."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **others,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept]) * self.config.output_multiplier
        cap = self.config.final_logit_softcapping
        return CausalLMOutputWithPast(
            logits=torch.tanh(logits / cap) * cap,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def register() -> None:
    """Have transformers' `AutoModelForCausalLM` build and load the text part."""
    AutoModelForCausalLM.register(MuseGlimmerTextConfig, MuseGlimmerForCausalLM, exist_ok=True)
