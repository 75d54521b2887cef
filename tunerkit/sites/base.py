"""`Site`: what a base layer is, so that a method need not know.

A site shows the layer's weight as a matrix (out x in) whatever way the layer stores it, runs the layer, and runs it
with other parameters in place of its own. A method that is a formula on that matrix works on every kind of site.
"""

from __future__ import annotations

import functools
import math
from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tunerkit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Made = TypeVar("Made")
Module = TypeVar("Module", bound=nn.Module)


class Below(Protocol):
    """What an adapter stands on: the layer, and the adapters under this one."""

    @property
    def weight(self) -> Tensor:
        """The weight with all adapters below folded in, out x in."""

    @property
    def bias(self) -> Tensor | None:
        """The bias with all adapters below folded in, of size out."""

    @property
    def base(self) -> Site:
        """The bare layer, without any adapter."""

    def __call__(self, x: Tensor) -> Tensor:
        """Run the layer with all adapters below on `x`, and on whatever else the layer was called with."""

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Run the layer on `x`, and on whatever else it was called with, with these parameters in place of its own.

        Args:
            x: The layer's input.
            weight: A weight of the shape of `self.weight`; it is cast to the dtype of the layer.
            bias: A bias of size out, or None.
        """


_LARGEST = 2**63 - 1
"""Bytes: what counts them has no more bits."""

_ON_META: ContextVar[bool] = ContextVar("on_meta", default=False)


def make_on_meta(make: Callable[[], Made]) -> Made:
    """Call `make`, for which sites make their new tensors on the meta device, without memory or initial values.

    It runs in a copy of the context, so however it ends, nothing outside has to be put back.
    """

    def on_meta() -> Made:
        _ON_META.set(True)
        return make()

    return copy_context().run(on_meta)


def is_making_on_meta() -> bool:
    """Return whether the adapter is being made on the meta device, to be filled by a checkpoint later.

    Then `Site.zeros` and its like give tensors without numbers, and a start that is computed can be left out.
    """
    return _ON_META.get()


@functools.lru_cache(64)
def _blank(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


_BOUND = frozenset({"forward", "_compiled_call_impl"})


def twin(module: Module, **parameters: Tensor | None) -> Module:
    """Return a shallow copy of a module that holds other parameters.

    The copy shares everything else (settings, children, hooks) with the module, which is not touched: other threads may
    run it meanwhile. It is good for one call.

    Args:
        module: The module.
        parameters: The parameters that are to stand in for its own, by their names in it.
    """
    other = object.__new__(type(module))
    # What is bound to the original would run with its parameters: a `forward` set on the instance (by an offloader),
    # and what `module.compile()` leaves.
    state = {name: value for name, value in module.__dict__.items() if name not in _BOUND}
    state["_parameters"] = {**module._parameters, **parameters}
    other.__dict__.update(state)
    return other


def unfit_weight(module: nn.Module) -> str | None:
    """Return why a layer's weight cannot be adapted, or None."""
    weight: Any = module._parameters.get("weight")
    if weight is None:
        return "its weight is not a parameter of its own (it is parametrized, or computed by a hook); remove that first"
    if is_lazy(weight):
        return "its weight has no shape before the layer is first run; run the model once first"
    if not weight.is_floating_point():
        return f"its weight is stored as {weight.dtype}, for which no installed package teaches a site"
    return None


class Site:
    """A base layer as the methods see it; the lowest thing an adapter can stand on.

    Attributes:
        kind: The kind of layer, by which a method says what it adapts.
        crosses_rows: Why rows of one batch cannot have adapters of their own at such a layer, or None if they can.
        along: The names of children that are adapted along with the module.
        transposed: Whether the layer stores its weight in x out.
        quantised: Whether the layer stores its weight with far fewer digits than it computes with, so that merging
            rounds it; how far is then reported.
        backend: The library that stores it so, and in how many bits, as PEFT spells it in a model's status, or None.
        module: The layer itself.
        name: Its path in the model.
    """

    kind: ClassVar[str] = "module"
    crosses_rows: ClassVar[str | None] = None
    along: ClassVar[tuple[str, ...]] = ()
    transposed: ClassVar[bool] = False
    quantised: ClassVar[bool] = False
    backend: ClassVar[str | None] = None
    __slots__ = ("module", "name")

    def __init__(self, module: nn.Module, name: str = "") -> None:
        self.module = module
        self.name = name

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the layer as it is."""
        return self.module(x, *args, **kwargs)  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name or 'unnamed'}: {type(self.module).__name__})"

    def at(self, module: nn.Module) -> Site:
        """Return this site with another module in the layer's place: FSDP, quantisers and offloaders change it."""
        return type(self)(module, self.name)

    @classmethod
    def takes(cls, module: nn.Module) -> str | None:
        """Return why this very module cannot be adapted although its type could, or None."""
        del module
        return None

    @classmethod
    def alone(cls, module: nn.Module) -> str | None:
        """Return why the layer can be adapted only along with another, which names it in `along`, or None."""
        del module
        return None

    @classmethod
    def parameters_of(cls, module: nn.Module) -> tuple[str, ...]:
        """Return the names of the parameters that are adapted one by one; none if the layer is adapted as a whole."""
        del module
        return ()

    @property
    def settings_name(self) -> str:
        """The path by which a config's settings for single layers, such as `rank_pattern`, find this one."""
        return self.name

    @property
    def owner(self) -> nn.Module:
        """The module that holds the parameters."""
        return self.module

    @property
    def weight_name(self) -> str:
        """The name of the parameter that is the weight."""
        return "weight"

    @property
    def bias_name(self) -> str:
        """The name of the parameter that is the bias, where the layer has one."""
        return "bias"

    @property
    def read(self) -> tuple[str, ...]:
        """The names of the parameters that code around the layer reads itself, whether or not it calls the layer too.

        What is read is then the parameter with the adapters folded in.
        """
        return ()

    @property
    def stored(self) -> Tensor:
        """The weight as the layer stores it."""
        own = self.module._parameters.get("weight")  # asked first: torch looks up an attribute in Python
        return self.module.weight if own is None else own  # type: ignore[return-value]

    @property
    def weight(self) -> Tensor:
        """The layer's weight, as a matrix out x in where the layer has one."""
        return self.stored

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias, of size out, or None."""
        return self.module._parameters.get(self.bias_name)

    @property
    def base(self) -> Site:
        """The bare layer: this."""
        return self

    @property
    def in_features(self) -> int:
        """The number of columns of the weight."""
        return self.weight.shape[-1]

    @property
    def out_features(self) -> int:
        """The number of rows of the weight."""
        return self.weight.shape[-2]

    @property
    def channels(self) -> int:
        """How many channels the input has: `in_features`, but for convolutions."""
        return self.in_features

    @property
    def groups(self) -> int:
        """Into how many groups the input's channels are divided, of which each row of the weight sees one."""
        return 1

    def scale_inputs(self, scale: Tensor) -> Tensor:
        """Return the matrix by which to multiply the weight, entry by entry, to scale the channels of the input.

        Args:
            scale: A number for each channel, `channels` in all.

        Returns:
            A matrix that can be broadcast to the shape of `weight`.
        """
        return scale.reshape(1, -1)

    @property
    def device(self) -> torch.device:
        """The device of the weight."""
        return self.stored.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight, in which new tensors are made."""
        return self.stored.dtype

    def as_stored(self, weight: Tensor) -> Tensor:
        """Return a weight, or something that is added to one, in the shape in which the layer stores its own.

        Args:
            weight: A tensor in the form of `self.weight`, of any dtype, which it keeps.
        """
        return weight.reshape(self.stored.shape)

    def to_stored(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor | None]:
        """Return parameters in the form and dtype in which the layer stores them, by name.

        Where the layer's parameters are of a class of their own, as quantised ones are, these are of it too.

        Args:
            weight: A weight in the form of `self.weight`.
            bias: A bias of size out, or None.
        """
        stored = self.stored
        tensors: dict[str, Tensor | None] = {self.weight_name: self.as_stored(weight).to(stored.dtype)}
        if bias is not None or self.bias is not None:
            tensors[self.bias_name] = None if bias is None else bias.to(stored.dtype)
        return tensors

    def fitted(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor | None]:
        """Return parameters, by name, that can stand in for the layer's own during a call.

        Args:
            weight: A weight in the form of `self.weight`.
            bias: A bias of size out, or None.
        """
        return self.to_stored(weight, bias)

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """Run the layer on `x` with these parameters in place of its own.

        Args:
            x: The layer's input.
            weight: A weight in the form of `self.weight`.
            bias: A bias of size out, or None.
            args: What else the layer's `forward` takes.
            kwargs: The same, by name.
        """
        return self.with_parameters(self.fitted(weight, bias)).module(x, *args, **kwargs)  # type: ignore[no-any-return]

    def with_parameters(self, tensors: Mapping[str, Tensor | None]) -> Site:
        """Return this site with other parameters, for one call; the layer itself is not touched.

        Args:
            tensors: The parameters by name, as `fitted` gives them.
        """
        return self.at(twin(self.module, **tensors))

    def dequantised(self) -> nn.Module:
        """Return a layer that computes the same with a weight that can be changed without rounding it: itself."""
        return self.module

    def empty(self, *shape: int) -> Tensor:
        """Return a new tensor for an adapter at this site: on its device, of its dtype, not initialised.

        Where the layer stores whole numbers it is float32.

        Raises:
            ConfigError: It would be larger than any memory.
        """
        stored, meta = self.stored, _ON_META.get()
        dtype = stored.dtype
        if not dtype.is_floating_point:
            dtype = torch.float32
        try:
            if meta:
                return _blank(shape, dtype).detach()  # another tensor, in a quarter of the time
            if type(stored) is nn.Parameter and dtype is stored.dtype:
                return stored.new_empty(shape)  # the same in half the time
            return torch.empty(shape, dtype=dtype, device=stored.device)
        except RuntimeError as error:
            if math.prod(shape) * dtype.itemsize <= _LARGEST:
                raise  # it is merely larger than this machine's memory
            msg = f"A tensor of shape {shape} is larger than any memory. Check the sizes in the config."
            raise ConfigError(msg) from error

    def zeros(self, *shape: int) -> Tensor:
        """Return a new tensor of zeros for an adapter at this site."""
        tensor = self.empty(*shape)
        return tensor if tensor.is_meta else tensor.zero_()

    def ones(self, *shape: int) -> Tensor:
        """Return a new tensor of ones for an adapter at this site."""
        tensor = self.empty(*shape)
        return tensor if tensor.is_meta else tensor.fill_(1)

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        """Return a new tensor of numbers drawn from a normal distribution around 0 for an adapter at this site."""
        tensor = self.empty(*shape)
        return tensor if tensor.is_meta else tensor.normal_(std=std)

    def uniform(self, *shape: int, bound: float) -> Tensor:
        """Return a new tensor of numbers drawn evenly from -bound to bound for an adapter at this site."""
        tensor = self.empty(*shape)
        return tensor if tensor.is_meta else tensor.uniform_(-bound, bound)

    def kaiming_uniform(self, *shape: int) -> Tensor:
        """Return a new tensor as `nn.Linear` starts its weight: uniform within 1 / sqrt(columns)."""
        return self.uniform(*shape, bound=1 / math.sqrt(max(shape[-1], 1)))


class Bound:
    """A site together with the other arguments of one call of the layer."""

    __slots__ = ("args", "base", "kwargs", "site")

    def __init__(self, site: Site, base: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.site = site
        self.base = base
        self.args = args
        self.kwargs = kwargs

    @property
    def weight(self) -> Tensor:
        """The layer's weight."""
        return self.site.weight

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias."""
        return self.site.bias

    def __call__(self, x: Tensor) -> Tensor:
        """Run the layer as it is."""
        return self.site(x, *self.args, **self.kwargs)

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Run the layer with these parameters in place of its own."""
        return self.site.run(x, weight, bias, *self.args, **self.kwargs)
