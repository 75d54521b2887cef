"""Folding adapters into the base layer's parameters, in one layer, and taking them out again bit for bit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from tunerkit.adapter import AdditiveAdapter
from tunerkit.errors import MergeError, UnknownAdapterError
from tunerkit.naming import listing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tunerkit.adapted_layer import AdaptedLayer
    from tunerkit.adapter import Adapter
    from tunerkit.sites import Below, Site

_HALF = (torch.float16, torch.bfloat16)

_BLOCK = 1 << 18
"""How many numbers are added up at once."""


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


class Lost:
    """The bare layer where its own parameters were not kept: it runs and reads nothing, and is otherwise the layer."""

    def __init__(self, site: Site, names: Sequence[str]) -> None:
        self._site = site
        self._names = names

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class of the site, which says what kind of layer it is."""
        return type(self._site)

    @property
    def base(self) -> Lost:
        """The bare layer: this."""
        return self

    def __getattr__(self, name: str) -> Any:
        if name in {"weight", "bias", "stored", "run", "with_parameters"}:
            raise refusal(self._site.name, self._names)
        return getattr(self._site, name)

    def __call__(self, *_args: Any, **_kwargs: Any) -> Tensor:
        """Raise `MergeError`."""
        raise refusal(self._site.name, self._names)


def refusal(layer: str, names: Sequence[str]) -> MergeError:
    """Return the error for what needs a layer's own parameters, which were not kept when adapters were merged."""
    return MergeError(
        f"{listing(names)} is merged into {layer!r} and the original parameters were not kept (keep_base='none'), so "
        "the bare layer is not to be had. Load the base model again, or go on without it: more can be merged, and "
        "merge_and_unload() gives the merged model."
    )


@dataclass(frozen=True)
class Merged:
    """What is merged into a layer, and the parameters that were there before, the same objects.

    Attributes:
        names: The adapters, in order.
        originals: The parameters by name, if they were kept.
        kept: Whether they were.
    """

    names: tuple[str, ...] = ()
    originals: dict[str, nn.Parameter | None] = field(default_factory=dict)
    kept: bool = True

    def put(self, site: Site, tensors: dict[str, Tensor | None], names: Sequence[str]) -> Merged:
        """Put folded parameters into the layer and return the record with the originals and more names on top.

        The layer gets new parameter objects, so another module that shares the original (a tied weight) is not changed.
        """
        held = site.owner._parameters
        before = {name: held.get(name) for name in tensors}
        for name, tensor in tensors.items():
            old = before[name]
            trains = old is not None and old.requires_grad
            held[name] = None if tensor is None else nn.Parameter(tensor, requires_grad=trains)
        return Merged((*self.names, *names), {**before, **self.originals} if self.kept else {}, self.kept)

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
        """Return the site as it is without what is merged."""
        if not self.kept:
            return cast("Site", Lost(site, self.names))
        device = site.device
        return site.with_parameters(
            {name: None if tensor is None else tensor.to(device) for name, tensor in self.originals.items()}
        )

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move or convert the originals along with the layer, keeping the parameter objects where torch can."""
        for name, original in self.originals.items():
            if original is not None:
                data = fn(original.data)
                if torch._has_compatible_shallow_copy_type(original.data, data):
                    original.data = data
                else:  # to or from the meta device
                    self.originals[name] = nn.Parameter(data, requires_grad=original.requires_grad)


def move(parameter: nn.Parameter, device: torch.device) -> None:
    """Move a parameter to a device, the same object."""
    if parameter.device != device:
        parameter.data = parameter.data.to(device)


def merge_order(layer: AdaptedLayer, asked: Sequence[str]) -> list[str]:
    """Return which of the asked adapters are to be merged now, in the order in which they stand on the layer.

    Raises:
        MergeError: One of them has no merged form, or stands on an adapter that stays and does not commute with it.
    """
    adapters, merged = layer._adapters, layer.merged_adapters
    active = [name for name in layer.active_adapters if name in adapters and name not in merged]
    wanted = [name for name in dict.fromkeys(asked) if name in adapters and name not in merged]
    names = [name for name in active if name in wanted] + [name for name in wanted if name not in active]
    for name in names:
        reason = adapters[name].unfoldable
        if reason is not None:
            msg = f"The adapter {name!r} on {layer.site.name!r} cannot be merged: {reason}. Keep it as an adapter."
            raise MergeError(msg)
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
    with torch.no_grad():
        tensors = _folded(site, bare, adapters)
        for name, tensor in tensors.items():
            if safe and tensor is not None and not torch.isfinite(tensor).all():
                msg = (
                    f"Merging into {site.name!r} would put NaN or infinities into its {name}; "
                    "nothing was changed there."
                )
                raise MergeError(msg)
            # A view of the layer's own tensor must not be held twice.
            if tensor is not None and tensor.data_ptr() == _pointer(site.owner._parameters.get(name)):
                tensors[name] = tensor.clone()
    return tensors


def _folded(site: Site, bare: Site, adapters: Sequence[Adapter]) -> dict[str, Tensor | None]:
    changes = changes_of(site, bare, adapters)
    if changes is not None:
        return {site.weight_name: _sum(site.stored, changes)}
    weight, bias = site.weight, site.bias
    if weight.dtype in _HALF:
        weight, bias = weight.float(), None if bias is None else bias.float()
    below = stacked(adapters, _Given(bare, weight, bias))
    tensors = site.to_stored(below.weight, below.bias)
    # What the adapters leave as it is stays the object it was: an optimiser or another module may hold it.
    for name, unchanged in ((site.weight_name, below.weight is weight), (site.bias_name, below.bias is bias)):
        if unchanged:
            tensors.pop(name, None)
    return tensors


def changes_of(site: Site, bare: Site, adapters: Sequence[Adapter]) -> list[Tensor] | None:
    """Return what adapters add to the weight, in the shape in which the layer stores it, if they do no more than that.

    Then `add_up` gives the folded weight piece by piece, and no tensor of its size is needed besides these.

    Args:
        site: The layer as it is.
        bare: The layer without what is merged already.
        adapters: From the lowest to the topmost.
    """
    adding = [
        adapter for adapter in adapters if isinstance(adapter, AdditiveAdapter) and _adds_to_weight(adapter, bare)
    ]
    if not adding or len(adding) < len(adapters):
        return None
    weight, stored = site.weight, site.stored
    if weight is stored:
        shape = weight.shape
        return [adapter.delta(bare).reshape(shape) for adapter in adding]
    if weight.data_ptr() != stored.data_ptr():  # it is computed from what is stored
        return None
    return [site.as_stored(adapter.delta(bare).reshape(weight.shape)) for adapter in adding]


def _adds_to_weight(adapter: AdditiveAdapter, bare: Site) -> bool:
    return type(adapter).merged is AdditiveAdapter.merged and adapter.delta_bias(bare) is None


def rows_at_once(shape: Sequence[int]) -> int:
    """Return how many rows of a tensor are added up at once."""
    return max(1, _BLOCK // max(1, math.prod(shape[1:])))


def split_rows(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return a tensor as blocks of rows."""
    return torch.atleast_1d(tensor).split(rows_at_once(tensor.shape))  # type: ignore[no-any-return, no-untyped-call]


def add_up(weight: Tensor, changes: Sequence[Tensor]) -> Tensor:
    """Return a weight, or some rows of it, with what is added; half precision is added in float32 and rounded once."""
    exact = weight.float() if weight.dtype in _HALF else weight
    for change in changes:
        exact = exact + change
    return exact.to(weight.dtype)


def _sum(weight: Tensor, changes: Sequence[Tensor]) -> Tensor:
    if weight.numel() <= _BLOCK:
        return add_up(weight, changes)
    total = torch.empty_like(weight)
    for place, own, *added in zip(*(split_rows(tensor) for tensor in (total, weight, *changes)), strict=True):
        place.copy_(add_up(own, added))
    return total


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
    if bare.dtype in _HALF:
        bare = bare.with_parameters({bare.weight_name: bare.stored.float()})
    weight = bare.weight
    delta = adapter.delta(bare) if isinstance(adapter, AdditiveAdapter) else adapter.merged(bare)[0] - weight
    stored = bare.to_stored(delta.reshape(weight.shape), None)[bare.weight_name]
    return cast("Tensor", stored)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
