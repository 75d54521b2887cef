"""Starting factors that are orthogonal to one another."""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonal(out_features: int, in_features: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return random factors whose product is zero although neither of them is.

    The rows of a random orthogonal matrix are dealt out in turn: `A` lies in the span of every second one, `B` in that
    of the others, so that `B A = 0` (https://datta0.github.io/posts/rethink-lora-init).

    Args:
        out_features: The rows of `B`.
        in_features: The columns of `A`.
        rank: An even number.

    Returns:
        `A`, rank x in, and `B`, out x rank.
    """
    q = torch.linalg.qr(torch.randn(rank, rank)).Q
    a = q[0::2].T @ torch.randn(rank // 2, in_features)
    b = torch.randn(out_features, rank // 2) @ q[1::2]
    return a / 10, b / 10
