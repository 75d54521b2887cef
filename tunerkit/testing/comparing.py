"""Comparing outputs, in checks whose failure says by how much they differ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MOVED = 1e-3
"""By how much an output must move for a comparison to mean something: at its start an adapter changes nothing."""


def first_tensor(outputs: Any) -> Tensor:
    """Return what a model put out, or the first tensor of it."""
    if isinstance(outputs, Tensor):
        return outputs
    values = outputs.values() if hasattr(outputs, "values") else outputs
    return first_tensor(next(iter(values)))


def difference(one: Tensor, other: Tensor) -> float:
    """Return the greatest difference between two outputs."""
    return float((one - other).abs().max())


def is_close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Return whether two tensors are equal in dtype and, but for rounding, in every number."""
    return one.dtype == other.dtype and torch.allclose(one, other, rtol=tolerance, atol=tolerance)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal in dtype, shape and every number; NaN equals itself."""
    return one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())


def check_close(one: Tensor, other: Tensor, what: str, tolerance: float, hint: str = "") -> None:
    """Check that two tensors are equal in dtype, in shape and, but for rounding, in every number.

    Args:
        one: One of them.
        other: The other.
        what: What both are, as the message begins: "The output after merging and that before".
        tolerance: The greatest difference that counts as none, absolute and relative.
        hint: Where to look for the reason.
    """
    __tracebackhide__ = True
    _check_form(one, other, what)
    if not is_close(one, other, tolerance):
        msg = f"{what} differ by up to {_amount(one, other)} (tolerance {tolerance:g}){hint and f'; {hint}'}."
        raise AssertionError(msg)


def check_near(one: Tensor, other: Tensor, what: str, limit: float) -> None:
    """Check that no numbers of two tensors are further apart than a limit.

    Args:
        one: One of them.
        other: The other.
        what: What both are.
        limit: The greatest difference.
    """
    __tracebackhide__ = True
    _check_form(one, other, what)
    # Asked this way round because of NaN.
    if not difference(one, other) < limit:
        msg = f"{what} differ by up to {_amount(one, other)} (limit {limit:.2g})."
        raise AssertionError(msg)


def check_bits(one: Tensor, other: Tensor, what: str) -> None:
    """Check that two tensors are equal in dtype, shape and every bit.

    Args:
        one: One of them.
        other: The other.
        what: What both are.
    """
    __tracebackhide__ = True
    _check_form(one, other, what)
    if not same_bits(one, other):
        msg = f"{what} must be equal bit for bit, and differ by up to {_amount(one, other)}."
        raise AssertionError(msg)


def check_moved(one: Tensor, other: Tensor, what: str) -> None:
    """Check that two outputs are not the same.

    Args:
        one: One of them.
        other: The other.
        what: What both are.
    """
    __tracebackhide__ = True
    if not difference(one, other) > MOVED:
        msg = f"{what} must differ by more than {MOVED:g}, and do by {_amount(one, other)}."
        raise AssertionError(msg)


def _check_form(one: Tensor, other: Tensor, what: str) -> None:
    __tracebackhide__ = True
    if one.dtype != other.dtype:
        msg = f"{what} must be of one dtype, and are {one.dtype} and {other.dtype}."
        raise AssertionError(msg)
    if one.shape != other.shape:
        msg = f"{what} must be of one shape, and are {tuple(one.shape)} and {tuple(other.shape)}."
        raise AssertionError(msg)


def _amount(one: Tensor, other: Tensor) -> str:
    return f"{difference(one.double(), other.double()):.2g}"
