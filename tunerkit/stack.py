"""A stack of matrices (the experts of a mixture) with a low-rank update for each, computed where it is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from typing_extensions import Self


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


class StackSum(Tensor):
    """The tensor that `add_to_stack` returns. It holds no numbers of its own.

    To autograd it is the result of an operation on the stack and the factors, so a gradient for the whole of it reaches
    them; what is read of single experts is computed from theirs alone, and so is the gradient.
    """

    stack: Tensor
    left: Tensor
    right: Tensor
    scaling: float
    _whole: Tensor | None = None
    _factors: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None

    def __new__(cls, stack: Tensor) -> Self:
        """Make a tensor that has the form of the stack and no memory."""
        return Tensor._make_wrapper_subclass(
            cls, stack.shape, strides=stack.stride(), dtype=stack.dtype, device=stack.device
        )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute single experts from their own factors; see to the rest below autograd."""
        if func is Tensor.__getitem__ and isinstance(args[0], cls):
            found = args[0].pick(args[1])
            if found is not None:
                return found
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run any operation on the whole sum."""
        del types

        def plain(value: Any) -> Any:
            return value.whole() if isinstance(value, cls) else value

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))

    def __repr__(self, **_kwargs: Any) -> str:  # type: ignore[override]
        return f"StackSum({tuple(self.shape)}, dtype={self.dtype})"

    def whole(self) -> Tensor:
        """Return the whole sum as a plain tensor, without gradients."""
        if self._whole is None:
            stack = self.stack.whole() if isinstance(self.stack, StackSum) else self.stack
            with torch.no_grad():
                self._whole = _sum(stack, self.left, self.right, self.scaling)
        return self._whole

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
        return StackSum(stack)

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
