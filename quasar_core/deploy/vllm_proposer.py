"""quasar's drafts in vLLM: `--speculative-config '{"method": "custom_class", "model": "….VllmProposer", …}'`.

vLLM makes one on every rank. The first rank of a tensor-parallel group holds the low-bit copy and drafts; the others
get its drafts, so that all have the same. vLLM's own target confirms them: the text is the target's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quasar_core.deploy.batch import Batch, ProposerSettings, Tokens
from quasar_core.models.pair import Pair
from quasar_core.store.names import resolve_model
from quasar_core.store.safetensors_header import weight_bytes


class VllmProposer:
    """What vLLM's `custom_class` asks for: made from its config, `load_model` once, `propose` after each pass."""

    def __init__(self, vllm_config: Any) -> None:
        self._vllm = vllm_config
        self._settings = ProposerSettings.of(vllm_config.additional_config)
        self._settings.config()  # refused before the target is loaded, not after
        self._limit: int = vllm_config.speculative_config.num_speculative_tokens
        self._group: Any = None
        self._batch: Batch | None = None

    def load_model(self, target: Any) -> None:
        """Load the copy, on the first rank alone; vLLM has loaded its target."""
        from vllm.distributed.parallel_state import get_tp_group

        self._group = get_tp_group()
        if self._group.rank_in_group == 0:
            pair = _load(self._vllm, self._settings.verifier)
            self._batch = Batch(pair, self._settings, _cost_ratio(self._vllm, self._settings.verifier))

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: Tokens,
        token_ids_cpu: Tokens,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts for each row of the batch, the same on every rank; rows in the middle of their prompts get none."""
        if self._batch is None:
            return _received(self._group.broadcast_object(src=0))
        try:
            drafts = self._batch.propose(sampled_token_ids, num_tokens_no_spec, token_ids_cpu, self._limit)
        except Exception as error:  # the others wait: they end too
            self._group.broadcast_object(f"{type(error).__name__}: {error}", src=0)
            raise
        self._group.broadcast_object(drafts, src=0)
        return drafts


def _received(sent: list[list[int]] | str) -> list[list[int]]:
    """What the first rank sent; RuntimeError where it failed."""
    if isinstance(sent, str):
        raise RuntimeError(f"the first rank, which drafts, failed: {sent}")
    return sent


def _load(config: Any, verifier: str) -> Pair:
    """The low-bit copy alone, checked to be one of vLLM's target, on this worker's device."""
    from quasar_core.api import decoding

    device = config.device_config.device
    where = f"{device.type}:{_local_rank()}" if device.type == "cuda" else device.type
    return decoding.load_pair(
        config.model_config.model,
        verifier,
        verify="quantized",
        use_target=False,
        device=where,
        max_context=config.model_config.max_model_len,
    )


def _local_rank() -> int:
    from vllm.distributed.parallel_state import get_world_group

    rank: int = get_world_group().local_rank
    return rank


def _cost_ratio(config: Any, verifier: str) -> float:
    """What a pass of the target may cost, in passes of the copy, until that is known: by the bytes of their weights."""
    target = resolve_model(config.model_config.model).folder
    ranks: int = config.parallel_config.tensor_parallel_size
    return max(weight_bytes(target) / weight_bytes(Path(verifier)) / ranks, 1.0)
