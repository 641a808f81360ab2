"""How long the samples are that a model is calibrated on: never longer than the texts that it was made for."""

from dataclasses import replace

from quasar_core.config import LEAST_SAMPLE, QuantizeConfig


def within_context(config: QuantizeConfig, limit: int) -> tuple[QuantizeConfig, str | None]:
    """The config with a length that the model can read, and a sentence where it asked for a longer one."""
    length = max(limit, LEAST_SAMPLE)
    if config.seq_len is None or config.seq_len <= length:
        return config, None
    cut = f"Samples have {length} tokens, which the model was made for; --seq-len asks for {config.seq_len}."
    return replace(config, seq_len=length), cut
