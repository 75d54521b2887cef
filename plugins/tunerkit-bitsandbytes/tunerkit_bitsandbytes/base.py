"""`QuantisedSite`: what linear layers with quantised weights have in common, however many bits they have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunerkit.absent import Absent
from tunerkit.sites import LinearSite, twin

if TYPE_CHECKING:
    from torch.nn import Parameter


class QuantisedSite(LinearSite):
    """A linear layer whose weight is stored in whole numbers.

    A subclass says in `is_quantised` and `read_weight` what the weight is, and in `quantise` how another one is stored.
    What asks for no more than the form of the weight does not read it.
    """

    quantised: ClassVar[bool] = True
    __slots__ = ()

    def is_quantised(self, parameter: Tensor) -> bool:
        """Return whether a parameter of the layer holds whole numbers, not the weight itself."""
        return not parameter.is_floating_point()

    def read_weight(self, parameter: Tensor) -> Tensor:
        """Return the weight that a quantised parameter of the layer stands for, out x in."""
        raise NotImplementedError

    def quantise(self, weight: Tensor) -> Parameter:
        """Return a weight as the layer stores its own."""
        raise NotImplementedError

    @property
    def parameter(self) -> Tensor:
        """What the layer holds as its weight."""
        return self.module._parameters[self.weight_name]  # type: ignore[return-value]

    @property
    def stored(self) -> Tensor:
        """The weight, which is computed when it is read."""
        parameter = self.parameter
        if not self.is_quantised(parameter):
            return parameter
        if torch.compiler.is_compiling():  # a graph computes what it uses
            return self.read_weight(parameter)
        form = torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")
        return Absent(form, self.device, lambda: self.read_weight(parameter))

    @property
    def device(self) -> torch.device:
        """The device of the weight."""
        return self.parameter.device

    @property
    def in_features(self) -> int:
        """The number of columns of the weight."""
        return int(self.module.in_features)  # type: ignore[arg-type]

    @property
    def out_features(self) -> int:
        """The number of rows of the weight."""
        return int(self.module.out_features)  # type: ignore[arg-type]

    def to_stored(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor | None]:
        """Return parameters as the layer stores them, the weight quantised."""
        tensors: dict[str, Tensor | None] = {self.weight_name: self.quantise(weight)}
        if bias is not None or self.bias is not None:
            dtype = self.dtype if self.bias is None else self.bias.dtype
            tensors[self.bias_name] = None if bias is None else bias.to(dtype)
        return tensors

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """Run the layer on `x` with these parameters, which are not quantised, in place of its own."""
        other = twin(self.module)
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        other.__dict__["forward"] = lambda x: F.linear(x, weight, bias)  # the layer's hooks are still called
        return other(x, *args, **kwargs)  # type: ignore[no-any-return]

    def dequantised(self) -> nn.Module:
        """Return an `nn.Linear` with the weight as it is read, and the layer's own bias."""
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(self.read_weight(self.parameter), requires_grad=False)
        plain.bias = self.bias  # type: ignore[assignment]
        return plain.train(self.module.training)
