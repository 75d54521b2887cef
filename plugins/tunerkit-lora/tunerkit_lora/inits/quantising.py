"""Quantising a weight and decomposing what that loses: the start of LoftQ."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from tunerkit_lora.inits.spectral import pissa

_BLOCK = 64
"""How many numbers of four bits have a scale in common, as in bitsandbytes."""

_EDGE = 0.9677083
"""The share of a normal distribution below the largest number of four bits, as in QLoRA (arXiv 2305.14314)."""

_WHOLE = 8
"""How many bits whole numbers have."""

_LARGEST = 127
"""The largest of these numbers; their smallest is its negative."""

_SMALLEST = 1e-30


def loftq(weight: Tensor, rank: int, scaling: float, bits: int, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a quantised weight, and factors whose scaled product is the best approximation of what it lacks.

    From "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models" (arXiv 2310.08659): in each round the
    weight without the product so far is quantised, and what that lacks of the weight is decomposed.

    Args:
        weight: The weight, out x in, in float32.
        rank: The rank of the product; a weight of lower rank gives as many as it has.
        scaling: What the product of the factors is multiplied with.
        bits: 4 or 8; see `rounded`.
        rounds: How often quantising and decomposing take turns.

    Returns:
        `A`, rank x in, `B`, out x rank, and the quantised weight, as numbers in float32.
    """
    quantised = rounded(weight, bits)
    first, second = pissa(weight - quantised, rank, scaling)
    for _ in range(rounds - 1):
        quantised = rounded(weight - scaling * second @ first, bits)
        first, second = pissa(weight - quantised, rank, scaling)
    return first, second, quantised


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Return what a layer of bitsandbytes makes of a weight.

    With 4 bits blocks of 64 numbers share a scale, and a number is one of the 16 of `normal_floats` (NF4). With 8 bits
    rows share a scale, and a number is a whole one; the weight counts in half precision.

    Args:
        weight: The weight, out x in, in float32.
        bits: 4 or 8.
    """
    if bits == _WHOLE:
        halved = weight.half().float()
        scales = _scales(halved)
        return (halved * (_LARGEST / scales)).round() * (scales / _LARGEST)
    blocks = F.pad(weight.flatten(), (0, -weight.numel() % _BLOCK)).view(-1, _BLOCK)
    scales, numbers = _scales(blocks), normal_floats().to(weight.device)
    nearest = torch.bucketize(blocks / scales, (numbers[1:] + numbers[:-1]) / 2)
    return (numbers[nearest] * scales).flatten()[: weight.numel()].view(weight.shape)


def _scales(rows: Tensor) -> Tensor:
    """Return the largest absolute value of each row, or of one of zeros something to divide by."""
    return rows.abs().amax(1, keepdim=True).clamp_min(_SMALLEST)


@functools.cache
def normal_floats() -> Tensor:
    """Return the 16 numbers of NF4, from -1 to 1: zero, and evenly spread quantiles of a normal distribution.

    There are eight above zero and seven below it (appendix E of arXiv 2305.14314).
    """
    above, below = (
        torch.special.ndtri(torch.linspace(_EDGE, 0.5, count + 1, dtype=torch.float64)[:-1]) for count in (8, 7)
    )
    numbers = torch.cat([-below, above.new_zeros(1), above.flip(0)])
    return (numbers / numbers.max()).float()
