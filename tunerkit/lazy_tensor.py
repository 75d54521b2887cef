"""`LazyTensor`: a tensor whose numbers are made when something is computed with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from typing_extensions import Self


class LazyTensor(Tensor):
    """A tensor that has a form and no memory. Any operation is run on the tensor that it stands for.

    A subclass says in `make` what that is.

    Args:
        form: A tensor of the same form, on whatever device; its numbers are not read.
        device: The device on which it is.
    """

    _whole: Tensor | None = None

    def __new__(cls, form: Tensor, device: torch.device) -> Self:
        """Make a tensor that has the form of another and no memory."""
        return Tensor._make_wrapper_subclass(cls, form.shape, strides=form.stride(), dtype=form.dtype, device=device)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See to it below autograd."""
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it with other types than it calls it with
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation on whole tensors."""
        del types

        def plain(value: Any) -> Any:
            return value.whole() if isinstance(value, LazyTensor) else value

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))

    def __repr__(self, **_kwargs: Any) -> str:  # type: ignore[override]  # nothing can be shown of its content
        return f"{type(self).__name__}({tuple(self.shape)}, dtype={self.dtype})"

    def whole(self) -> Tensor:
        """Return the tensor itself, without gradients; it is made once."""
        if self._whole is None:
            with torch.no_grad():
                self._whole = self.make()
        return self._whole

    def make(self) -> Tensor:
        """Return the tensor itself."""
        raise NotImplementedError
