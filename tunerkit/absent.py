"""Tensors that are not here: they have the form of a parameter, and its numbers are fetched when they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunerkit.lazy_tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor
    from typing_extensions import Self


class Absent(LazyTensor):
    """A tensor whose shape, dtype and device are known, and whose numbers are fetched by what is computed with it.

    A view of it is another one, so a matrix that is shown of kernels is not there either before it is read.

    Args:
        form: A tensor of the same form, on whatever device; its numbers are not read.
        device: The device on which it would be.
        fetch: Returns the tensor itself, or raises why it is not to be had.
    """

    _form: Tensor
    _fetch: Callable[[], Tensor]

    def __new__(cls, form: Tensor, device: torch.device, fetch: Callable[[], Tensor]) -> Self:
        """Make a tensor without memory."""
        made = super().__new__(cls, form, device)
        made._form, made._fetch = form, fetch
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # as in `LazyTensor`
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation on what is fetched; one that only views is put off."""
        kwargs = kwargs or {}
        if func.is_view and isinstance(args[0], cls):
            whole, *how = args
            return cls(func(whole._form, *how, **kwargs), whole.device, lambda: func(whole.whole(), *how, **kwargs))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def make(self) -> Tensor:
        """Return what is fetched."""
        return self._fetch()
