"""`nn.Linear` and its subclasses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from tunerkit.sites.base import Site, unfit_weight

if TYPE_CHECKING:
    from collections.abc import Mapping


class LinearSite(Site):
    """A linear layer: `y = x @ weight.T + bias`, weight out x in."""

    kind: ClassVar[str] = "linear"
    __slots__ = ()

    @classmethod
    def takes(cls, module: nn.Module) -> str | None:
        """Return why this very layer cannot be adapted, or None."""
        return unfit_weight(module)

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """Run the layer on `x` with these parameters in place of its own."""
        if not args and not kwargs and _is_plain(self.module):
            tensors: Mapping[str, Tensor | None] = self.to_stored(weight, bias)
            return F.linear(x, tensors["weight"], tensors.get("bias"))  # type: ignore[arg-type]
        return super().run(x, weight, bias, *args, **kwargs)


def _is_plain(module: nn.Module) -> bool:
    """Return whether calling the layer is the same as calling `F.linear`."""
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and not module._forward_pre_hooks
        and not module._forward_hooks
        and not module._backward_pre_hooks
        and not module._backward_hooks
    )
