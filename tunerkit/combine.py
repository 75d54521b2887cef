"""Combining tensors of several adapters into one: the maths, for any method.

The tensors of a list belong to one place of several adapters and have one shape. Each has a weight, which may be
negative.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from tunerkit.errors import CombinationError
from tunerkit.naming import listing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MajoritySign = Literal["total", "frequency"]
"""How the sign of a place is elected: by the sum of the numbers there, or by how many have which sign."""

PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
"""The combinations that keep only a share of each tensor's numbers, the density."""


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the sum of the tensors, each times its weight."""
    return (torch.stack(list(tensors)) * _column(tensors, weights)).sum(dim=0)


def keep_largest(tensor: Tensor, density: float) -> Tensor:
    """Return a tensor of which all but the largest numbers are zero.

    Args:
        tensor: The tensor.
        density: The share of its numbers that is kept, above 0 and at most 1.
    """
    kept = torch.topk(tensor.abs().flatten(), int(density * tensor.numel())).indices
    mask = torch.zeros(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    mask[kept] = 1
    return tensor * mask.view(tensor.shape)


def drop_random(tensor: Tensor, density: float) -> Tensor:
    """Return a tensor of which random numbers are zero and the others larger, so that the expected value stays.

    From "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch"
    (DARE, arXiv 2311.03099).

    Args:
        tensor: The tensor.
        density: The probability with which a number is kept, above 0 and at most 1.
    """
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density


def elect_sign(tensors: Tensor, weights: Tensor, method: MajoritySign) -> Tensor:
    """Return the weighted mean, at each place, of those tensors whose sign there is the elected one.

    From "TIES-Merging: Resolving Interference When Merging Models" (arXiv 2306.01708).

    Args:
        tensors: The tensors, stacked in dimension 0.
        weights: The weights, of a shape that broadcasts to `tensors`.
        method: How the sign is elected.
    """
    votes = tensors if method == "total" else tensors.sign()
    elected = torch.where(votes.sum(dim=0) >= 0, 1, -1)
    agree = tensors.sign() == elected
    return (tensors * weights * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)


def combine(
    combination: str,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    density: float | None = None,
    majority_sign_method: MajoritySign = "total",
) -> Tensor:
    """Combine tensors of one shape into one.

    Args:
        combination: "linear", or one of `PRUNING`: "magnitude_prune" keeps the largest numbers, "dare_linear" random
            ones, "ties" and "dare_ties" then average what agrees in sign.
        tensors: The tensors.
        weights: A weight for each.
        density: The share of its numbers that each tensor keeps; for `PRUNING`.
        majority_sign_method: How "ties" and "dare_ties" elect the sign of a place.

    Raises:
        CombinationError: The combination, the density or the method is none that is known.
    """
    check_combination(combination, ("linear", *PRUNING), density, majority_sign_method)
    if density is None or combination == "linear":
        return weighted_sum(tensors, weights)
    prune: Callable[[Tensor, float], Tensor] = drop_random if combination.startswith("dare") else keep_largest
    pruned = [prune(tensor, density) for tensor in tensors] if density < 1 else list(tensors)
    if combination in ("magnitude_prune", "dare_linear"):
        return weighted_sum(pruned, weights)
    return elect_sign(torch.stack(pruned), _column(pruned, weights), majority_sign_method)


def check_combination(combination: str, known: Sequence[str], density: float | None, majority_sign_method: str) -> None:
    """Refuse a combination that is not known, or whose settings are wrong.

    Raises:
        CombinationError: The combination, the density or the method is none that is known.
    """
    if combination not in known:
        msg = f"combination_type={combination!r} is not known; possible are {listing(known, len(known))}."
        raise CombinationError(msg)
    if combination.removesuffix("_svd") in PRUNING and not (
        isinstance(density, (int, float)) and not isinstance(density, bool) and 0 < density <= 1
    ):
        msg = (
            f"combination_type={combination!r} keeps a share of each tensor's numbers, so density must be a number "
            f"above 0 and at most 1; it is {density!r}."
        )
        raise CombinationError(msg)
    if majority_sign_method not in get_args(MajoritySign):
        possible = listing(get_args(MajoritySign))
        msg = f"majority_sign_method={majority_sign_method!r} is not known; possible are {possible}."
        raise CombinationError(msg)


def low_rank(matrix: Tensor, rank: int, driver: str | None = None) -> tuple[Tensor, Tensor]:
    """Return the two factors whose product is the closest matrix of a rank.

    Args:
        matrix: A matrix out x in.
        rank: The rank; where the matrix has fewer rows or columns, the factors are filled up with zeros.
        driver: What `torch.linalg.svd` uses on a GPU.

    Returns:
        The left factor, out x rank, which holds the singular values, and the right one, rank x in.
    """
    left, values, right = torch.linalg.svd(matrix.float(), full_matrices=False, driver=driver)
    return _padded(left * values, right, rank)


def low_rank_sum(factors: Sequence[tuple[Tensor, Tensor]], rank: int) -> tuple[Tensor, Tensor]:
    """Return the two factors whose product is the closest of a rank to a sum of products, without building the sum.

    Args:
        factors: Pairs of a matrix out x r and a matrix r x in; r may differ.
        rank: The rank; where the sum has less, the factors are filled up with zeros.

    Returns:
        The left factor, out x rank, which holds the singular values, and the right one, rank x in.
    """
    outer, left = torch.linalg.qr(torch.cat([up.float() for up, _ in factors], dim=1))
    inner, right = torch.linalg.qr(torch.cat([down.float() for _, down in factors]).mT)
    small_left, small_right = low_rank(left @ right.mT, rank)
    return outer @ small_left, small_right @ inner.mT


def clamp_to_quantile(factors: tuple[Tensor, Tensor], quantile: float) -> tuple[Tensor, Tensor]:
    """Return two factors whose numbers are limited to the quantile of all their numbers, up and down."""
    limit = torch.cat([factor.flatten() for factor in factors]).quantile(quantile)
    clamp = partial(torch.clamp, min=-limit, max=limit)
    return clamp(factors[0]), clamp(factors[1])


def _column(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return weights as a tensor that broadcasts over stacked tensors."""
    column = torch.tensor(list(weights), device=tensors[0].device)
    return column.view(-1, *(1,) * tensors[0].dim())


def _padded(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    missing = max(rank - len(right), 0)
    pad = torch.nn.functional.pad
    return pad(left[:, :rank], (0, missing)), pad(right[:rank], (0, 0, 0, missing))
