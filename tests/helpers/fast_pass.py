"""Decoders with their fast pass."""

from quasar_core.models import loading
from quasar_core.models.decoder.lean_decoder import LeanDecoder


def fast(decoder: LeanDecoder) -> LeanDecoder:
    """The decoder with its fast pass, which must be there."""
    note = loading.attach(decoder)
    assert decoder.fast is not None, note
    return decoder
