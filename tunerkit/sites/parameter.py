"""One parameter of a module, for weights that no layer of their own holds (the fused experts of a mixture)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from tunerkit.sites.base import Site, twin

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn


class ParameterSite(Site):
    """A bare parameter, in the shape in which the module holds it: a matrix, or a stack of them (experts x ... x ...).

    The layer that adapts a second parameter of a module wraps the layer that adapts the first, so the module here may
    be such a layer; the parameter is then found below it.

    Attributes:
        parameter_name: The name of the parameter in the module.
    """

    kind: ClassVar[str] = "parameter"
    __slots__ = ("parameter_name",)

    def __init__(self, module: nn.Module, name: str = "", parameter_name: str = "weight") -> None:
        super().__init__(module, name)
        self.parameter_name = parameter_name

    def at(self, module: nn.Module) -> Site:
        """Return this site with another module in the layer's place."""
        return type(self)(module, self.name, self.parameter_name)

    @property
    def settings_name(self) -> str:
        """The path of the parameter."""
        return f"{self.name}.{self.parameter_name}"

    @property
    def weight_name(self) -> str:
        """The name of the parameter."""
        return self.parameter_name

    @property
    def read(self) -> tuple[str, ...]:
        """The name of the parameter."""
        return (self.parameter_name,)

    @property
    def owner(self) -> nn.Module:
        """The module that holds the parameter, below the layers that adapt its other parameters."""
        module = self.module
        while self.parameter_name not in module._parameters:
            _, module = _base(module)
        return module

    @property
    def stored(self) -> Tensor:
        """The parameter."""
        return self.owner._parameters[self.parameter_name]  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """None: a bare parameter has no bias."""
        return None

    def fitted(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor | None]:
        """Return the weight by its name, the very tensor if its form is right: what it holds may be computed later."""
        stored = self.stored
        if weight.shape == stored.shape and weight.dtype is stored.dtype:
            return {self.parameter_name: weight}
        return self.to_stored(weight, bias)

    def with_parameters(self, tensors: Mapping[str, Tensor | None]) -> Site:
        """Return this site with another tensor for the parameter, also below layers that adapt the module's others."""
        return self.at(self._twin(self.module, tensors))

    def _twin(self, module: nn.Module, tensors: Mapping[str, Tensor | None]) -> nn.Module:
        if self.parameter_name in module._parameters:
            return twin(module, **tensors)
        other = twin(module)
        name, below = _base(module)
        other.__dict__["_modules"] = {**module._modules, name: self._twin(below, tensors)}
        return other


def _base(module: nn.Module) -> tuple[str, nn.Module]:
    """Return what a layer with adapters stands on, after the name by which it holds it."""
    name: Any = module.base_name
    return name, getattr(module, name)
