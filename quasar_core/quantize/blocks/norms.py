"""RMS norms of a block in C++, in bfloat16, in place of the operations that transformers computes them by.

Which of the known formulas a class of norms has is found by trying them on random rows: one that gives its outputs is
taken, and a class that has none is left as it is.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch

from quasar_core.kernels.cpu.rms_norm import normalises, rms_norm

Formula = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]  # of rows, a weight, eps
ROWS = 32  # that a class of norms is tried on
MOST_ROUNDED = 0.01  # of the outputs that may be a rounding off, as sums have another order


def _rounded_first(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Llama's and most others'."""
    return rms_norm(x, weight, eps, rounds_first=True)


def _rounded_once(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """OLMo's."""
    return rms_norm(x, weight, eps)


def _above_one(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Gemma's, whose weights are the distance from 1."""
    return rms_norm(x, 1.0 + weight.float(), eps)


FORMULAS: tuple[Formula, ...] = (_rounded_first, _rounded_once, _above_one)
_found: dict[tuple[type, torch.dtype, str], Formula | None] = {}


@contextlib.contextmanager
def fused_norms(block: torch.nn.Module) -> Iterator[None]:
    """Let the norms of a block whose formula is known be computed in C++, but those that were replaced already."""
    own = [module for module in block.modules() if "forward" not in vars(module)]
    norms = [(module, formula) for module in own if (formula := formula_of(module)) is not None]
    for module, formula in norms:
        module.forward = _forward(module, formula)
    try:
        yield
    finally:
        for module, _ in norms:
            del module.forward  # the class's own again


def _forward(module: torch.nn.Module, formula: Formula) -> Callable[..., torch.Tensor]:
    weight, eps = _weight_and_eps(module)

    def forward(x: torch.Tensor, *beside: object) -> torch.Tensor:
        if beside or x.dtype != weight.dtype or not normalises(x):
            own: torch.Tensor = type(module).forward(module, x, *beside)
            return own
        return formula(x, weight, eps)

    return forward


def formula_of(module: torch.nn.Module) -> Formula | None:
    """The formula of a norm's class, tried once for each dtype; None of what is no norm, or of one of another kind."""
    if not type(module).__name__.endswith("RMSNorm"):
        return None
    try:
        weight, _ = _weight_and_eps(module)
    except AttributeError:
        return None
    key = type(module), weight.dtype, weight.device.type
    if key not in _found:
        _found[key] = _try_formulas(module)
    return _found[key]


@torch.inference_mode()
def _try_formulas(module: torch.nn.Module) -> Formula | None:
    weight, eps = _weight_and_eps(module)
    dice = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(ROWS, len(weight), generator=dice)).to(weight)
    if not normalises(x):
        return None
    tried = copy.deepcopy(module)  # by a weight that tells formulas apart, as one of ones does not
    weight = torch.randn(len(weight), generator=dice).to(weight)
    tried.weight = torch.nn.Parameter(weight, requires_grad=False)
    expected = tried(x)
    return next((formula for formula in FORMULAS if _is_same(formula(x, weight, eps), expected)), None)


def _is_same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether outputs are the same but for a few that are a rounding off."""
    off, step = (found.float() - expected.float()).abs(), torch.finfo(torch.bfloat16).eps * expected.float().abs()
    is_near = found.dtype == expected.dtype and bool((off <= 2 * step).all())
    return is_near and (off > 0).float().mean().item() <= MOST_ROUNDED


def _weight_and_eps(module: torch.nn.Module) -> tuple[torch.Tensor, float]:
    """Raises AttributeError of a module that has none."""
    weight, eps = module.weight, getattr(module, "variance_epsilon", None)
    eps = module.eps if eps is None else eps
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        raise AttributeError(f"{type(module).__name__} has no weight of one dimension, or no eps")
    return weight, eps
