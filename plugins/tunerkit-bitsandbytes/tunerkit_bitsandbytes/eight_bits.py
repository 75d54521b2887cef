"""`Linear8bitLt`: rows of integers, each row with a scale."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Int8Params

from tunerkit_bitsandbytes.base import QuantisedSite

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn
    from torch.nn import Parameter

    from tunerkit.sites import Site


class EightBitSite(QuantisedSite):
    """A linear layer whose weight is stored as integers of eight bits.

    The scales of the rows come with the parameter, and at its first call the layer takes them off it and keeps them in
    a state of its own.
    """

    backend: ClassVar[str | None] = "bnb 8bit"
    __slots__ = ()

    @classmethod
    def takes(cls, module: nn.Module) -> str | None:
        """Return why this very layer cannot be adapted, or None."""
        parameter: Any = module._parameters.get("weight")
        if getattr(parameter, "has_fp16_weights", False):
            return "it keeps its weight unquantised (has_fp16_weights=True); make it with has_fp16_weights=False"
        if parameter is None or parameter.is_floating_point():
            return "its weight is not quantised yet; move the model to its device first, model.to(device)"
        return None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the scales: the layer does not know what its weight was before."""
        parameter = self.parameter
        return torch.float32 if self.is_quantised(parameter) else parameter.dtype

    def read_weight(self, parameter: Tensor) -> Tensor:
        """Return the weight that integers and scales stand for."""
        return functional.int8_vectorwise_dequant(parameter.data, self._scales(parameter))  # type: ignore[no-any-return]

    def quantise(self, weight: Tensor) -> Parameter:
        """Return a weight as integers with a scale for each row."""
        self._complete()
        data, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        return Int8Params(data, requires_grad=False, CB=data, SCB=scales)  # type: ignore[no-any-return]

    def with_parameters(self, tensors: Mapping[str, Tensor | None]) -> Site:
        """Return this site with other parameters, for one call, and a state of its own that belongs to them."""
        site = super().with_parameters(tensors)
        held = site.module._parameters[self.weight_name]
        if isinstance(held, Int8Params):
            # A call of the copy must not take the scales off a parameter that another layer has.
            site.module._parameters[self.weight_name] = Int8Params(held.data, requires_grad=False)
            state: Any = copy.copy(self.module.state)
            state.CB, state.SCB = held.data, self._scales(held)
            site.module.__dict__["state"] = state
        return site

    def _scales(self, parameter: Any) -> Tensor:
        own = getattr(parameter, "SCB", None)
        return self.module.state.SCB if own is None else own  # type: ignore[union-attr,return-value]

    def _complete(self) -> None:
        """Give the parameter its scales back, so that the layer takes them anew when it is put back one day."""
        parameter: Any = self.parameter
        if parameter.SCB is None:
            parameter.CB, parameter.SCB = parameter.data, self._scales(parameter)
