"""Starting factors from the decomposition of a weight: PiSSA, OLoRA and MiCA."""

from __future__ import annotations

import torch
from torch import Tensor

from tunerkit_lora.inits.svd import lowrank_svd


def pissa(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return factors whose scaled product is the best approximation of a weight.

    From "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models" (arXiv 2404.02948):
    with `W = U S V^T`, `A = sqrt(S_r / s) V_r^T` and `B = U_r sqrt(S_r / s)`.

    Args:
        weight: The weight, out x in, in float32.
        rank: How many singular values to take; a weight of lower rank gives as many as it has.
        scaling: What the product of the factors is multiplied with.

    Returns:
        `A`, rank x in, and `B`, out x rank.
    """
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return _balanced(u[:, :rank], s[:rank] / scaling, vh[:rank])


def pissa_lowrank(weight: Tensor, rank: int, scaling: float, iterations: int) -> tuple[Tensor, Tensor]:
    """Return what `pissa` does, approximately and much faster; see `lowrank_svd`.

    Args:
        weight: The weight, out x in, in float32.
        rank: How many singular values to take.
        scaling: What the product of the factors is multiplied with.
        iterations: How often the weight is applied both ways.

    Returns:
        `A`, rank x in, and `B`, out x rank.
    """
    u, s, vh = lowrank_svd(weight, rank, iterations)
    return _balanced(u, s / scaling, vh)


def olora(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return the first columns and rows of a weight's QR decomposition.

    From "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models" (arXiv 2406.01775): with `W = Q R`, `A` is
    the first rows of `R` and `B` the first columns of `Q`. As in PEFT their product is not divided by the scaling.

    Args:
        weight: The weight, out x in, in float32.
        rank: How many of them to take; a weight of lower rank gives as many as it has.
        scaling: Not used.

    Returns:
        `A`, rank x in, and `B`, out x rank.
    """
    del scaling
    q, r = torch.linalg.qr(weight)
    return r[:rank].contiguous(), q[:, :rank].contiguous()


def minor_directions(weight: Tensor, rank: int) -> Tensor:
    """Return the left singular vectors of a weight's smallest singular values, the start of MiCA's `B`.

    From "Minor Component Adaptation" (arXiv 2604.01694): `B` stays as it is and only `A` is trained, from zero.

    Args:
        weight: The weight, out x in, in float32.
        rank: How many; at most as many as the weight has.

    Returns:
        `B`, out x rank.
    """
    u: Tensor = torch.linalg.svd(weight, full_matrices=False).U
    return u[:, u.shape[1] - rank :].contiguous()


def _balanced(u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    root = s.sqrt()
    return root[:, None] * vh, u * root
