"""`nn.Linear` and its subclasses, and the layer of transformers that stores its weight the other way round."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import linear as torch_linear
from torch.nn.modules import module as torch_module

from tunerkit.lean import Linear
from tunerkit.sites.base import Site, unfit_weight

CONV1D = "transformers.pytorch_utils.Conv1D"
"""The full name of the layer that GPT-2 and its like are made of. It is linear, in spite of its name."""

_LINEAR = (nn.Linear, Linear)
_IS_TORCHS = getattr(nn.Linear.forward, "__globals__", None) is vars(torch_linear)
_FORWARD = nn.Linear.forward if _IS_TORCHS else None
"""Torch's own; some programs replace it for all linear layers, before this is imported or after."""


class LinearSite(Site):
    """A linear layer: `y = x @ weight.T + bias`, weight out x in."""

    kind: ClassVar[str] = "linear"
    __slots__ = ()

    @classmethod
    def takes(cls, module: nn.Module) -> str | None:
        """Return why this very layer cannot be adapted, or None."""
        return unfit_weight(module)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the layer as it is."""
        module = self.module
        parameters = None if args or kwargs else plain_parameters(module)
        if parameters is not None:
            # The same without `nn.Module.__call__` and `__getattr__`, which cost more than a small product.
            return F.linear(x, parameters["weight"], parameters["bias"])  # type: ignore[arg-type]
        return module(x, *args, **kwargs)  # type: ignore[no-any-return]

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """Run the layer on `x` with these parameters in place of its own."""
        if not args and not kwargs and _takes_weight(self.module):
            dtype = self.stored.dtype
            return F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        return super().run(x, weight, bias, *args, **kwargs)


class TransposedLinearSite(LinearSite):
    """A linear layer that stores its weight in x out; the site shows it out x in like any other."""

    transposed: ClassVar[bool] = True
    __slots__ = ()

    @property
    def weight(self) -> Tensor:
        """The layer's weight, out x in."""
        return self.stored.T

    def as_stored(self, weight: Tensor) -> Tensor:
        """Return a weight, or something that is added to one, in x out."""
        return weight.reshape(self.weight.shape).T.contiguous()


def plain_parameters(
    module: nn.Module, kinds: tuple[type[nn.Module], ...] = _LINEAR, forward: object = _FORWARD
) -> dict[str, nn.Parameter | None] | None:
    """Return the parameters `weight` and `bias` of a linear layer if `F.linear` with them is all that calling it is.

    Hooks come and go at any time, so this is asked at every call.

    Args:
        module: The layer.
        kinds: The classes of which it must be one.
        forward: The `forward` that it must have.
    """
    kind, state = type(module), module.__dict__
    if (
        kind not in kinds
        or kind.forward is not forward
        or state.get("_forward_hooks")  # a lean module has none at first
        or state.get("_forward_pre_hooks")
        or state.get("_backward_hooks")
        or state.get("_backward_pre_hooks")
        or "forward" in state
        or "_compiled_call_impl" in state
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    ):
        return None
    parameters: dict[str, nn.Parameter | None] = state["_parameters"]
    # An offloader, or who computes them anew at every call, may hold them as plain attributes.
    return parameters if "weight" in parameters and "bias" in parameters else None


def _takes_weight(module: nn.Module) -> bool:
    """Return whether calling the layer with another weight is the same as calling `F.linear` with it."""
    kind = type(module)
    if f"{kind.__module__}.{kind.__qualname__}" == CONV1D:
        return plain_parameters(module, (kind,), kind.forward) is not None
    return plain_parameters(module) is not None
