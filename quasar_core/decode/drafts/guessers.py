"""Make the draft model of `--draft`: an assistant, the checking model without some blocks, or an MTP head."""

from collections.abc import Callable
from typing import Any

from quasar_core.config import GenerationConfig
from quasar_core.decode.costs.cost_records import Role, cost_record
from quasar_core.draft.assistant import Assistant
from quasar_core.draft.by_model import Guesser, NoGuesser
from quasar_core.draft.layer_skip import LayerSkip
from quasar_core.draft.mtp import NextTokenHead
from quasar_core.errors import QuasarError, UsageError
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.drafting.mtp import head_of, over, share_of_pass
from quasar_core.models.drafting.skipping import remembered_layers, share_of_weights, skip_layers
from quasar_core.models.loading import attach
from quasar_core.models.pair import Pair


def make_guesser(pair: Pair, config: GenerationConfig, role: Role, cache: Callable[[], Any]) -> Guesser:
    """What `--draft` needs beside the text; `role` is the model that checks drafts, over what `cache` returns."""
    if config.draft == "assistant":
        return _assistant(pair, role)
    if config.draft == "mtp":
        return _next_token_head(pair, role, cache)
    return _layer_skip(pair, role, cache) if config.draft == "layer-skip" else NoGuesser()


def _assistant(pair: Pair, role: Role) -> Assistant:
    if pair.assistant is None:
        raise UsageError("--draft assistant needs --assistant MODEL, a small model of the same vocabulary.")
    ratio = cost_record(pair, "assistant").cost(1) / cost_record(pair, role).cost(1)
    _note(pair, f"assistant: its pass of a token takes {ratio:.2f} of the {role}'s")
    return Assistant(pair.assistant, ratio, pair.primary.vocab_size, pair.assistant_context or pair.max_context)


def _layer_skip(pair: Pair, role: Role, cache: Callable[[], Any]) -> Guesser:
    model = pair.target if role == "target" else pair.verifier
    if not isinstance(model, LeanDecoder):
        raise QuasarError("--draft layer-skip needs our own decoder, and this model runs through transformers.")
    if model.streamed:
        raise QuasarError(f"--draft layer-skip needs all blocks in memory, and of the {role} {model.streamed} move.")
    if len(model.layers) < 2:
        raise QuasarError("--draft layer-skip needs a model of two blocks at least.")
    if model.switches_at is not None:
        limit = model.switches_at
        raise QuasarError(
            f"--draft layer-skip needs one cache, and this model's keys are computed anew at {limit} tokens."
        )
    if model.inputs is not None or any(layer.shares for layer in model.layers):
        raise QuasarError("--draft layer-skip leaves out blocks, and this model's read what others of them hold.")
    kept, how = remembered_layers(model, _fingerprint(pair, role), role)
    if not kept:
        _note(pair, f"layer-skip: no drafts, as leaving out blocks of the {role} would not pay here, {how}")
        return NoGuesser()
    some = skip_layers(model, kept)
    attach(some)
    ratio = share_of_weights(model, kept)
    _note(pair, f"layer-skip: {len(kept)} of the {role}'s {len(model.layers)} blocks draft, {how}")
    return LayerSkip(some, kept, ratio, cache)


def _next_token_head(pair: Pair, role: Role, cache: Callable[[], Any]) -> NextTokenHead:
    own = head_of(pair)
    model = pair.target if role == "target" else pair.verifier
    assert isinstance(model, LeanDecoder)
    if model.fast is not None and not model.fast.gives_rows:
        raise QuasarError(
            f"--draft mtp needs the model's last rows, which passes recorded on {model.device} do not give."
        )
    head = over(own, model)
    ratio = share_of_pass(head, model)
    _note(pair, f"mtp: the checkpoint's own head drafts; its pass of a token reads {ratio:.2f} of the {role}'s weights")
    return NextTokenHead(head, ratio, cache)


def _fingerprint(pair: Pair, role: Role) -> str | None:
    return pair.target_fingerprint if role == "target" else pair.verifier_fingerprint


def _note(pair: Pair, sentence: str) -> None:
    if sentence not in pair.notes:
        pair.notes.append(sentence)
