"""Bringing the factors of an adapter to another rank, with zeros or by leaving out what is zero."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def resize_first(factor: Tensor, rank: int, groups: int = 1) -> Tensor:
    """Return the first factor, rank x ..., with another rank.

    Args:
        factor: The factor, which may be a kernel.
        rank: The rank, a multiple of `groups`.
        groups: Into how many groups the rank is divided; the rows of a group stay together.
    """
    rows = factor.reshape(groups, len(factor) // groups, -1)
    wanted = rank // groups
    filled = F.pad(rows[:, :wanted], (0, 0, 0, max(wanted - rows.shape[1], 0)))
    return filled.reshape(rank, *factor.shape[1:])


def resize_second(factor: Tensor, rank: int, groups: int = 1) -> Tensor:
    """Return the second factor, out x rank / groups x ..., with another rank."""
    columns = factor.flatten(1)
    wanted = rank // groups
    filled = F.pad(columns[:, :wanted], (0, max(wanted - columns.shape[1], 0)))
    return filled.reshape(len(factor), wanted, *factor.shape[2:])
