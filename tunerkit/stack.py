"""A stack of matrices (the experts of a mixture) with a low-rank update for each, computed where it is read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tunerkit.lazy_tensor import LazyTensor


def add_to_stack(stack: Tensor, left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """Return `stack + scaling * left @ right`, if it can be as a tensor that computes only what is read of it.

    A mixture that goes through the experts that were hit reads `weight[expert]`, and then only that expert's sum is
    computed. Whatever else is done with the result computes the whole sum, once.

    Args:
        stack: The matrices, experts x rows x columns.
        left: One factor for each of them, experts x rows x rank.
        right: The other, experts x rank x columns.
        scaling: The factor before the product.

    Returns:
        The sum, of the shape and dtype of `stack`.
    """
    plain = type(stack) in {Tensor, nn.Parameter, StackSum} and not torch.compiler.is_compiling()
    if not plain or torch._C._functorch.peek_interpreter_stack() is not None:
        return _sum(stack, left, right, scaling)
    made: StackSum = _Promise.apply(stack, left, right, scaling)  # type: ignore[no-untyped-call]
    made.stack, made.left, made.right, made.scaling = stack, left, right, scaling
    return made


class StackSum(LazyTensor):
    """The tensor that `add_to_stack` returns. It holds no numbers of its own.

    To autograd it is the result of an operation on the stack and the factors, so a gradient for the whole of it reaches
    them; what is read of single experts is computed from theirs alone, and so is the gradient.
    """

    stack: Tensor
    left: Tensor
    right: Tensor
    scaling: float
    _factors: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute single experts from their own factors; see to the rest below autograd."""
        if func is Tensor.__getitem__ and isinstance(args[0], cls):
            found = args[0].pick(args[1])
            if found is not None:
                return found
        return super().__torch_function__(func, types, args, kwargs)

    def make(self) -> Tensor:
        """Return the whole sum."""
        stack = self.stack.whole() if isinstance(self.stack, StackSum) else self.stack
        return _sum(stack, self.left, self.right, self.scaling)

    def pick(self, index: Any) -> Tensor | None:
        """Return `self[index]` computed from the experts that the index names, or None if it does not name some."""
        first, *rest = index if isinstance(index, tuple) else (index,)
        count = len(self.left)
        if isinstance(first, Tensor) and not first.dtype.is_floating_point and first.dtype is not torch.bool:
            # As for any tensor, an index without dimensions is a number.
            first = first.item() if first.dim() == 0 else first
        elif isinstance(first, bool) or not isinstance(first, int):
            return None
        if isinstance(first, Tensor):
            if first.numel() >= count or rest:
                return None
            left, right = self.left[first], self.right[first]
        elif -count <= first < count:
            # All factors' gradients are put together once, not once for each expert that is read.
            self._factors = self._factors or (self.left.unbind(), self.right.unbind())
            left, right = (factors[first] for factors in self._factors)
        else:
            return None
        found = _sum(self.stack[first], left, right, self.scaling)
        return found[tuple(rest)] if rest else found


class _Promise(torch.autograd.Function):
    """Makes the sum known to autograd without computing it."""

    @staticmethod
    def forward(ctx: Any, stack: Tensor, left: Tensor, right: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.scaling = scaling
        return StackSum(stack, stack.device)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        left, right = ctx.saved_tensors
        (whole,) = gradients
        scaled = ctx.scaling * whole.to(left.dtype)
        needs = ctx.needs_input_grad
        return (
            whole if needs[0] else None,
            scaled @ right.mT if needs[1] else None,
            left.mT @ scaled if needs[2] else None,
            None,
        )


def _sum(weight: Tensor, left: Tensor, right: Tensor, scaling: float) -> Tensor:
    # A parameter keeps its dtype under autocast too.
    with torch.autocast(weight.device.type, enabled=False):
        if weight.dtype == left.dtype and weight.dim() == 3:  # noqa: PLR2004 - what baddbmm takes
            return torch.baddbmm(weight, left, right, alpha=scaling)
        return (weight + scaling * (left @ right)).to(weight.dtype)
