"""`Linear4bit`: blocks of numbers of four bits, each block with a scale."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar

from bitsandbytes import functional
from bitsandbytes.nn import Params4bit

from tunerkit_bitsandbytes.base import QuantisedSite

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.nn import Parameter


class FourBitSite(QuantisedSite):
    """A linear layer whose weight is stored in four bits a number, NF4 or FP4."""

    backend: ClassVar[str | None] = "bnb 4bit"
    __slots__ = ()

    @classmethod
    def takes(cls, module: nn.Module) -> str | None:
        """Return why this very layer cannot be adapted, or None."""
        if _state_of(module, module._parameters.get("weight")) is None:
            return "its weight is not quantised yet; move the model to its device first, model.to(device)"
        return None

    @property
    def state(self) -> Any:
        """What bitsandbytes knows of the numbers in the weight; None if they are the weight itself."""
        return _state_of(self.module, self.parameter)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weight had before it was quantised."""
        parameter = self.parameter
        if not self.is_quantised(parameter):
            return parameter.dtype
        dtype: torch.dtype = getattr(self.state, "original_dtype", self.state.dtype)
        return dtype

    def is_quantised(self, parameter: Tensor) -> bool:
        """Return whether a parameter of the layer is quantised; it may be stored in bytes that look like floats."""
        return _state_of(self.module, parameter) is not None

    def read_weight(self, parameter: Tensor) -> Tensor:
        """Return the weight that the numbers stand for."""
        data, state = parameter.data, self.state
        if getattr(state, "packing_format_for_cpu", False):
            # Some processors get the numbers in another order when the layer is first run without gradients.
            data, state = functional._convert_weight_packed_for_cpu_inverse(data, copy.copy(state))
        weight: Tensor = functional.dequantize_4bit(data, state)
        return weight.to(self.dtype)

    def quantise(self, weight: Tensor) -> Parameter:
        """Return a weight in four bits, with the settings of the layer's own."""
        state = self.state
        settings = {
            "blocksize": state.blocksize,
            "compress_statistics": getattr(state, "original_nested", state.nested),
            "quant_type": state.quant_type,
            "quant_storage": self.module.quant_storage,
        }
        data, made = functional.quantize_4bit(weight.to(self.dtype).contiguous(), **settings)
        return Params4bit(data, quant_state=made, bnb_quantized=True, **settings)  # type: ignore[no-any-return]


def _state_of(module: Any, parameter: Tensor | None) -> Any:
    """Return what belongs to the numbers in a weight, or None if they are the weight itself.

    Pickling and sharding take it off the parameter, and then the layer still has it.
    """
    state = getattr(parameter, "quant_state", None) or module.quant_state
    whole = parameter is None or parameter.shape == (module.out_features, module.in_features)
    return None if whole else state
