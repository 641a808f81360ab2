"""Choose tokens by sampling as the best after noise that seed and position fix, and accept drafts. Pure.

argmax(log p + g), with Gumbel noise g that is independent for each token of the vocabulary, is a draw from p (the
Gumbel-max trick; Maddison et al., 2014, §2). Here the seed and the position of a token fix the noise, so what is drawn
depends on nothing but the text before it: not on drafts, windows, or the number of passes. Target and verifier add the
same noise (common random numbers), so that the verifier mostly draws the target's token, by how much the best is ahead,
as in greedy decoding; and what the target confirms is what plain sampling draws. Letters: T rows, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch

from quasar_core.config import SamplingConfig

SORTED = 1024  # tokens that mostly hold a nucleus
MOST_KEPT = 64  # positions whose noise is kept: a window's, and a draft's behind it
_WORD = 2**64


class Noise:
    """Gumbel noise for each position of a text, fixed by a seed, and the same for every model that asks."""

    def __init__(self, seed: int, vocabulary: int, device: torch.device) -> None:
        self._seed, self._vocabulary, self._device = seed % _WORD, vocabulary, device
        self._kept: dict[int, torch.Tensor] = {}

    def at(self, position: int) -> torch.Tensor:
        """Float32 [V], for the token at this position."""
        noise = self._kept.get(position)
        if noise is None:
            noise = self._kept[position] = gumbel_noise(self._seed, position, self._vocabulary, self._device)
            if len(self._kept) > MOST_KEPT:
                del self._kept[min(self._kept)]
        return noise

    def add(self, logits: torch.Tensor, positions: Sequence[int], temperature: float) -> torch.Tensor:
        """Logits [T, V] + temperature · noise, whose best is a draw from softmax(logits ÷ temperature)."""
        noisy = torch.empty_like(logits)
        for row, position in enumerate(positions):
            noise = self.at(position)
            if logits.device.type == "cpu":  # NumPy wakes no threads of PyTorch's, for which the C++ pass would wait
                np.add(logits[row].numpy(), temperature * noise.numpy(), out=noisy[row].numpy())
            else:
                torch.add(logits[row], noise, alpha=temperature, out=noisy[row])
        return noisy


def gumbel_noise(seed: int, position: int, count: int, device: torch.device) -> torch.Tensor:
    """−log of standard exponentials, float32 [count]; drawn in float64, which knows numbers that rare tokens need."""
    source = np.random.SeedSequence([seed, position])
    if device.type == "cpu":
        exponentials = np.random.Generator(np.random.SFC64(source)).standard_exponential(count)
        return torch.from_numpy(-np.log(exponentials.astype(np.float32)))
    generator = torch.Generator(device).manual_seed(int(source.generate_state(1, np.uint64)[0]))
    return -torch.empty(count, dtype=torch.float64, device=device).exponential_(generator=generator).float().log()


def keep_likely(logits: torch.Tensor, config: SamplingConfig) -> torch.Tensor:
    """Logits [T, V], −∞ where top-k, top-p or min-p, in this order, leaves a token out (temperature above 0).

    The order is the field's, as transformers' generate applies them; top-p and min-p look at logits ÷ temperature.
    """
    if 0 < config.top_k < logits.shape[-1]:
        smallest = logits.topk(config.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if config.top_p < 1:
        logits = logits.masked_fill(_beyond_nucleus(_scaled(logits, config), config.top_p), -torch.inf)
    if config.min_p > 0:
        logits = logits.masked_fill(_scaled(logits, config).exp() < config.min_p, -torch.inf)
    return logits


def _scaled(logits: torch.Tensor, config: SamplingConfig) -> torch.Tensor:
    """Logits ÷ temperature, the best of each row 0, so that none overflows."""
    return (logits - logits.amax(dim=-1, keepdim=True)) / config.temperature


def _beyond_nucleus(scaled: torch.Tensor, top_p: float) -> torch.Tensor:
    """Where tokens lie beyond the smallest set of best ones whose probability reaches top_p; the best never does.

    On a CPU few are sorted where few are enough.
    """
    total, few = scaled.logsumexp(dim=-1, keepdim=True), SORTED if scaled.device.type == "cpu" else scaled.shape[-1]
    for count in (min(few, scaled.shape[-1]), scaled.shape[-1]):
        ordered, order = scaled.topk(count, dim=-1)
        shares = (ordered - total).exp()
        before = shares.cumsum(dim=-1) - shares
        if count == scaled.shape[-1] or bool((before[:, -1] >= top_p).all()):
            break
    return torch.ones_like(scaled, dtype=torch.bool).scatter(-1, order, (before >= top_p) & (before > 0))


def accept_matching(choices: Sequence[int], offered: Sequence[int]) -> tuple[int, int]:
    """Accept offered tokens while they equal the model's own choices (k + 1 of them).

    Returns how many are accepted, and the bonus token behind them: the correction where one was refused, the next token
    where none was.
    """
    accepted = 0
    while accepted < len(offered) and choices[accepted] == offered[accepted]:
        accepted += 1
    return accepted, choices[accepted]
