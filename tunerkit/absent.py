"""Tensors that are not here: they have the form of a parameter, and its numbers are fetched when they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self


class Absent(Tensor):
    """A tensor whose shape, dtype and device are known, and whose numbers are fetched by what is computed with it.

    A view of it is another one, so a matrix that is shown of kernels is not there either before it is read.

    Args:
        form: A tensor of the same form, on whatever device; its numbers are not read.
        device: The device on which it would be.
        fetch: Returns the tensor itself, or raises why it is not to be had.
    """

    _form: Tensor
    _fetch: Callable[[], Tensor]
    _found: Tensor | None

    def __new__(cls, form: Tensor, device: torch.device, fetch: Callable[[], Tensor]) -> Self:
        """Make a tensor without memory."""
        del fetch
        return Tensor._make_wrapper_subclass(cls, form.shape, strides=form.stride(), dtype=form.dtype, device=device)

    def __init__(self, form: Tensor, device: torch.device, fetch: Callable[[], Tensor]) -> None:
        del device
        super().__init__()
        self._form = form
        self._fetch = fetch
        self._found = None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See to it below autograd."""
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation on what is fetched; one that only views is put off."""
        del types
        kwargs = kwargs or {}

        def here(value: Any) -> Any:
            return value.here() if isinstance(value, cls) else value

        if func.is_view and isinstance(args[0], cls):
            whole, *how = args
            return cls(func(whole._form, *how, **kwargs), whole.device, lambda: func(whole.here(), *how, **kwargs))
        return func(*tree_map(here, args), **tree_map(here, kwargs))

    def __repr__(self, **_kwargs: Any) -> str:  # type: ignore[override]
        return f"Absent({tuple(self.shape)}, dtype={self.dtype})"

    def here(self) -> Tensor:
        """Return the tensor itself; it is fetched once."""
        if self._found is None:
            self._found = self._fetch()
        return self._found
