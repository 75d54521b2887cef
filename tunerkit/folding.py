"""Folding adapters into the base layer's parameters, in one layer, and taking them out again bit for bit."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from tunerkit.absent import Absent
from tunerkit.adapter import AdditiveAdapter
from tunerkit.errors import MergeError, UnknownAdapterError
from tunerkit.naming import listing
from tunerkit.sums import HALF, Product, sum_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tunerkit.adapted_layer import AdaptedLayer
    from tunerkit.adapter import Adapter
    from tunerkit.sites import Below, Site
    from tunerkit.sums import Change


class Stacked:
    """An adapter on what is below it, and itself what the next adapter stands on. Made for one call."""

    __slots__ = ("_folded", "adapter", "below")

    def __init__(self, adapter: Adapter, below: Below) -> None:
        self.adapter = adapter
        self.below = below
        self._folded: tuple[Tensor, Tensor | None] | None = None

    @property
    def folded(self) -> tuple[Tensor, Tensor | None]:
        """The weight and bias with the adapter folded in."""
        if self._folded is None:
            self._folded = self.adapter.merged(self.below)
        return self._folded

    @property
    def weight(self) -> Tensor:
        """The weight with the adapter folded in."""
        return self.folded[0]

    @property
    def bias(self) -> Tensor | None:
        """The bias with the adapter folded in."""
        return self.folded[1]

    @property
    def base(self) -> Site:
        """The bare layer."""
        return self.below.base

    def __call__(self, x: Tensor) -> Tensor:
        """Run the layer with the adapter."""
        return self.adapter.forward(x, self.below)

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Run the layer with these parameters."""
        return self.below.run(x, weight, bias)


def stacked(adapters: Sequence[Adapter], below: Below) -> Below:
    """Return adapters on what is below them, from the lowest up."""
    for adapter in adapters:
        below = Stacked(adapter, below)
    return below


class _Given:
    """A layer whose parameters are given: the current ones in the precision in which adapters are folded."""

    def __init__(self, base: Site, weight: Tensor, bias: Tensor | None) -> None:
        self.base = base
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x, self.weight, self.bias)

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.base.run(x, weight, bias)


def refusal(layer: str, names: Sequence[str]) -> MergeError:
    """Return the error for what needs a layer's own parameters, which were not kept when adapters were merged."""
    return MergeError(
        f"{listing(names)} is merged into {layer!r} and the original parameters were not kept (keep_base='none'), so "
        "the bare layer is not to be had. Load the base model again, or go on without it: more can be merged, and "
        "merge_and_unload() gives the merged model."
    )


class Merged(NamedTuple):
    """What is merged into a layer, and the parameters that were there before, the same objects.

    Attributes:
        names: The adapters, in order.
        originals: The parameters by name, if they were kept.
        kept: Whether they were.
        rounding: How far a quantised weight is from the exact one; see the function.
    """

    names: tuple[str, ...]
    originals: dict[str, nn.Parameter | None]
    kept: bool = True
    rounding: float = 0.0

    def put(self, site: Site, tensors: dict[str, Tensor | None], names: Sequence[str], rounding: float = 0.0) -> Merged:
        """Put folded parameters into the layer and return the record with the originals and more names on top.

        The layer gets new parameter objects, so another module that shares the original (a tied weight) is not changed.
        """
        held = site.owner._parameters
        before = {name: held.get(name) for name in tensors}
        for name, tensor in tensors.items():
            old = before[name]
            trains = old is not None and old.requires_grad
            if isinstance(tensor, nn.Parameter) and type(tensor) is not nn.Parameter:  # ready-made by the site
                held[name] = tensor
                continue
            held[name] = None if tensor is None else nn.Parameter(tensor, requires_grad=trains)
        originals = {**before, **self.originals} if self.kept else {}
        return Merged((*self.names, *names), originals, self.kept, rounding)

    def take_out(self, site: Site) -> None:
        """Put the original parameters back, on the device on which the layer is now.

        Raises:
            MergeError: They were not kept.
        """
        if not self.kept:
            raise refusal(site.name, self.names)
        held = site.owner._parameters
        for name, original in self.originals.items():
            now = held.get(name)
            if original is not None and now is not None:
                move(original, now.device)
            held[name] = original

    def bare(self, site: Site) -> Site:
        """Return the site as it is without what is merged.

        Originals that wait on another device are moved when they are read, which many adapters do not do. Of those that
        were not kept only the form is there, and reading them raises `MergeError`.
        """
        device = site.device
        if self.kept:
            return site.with_parameters({name: _brought(tensor, device) for name, tensor in self.originals.items()})

        def refuse() -> Tensor:
            raise refusal(site.name, self.names)

        own = ((name, site.owner._parameters.get(name)) for name in (site.weight_name, site.bias_name))
        return site.with_parameters(
            {name: Absent(tensor.detach(), device, refuse) for name, tensor in own if tensor is not None}
        )

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move or convert the originals along with the layer, keeping the parameter objects where torch can."""
        for name, original in self.originals.items():
            if original is not None:
                data = fn(original.data if type(original) is nn.Parameter else original)
                if isinstance(data, nn.Parameter):  # of a class of its own, which brings what belongs to its numbers
                    self.originals[name] = data
                elif torch._has_compatible_shallow_copy_type(original.data, data):
                    original.data = data
                else:  # to or from the meta device
                    self.originals[name] = nn.Parameter(data, requires_grad=original.requires_grad)


def _brought(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """Return a tensor on a device, to which it is moved when it is read."""
    if tensor is None or tensor.device == device:
        return tensor
    if torch.compiler.is_compiling():  # a graph moves what it uses
        return tensor.to(device)
    form = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return Absent(form, device, functools.partial(tensor.to, device))


def move(parameter: nn.Parameter, device: torch.device) -> None:
    """Move a parameter to a device, the same object."""
    if parameter.device != device:
        parameter.data = parameter.data.to(device)


def merge_order(layer: AdaptedLayer, asked: Sequence[str]) -> list[str]:
    """Return which of the asked adapters are to be merged now, in the order in which they stand on the layer.

    Raises:
        MergeError: One of them has no merged form, or stands on an adapter that stays and does not commute with it.
    """
    adapters, merged = layer._adapters, layer._merged
    inside = () if merged is None else merged.names
    active = [name for name in layer.active_adapters if name in adapters and name not in inside]
    wanted = [name for name in dict.fromkeys(asked) if name in adapters and name not in inside]
    names = active
    if wanted != active:
        names = [name for name in active if name in wanted] + [name for name in wanted if name not in active]
    for name in names:
        reason = adapters[name].unfoldable
        if reason is not None:
            msg = f"The adapter {name!r} on {layer.site.name!r} cannot be merged: {reason}. Keep it as an adapter."
            raise MergeError(msg)
        if names is active:
            continue
        under = active[: active.index(name)] if name in active else active
        for other in under:
            if other not in names and not (adapters[name].commutes and adapters[other].commutes):
                msg = (
                    f"On {layer.site.name!r} the adapters stand in the order {listing(active)}, and {name!r} does not "
                    f"commute with {other!r} below it, so merging it alone would change the output. Merge both, or "
                    f"activate {name!r} first with set_adapter([...])."
                )
                raise MergeError(msg)
    return names


def fold(site: Site, bare: Site, adapters: Sequence[Adapter], *, safe: bool) -> dict[str, Tensor | None]:
    """Return the layer's parameters with adapters folded in, in the form in which the layer stores them.

    A base of half precision is folded in float32 and rounded once. What the adapters do not change is left out.

    Args:
        site: The layer as it is.
        bare: The layer without what is merged already.
        adapters: From the lowest to the topmost.
        safe: Refuse NaN and infinities.

    Raises:
        MergeError: The result holds NaN or infinities and `safe` is set.
    """
    if torch.is_grad_enabled():  # whoever folds in many layers switches it off once
        with torch.no_grad():
            return fold(site, bare, adapters, safe=safe)
    changes = changes_of(site, bare, adapters)
    tensors: dict[str, Tensor | None]
    tensors = _folded(site, bare, adapters) if changes is None else {site.weight_name: sum_of(site.stored, changes)}
    shown = {**tensors, site.weight_name: site.with_parameters(tensors).weight} if safe and site.quantised else tensors
    for name, tensor in shown.items() if safe else ():
        if tensor is not None and not torch.isfinite(tensor).all():
            msg = f"Merging into {site.name!r} would put NaN or infinities into its {name}; nothing was changed there."
            raise MergeError(msg)
    return tensors


def rounding(site: Site, bare: Site, adapters: Sequence[Adapter], tensors: dict[str, Tensor | None]) -> float:
    """Return how far a folded weight is, as the layer stores it, from the exact one, relative to the norm of that.

    Args:
        site: The layer before.
        bare: The layer without what was merged already.
        adapters: From the lowest to the topmost.
        tensors: What `fold` made of them.
    """
    with torch.no_grad():
        exact = stacked(adapters, _wide(site, bare)).weight
        difference = site.with_parameters(tensors).weight.to(exact.dtype) - exact
        return float(difference.norm() / exact.norm().clamp_min(torch.finfo(exact.dtype).tiny))


def _wide(site: Site, bare: Site) -> _Given:
    """Return a layer's parameters in the precision in which adapters are folded into them."""
    weight, bias = site.weight, site.bias
    if weight.dtype in HALF:
        weight, bias = weight.float(), None if bias is None else bias.float()
    return _Given(bare, weight, bias)


def _folded(site: Site, bare: Site, adapters: Sequence[Adapter]) -> dict[str, Tensor | None]:
    given, held = _wide(site, bare), site.owner._parameters
    below = stacked(adapters, given)
    tensors = site.to_stored(below.weight, below.bias)
    # What the adapters leave as it is stays the object it was: an optimiser or another module may hold it.
    same = (site.weight_name, below.weight is given.weight), (site.bias_name, below.bias is given.bias)
    for name, unchanged in same:
        if unchanged:
            tensors.pop(name, None)
    for name, tensor in tensors.items():
        # A view of the layer's own tensor must not be held twice.
        if tensor is not None and tensor.data_ptr() == _pointer(held.get(name)):
            tensors[name] = tensor.clone()
    return tensors


def changes_of(site: Site, bare: Site, adapters: Sequence[Adapter]) -> list[Change] | None:
    """Return what adapters add to the weight, in the shape in which the layer stores it, if they do no more than that.

    Then `sum_of` gives the folded weight piece by piece, and no tensor of its size is needed besides these.

    Args:
        site: The layer as it is.
        bare: The layer without what is merged already.
        adapters: From the lowest to the topmost.
    """
    ways = [_way_of_adding(type(adapter)) for adapter in adapters]  # type: ignore[arg-type]
    if not ways or None in ways or site.quantised:
        return None
    weight, stored = site.weight, site.stored
    if weight is not stored and weight.data_ptr() != stored.data_ptr():  # it is computed from what is stored
        return None
    changes: list[Change] = []
    for adapter, way in zip(cast("Sequence[AdditiveAdapter]", adapters), ways, strict=True):
        if adapter.delta_bias(bare) is not None:
            return None
        product = adapter.product(bare) if way == "product" else None
        if product is None:
            change = adapter.delta(bare).reshape(weight.shape)
            changes.append(change if weight is stored else site.as_stored(change))
        else:
            left, right, scaling = product
            if site.transposed:
                left, right = right.T, left.T
            changes.append(Product(left, right, scaling, stored.shape))
    return changes


@functools.cache
def _way_of_adding(kind: type[Adapter]) -> str | None:
    """Return which method says what adapters of a class add to the weight, or None if they may do something else.

    A `product` that is inherited does not count for a class with a `delta` of its own.
    """
    if not issubclass(kind, AdditiveAdapter) or kind.merged is not AdditiveAdapter.merged:
        return None
    says = ("product", "delta")
    return next(word for base in kind.__mro__ for word in says if word in vars(base))


def delta_weight(bare: Site, adapters: Mapping[str, Adapter], name: str) -> Tensor:
    """Return by how much an adapter alone changes the weight of the bare layer, in the form the layer stores it.

    With a base of half precision it is computed in float32 and not rounded.

    Raises:
        UnknownAdapterError: The layer has no such adapter.
        MergeError: The adapter has no merged form.
    """
    adapter = adapters.get(name)
    if adapter is None:
        msg = f"The layer {bare.name!r} has no adapter {name!r}; it has {listing(sorted(adapters))}."
        raise UnknownAdapterError(msg)
    if adapter.unfoldable is not None:
        msg = f"The adapter {name!r} on {bare.name!r} does not change its weight: {adapter.unfoldable}."
        raise MergeError(msg)
    if bare.dtype in HALF:
        bare = bare.with_parameters({bare.weight_name: bare.stored.float()})
    weight = bare.weight
    delta = adapter.delta(bare) if isinstance(adapter, AdditiveAdapter) else adapter.merged(bare)[0] - weight
    return bare.as_stored(delta.reshape(weight.shape)).to(weight.dtype)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
