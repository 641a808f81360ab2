"""Weights that are copied to a GPU for every pass give the bits of weights that lie there: `make test-gpu`."""

from pathlib import Path

import pytest
import torch
from helpers.decoder_cases import random_tokens, save_model

from quasar_core.models import loading
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.memory.offload import movable_products
from quasar_core.models.weights.device_queues import open_link
from quasar_core.models.weights.device_stream import DeviceStream
from quasar_core.models.weights.lean_weights import load_target

GPU, BF16 = torch.device("cuda", 0), torch.bfloat16
SHAPE = {"num_hidden_layers": 6, "hidden_size": 1024, "intermediate_size": 4096, "max_position_embeddings": 1024}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
@pytest.mark.parametrize("held", [range(6), [0, 2], []], ids=["main memory", "some", "the disk"])
def test_a_sweep_gives_the_bits_of_weights_that_lie_there(tmp_path: Path, held: list[int]) -> None:
    """In PyTorch's operations of passes of one length, and through Triton's kernels, where they run, of any."""
    save_model(tmp_path, "Llama", SHAPE)
    movable, _ = movable_products(tmp_path, None)
    whole = load_target(tmp_path, GPU, BF16)
    streamed = load_target(tmp_path, GPU, BF16, streamed=movable, link=open_link(GPU, frozenset(held)))
    tokens = random_tokens(60)
    for _ in range(3):
        assert torch.equal(plain(streamed, tokens), plain(whole, tokens))
    loading.attach(whole)
    loading.attach(streamed)
    source = streamed.source
    assert isinstance(source, DeviceStream)
    source.start()
    assert source.link_rate > 1e9
    assert source.memory.bytes.is_pinned()
    if "Triton's kernels" in getattr(whole.fast, "note", ""):
        assert torch.equal(in_passes(streamed, tokens, (1, 59)), in_passes(whole, tokens, (1, 7, 40, 12)))


def plain(decoder: LeanDecoder, tokens: list[int]) -> torch.Tensor:
    """A prompt in chunks, in PyTorch's operations."""
    return decoder.pass_prompt(tokens, decoder.new_cache(64), 25)


def in_passes(decoder: LeanDecoder, tokens: list[int], sizes: tuple[int, ...]) -> torch.Tensor:
    """Logits of passes of these lengths."""
    cache, parts = decoder.new_cache(64), torch.tensor(tokens).split(list(sizes))
    return torch.cat([decoder.forward(part.tolist(), cache) for part in parts])
