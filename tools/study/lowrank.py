"""EoRA (Liu et al., 2024, arXiv 2410.21271): the part of a rounding error that a low rank holds best. Pure.

What matters of an error E = W − Ŵ is E x: so its singular vectors are taken in the eigenspace of the inputs. With
H = U Λ Uᵀ, the best rank-r approximation of E under H is [E U Λ^½]_r Λ^−½ Uᵀ. Checkpoints do not hold such a
correction: the study compares it with wider codes at equal bytes (dev/log.md).
"""

import torch

SMALLEST = 1e-6  # of the largest eigenvalue


def low_rank_part(error: torch.Tensor, hessian: torch.Tensor, rank: int) -> torch.Tensor:
    """The best approximation of rank `rank` to an error [out, in] under H [in, in], its factors rounded to float16."""
    values, vectors = torch.linalg.eigh(hessian.float())
    roots = values.clamp_min(SMALLEST * float(values.max())).sqrt()
    left, sizes, right = torch.linalg.svd((error.float() @ vectors) * roots, full_matrices=False)
    tall = (left[:, :rank] * sizes[:rank]).half().float()
    wide = ((right[:rank] / roots) @ vectors.t()).half().float()
    part: torch.Tensor = tall @ wide
    return part


def rank_of_bytes(size: int, in_features: int, out_features: int) -> int:
    """The rank whose two float16 factors take so many bytes."""
    return size // (2 * (in_features + out_features))
