"""`BaseTunerLayer`: which adapters a layer has, which are active, which train.

It is a mix-in, as in PEFT: a layer written by hand, `class MyLayer(nn.Module, BaseTunerLayer)`, names its containers in
`adapter_layer_names` and `other_param_names` and takes part in everything. The layer that the core itself puts in place
is `tunerkit.adapted_layer.AdaptedLayer`.
"""

from __future__ import annotations

import inspect
import itertools
import warnings
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from tunerkit.errors import AdapterWarning
from tunerkit.modules import cast_up, set_trains
from tunerkit.naming import COMPILED, listing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from typing_extensions import TypeIs

    from tunerkit.modules import Flag
    from tunerkit.route import Owner


class MethodMeta(type):
    """Makes `isinstance(thing, LoraLayer)` mean "it holds an adapter of that method now", whatever class it is of.

    A class declares its method with `class LoraLayer(BaseTunerLayer, method="lora")`, and one for layers of a kind with
    `class Linear(LoraLayer, method="lora", kind="linear")`. Its instances, and those of the class at the root of its
    family, say with `methods` which methods they hold, and with `site_kind` what kind of layer they adapt.
    """

    _method: str | None
    _kind: str | None

    def __new__(
        cls,
        name: str,
        bases: tuple[type, ...],
        namespace: dict[str, Any],
        method: str | None = None,
        kind: str | None = None,
        **kwargs: Any,
    ) -> MethodMeta:
        """Create the class and note its method, and the kind of layer it stands for."""
        made = super().__new__(cls, name, bases, namespace, **kwargs)
        made._method = method
        made._kind = kind
        return made

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **kwargs: Any) -> None:
        del kwargs
        super().__init__(name, bases, namespace)

    def __instancecheck__(cls, thing: object) -> bool:
        method = cls._method
        if method is None:
            return type.__instancecheck__(cls, thing)
        root = next(base for base in reversed(cls.__mro__) if isinstance(base, MethodMeta))
        if not type.__instancecheck__(root, thing) or method not in thing.methods:  # type: ignore[attr-defined]
            return False
        return cls._kind is None or thing.site_kind == cls._kind  # type: ignore[attr-defined]


class BaseTunerLayer(metaclass=MethodMeta):
    """What every layer with adapters can do, with PEFT's names.

    Three things are independent: which adapters are there, which are active (take part in the output), and which train.

    Attributes:
        is_pluggable: Whether such a layer can stand at any place where its base layer can.
        adapter_layer_names: The names of the containers (by adapter) whose tensors can train.
        other_param_names: The names of other containers that hold something by adapter.
        frozen_peft_weight_names: The names of containers whose tensors stay frozen, by adapter.
        merged_adapters: The names of the adapters that are merged into the base layer, in the order of merging.
        base_layer: The layer on which the adapters stand, under this name unless `base_name` gives another.
        base_name: The name of the child on which the adapters stand.
        targeted: Whether adapters come here because their configs target the layer.
        replaces: Whether an adapter stands in for the base layer, which is then neither run nor changed.
        follows_routes: Whether a call's route decides which adapters are run here.
    """

    is_pluggable: ClassVar[bool] = True
    base_name: ClassVar[str] = "base_layer"
    targeted: ClassVar[bool] = True
    replaces: ClassVar[bool] = False
    follows_routes: ClassVar[bool] = False
    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()
    frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}  # noqa: RUF012 - PEFT's layers override it on the instance
    merged_adapters: Sequence[str] = ()
    base_layer: nn.Module

    _is_layer: ClassVar[bool] = True
    _owner: Owner
    _active_adapter: str | list[str] = "default"
    _disable_adapters: bool = False
    _trained_before: list[Tensor] | None = None

    # What is here

    @property
    def site_kind(self) -> str | None:
        """The kind of layer that is adapted (`Site.kind`), or None for a layer written by hand."""
        return None

    @property
    def methods(self) -> frozenset[str]:
        """The ids of the methods whose adapters the layer holds."""
        found = (getattr(kind, "_method", None) for kind in type(self).__mro__)
        return frozenset(method for method in found if isinstance(method, str) and self.available_adapters)

    @property
    def available_adapters(self) -> list[str]:
        """The names of all adapters of the layer, sorted."""
        names: set[str] = set()
        for container in (*self.adapter_layer_names, *self.other_param_names):
            found = getattr(self, container, None)
            if hasattr(found, "keys"):
                names.update(found.keys())  # type: ignore[union-attr]
        return sorted(names)

    def holds(self, name: str) -> bool:
        """Return whether the layer has an adapter."""
        return name in self.available_adapters

    def get_base_layer(self) -> nn.Module:
        """Return the layer below all adapters, also where one such layer wraps another."""
        layer: Any = self
        while is_layer(layer):
            layer = layer.__dict__["_modules"].get(layer.base_name) or getattr(layer, layer.base_name)
        return layer  # type: ignore[no-any-return]

    @property
    def weight(self) -> Tensor:
        """The base layer's weight."""
        return self.get_base_layer().weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.get_base_layer().bias  # type: ignore[return-value]

    def adapter_tensors(self, name: str) -> dict[str, Tensor]:
        """Return what a checkpoint of an adapter holds of this layer: its tensors by their key below the layer."""
        tensors: dict[str, Tensor] = {}
        for container in (*self.adapter_layer_names, *self.other_param_names):
            tensors.update(_tensors_in(getattr(self, container, None), name, container))
        return tensors

    def tensor_name(self, key: str, name: str) -> str:
        """Return what a tensor, given by its key in `adapter_tensors`, is called here: the adapter's name is in it."""
        return entry_name(key, name)

    def cast_up(self, name: str) -> None:
        """Make an adapter's tensors float32 where they are of lower precision, in place."""
        cast_up(self.adapter_tensors(name).values())

    def trainable_tensors(self, name: str) -> Iterable[Tensor]:
        """Go through the tensors of an adapter that train when it does."""
        frozen = self.frozen_peft_weight_names.get(name, ())
        for container in self.adapter_layer_names:
            if container not in frozen:
                for tensor in _tensors_in(getattr(self, container, None), name, container).values():
                    if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                        yield tensor

    # What is active, and what trains

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters, in the order in which they stand on one another."""
        active = self._active_adapter
        return [active] if isinstance(active, str) else list(active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter as it was set: a name, or a list of names."""
        return self._active_adapter

    @property
    def disable_adapters(self) -> bool:
        """Whether the adapters are switched off."""
        return self._disable_adapters

    @property
    def merged(self) -> bool:
        """Whether adapters are merged into the base layer."""
        return bool(self.merged_adapters)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters active and trainable, and freeze the others.

        Args:
            adapter_names: One name or several; names that this layer does not have are passed over.
            inference_mode: Keep the active ones frozen too.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.check_together(names)
        available = self.available_adapters
        trains = [] if inference_mode else [name for name in available if name in names]
        if self._disable_adapters:
            self._trained_before = [tensor for name in trains for tensor in self.trainable_tensors(name)]
            trains = []
        if trains != available:
            self.set_requires_grad([name for name in available if name not in trains], requires_grad=False)
        if trains:
            self.set_requires_grad(trains)
        self._activate(names)

    def check_together(self, names: Sequence[str]) -> None:
        """Raise `AdapterStateError` if these adapters cannot be active together on this layer."""

    def _activate(self, names: list[str]) -> None:
        """Make adapters active without touching what trains."""
        self._active_adapter = names

    # What the model calls; `changed` takes the tensors whose flags are changed, with what these were, before they are.
    # Of a layer written by hand the model has noted all of them.

    def _switch(self, active: list[str], trains: list[str], changed: list[Flag]) -> None:
        """Make adapters active and let all of them train, or none, which is what `trains` holds."""
        del changed
        self.set_adapter(active, inference_mode=not trains)

    def _let_train(self, names: Sequence[str], changed: list[Flag], *, trains: bool) -> None:
        """Say whether adapters train."""
        del changed
        self.set_requires_grad(names, trains)

    def _switch_on(self, changed: list[Flag], *, enabled: bool) -> None:
        """Switch all adapters off, or on again."""
        del changed
        self.enable_adapters(enabled)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Say whether adapters train; names that this layer does not have are passed over."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        available = self.available_adapters if names else ()
        for name in names:
            if name in available:
                set_trains(self.trainable_tensors(name), [], trains=requires_grad)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters of the layer off, or on again.

        Switching off notes which tensors trained and freezes them; switching on lets just those train again.
        """
        if enabled == (not self._disable_adapters):
            return
        before = self._trained_before or []
        if not enabled:
            tensors = (tensor for name in self.available_adapters for tensor in self.trainable_tensors(name))
            before = [tensor for tensor in tensors if tensor.requires_grad]
        set_trains(before, [], trains=enabled)
        self.__dict__.update(_trained_before=None if enabled else before, _disable_adapters=not enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from the layer.

        If it was the only active one, the first of the others by name becomes active, with a warning.
        """
        if not self.holds(adapter_name):
            return
        self._remove(adapter_name)
        active = [name for name in self.active_adapters if name != adapter_name]
        if len(active) == len(self.active_adapters):
            return
        rest = self.available_adapters
        if active or not rest:
            self._activate(active)
            return
        msg = f"The active adapter {adapter_name!r} was deleted; {rest[0]!r} of {listing(rest)} is active now."
        warnings.warn(AdapterWarning(msg), stacklevel=2)
        self.set_adapter(rest[0])

    def _remove(self, name: str) -> None:
        for container in (*self.adapter_layer_names, *self.other_param_names):
            found = getattr(self, container, None)
            if found is not None and name in found:
                del found[name]

    # Merging; what a layer written by hand defines itself

    def check_merge(self, names: Sequence[str]) -> None:
        """Raise `MergeError` if these adapters cannot be merged."""

    def merge_for_good(self, names: list[str]) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Merge adapters without keeping what the base layer was.

        Returns:
            The base layer's parameters that were given up, each with the one in its place.
        """
        self.merge(adapter_names=names)
        return []

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the base layer: those named, or else the active ones; a safe merge refuses NaN."""
        msg = f"{type(self).__name__} does not define merge, so its adapters cannot be merged."
        raise NotImplementedError(msg)

    def unmerge(self) -> None:
        """Take the merged adapters out of the base layer again."""
        msg = f"{type(self).__name__} does not define unmerge."
        raise NotImplementedError(msg)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return whether an adapter can be turned into a low-rank one."""
        del adapter_name
        return False


def is_layer(module: object) -> TypeIs[BaseTunerLayer]:
    """Return `isinstance(module, BaseTunerLayer)`, at a fifth of the cost: that one is answered in Python."""
    return getattr(type(module), "_is_layer", False)


def tuner_layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, BaseTunerLayer]]:
    """Go through the layers with adapters, by path. Costs a walk over the model; no list of them is kept.

    Below such a layer only its base layer is looked into: it may be another one, or hold others.
    """
    found: list[tuple[str, BaseTunerLayer]] = []
    _find_layers(module, prefix, set(), found)
    return iter(found)


def layers_in(module: nn.Module) -> list[BaseTunerLayer]:
    """Return the layers of `tuner_layers`, for less: no path is made."""
    found: list[tuple[None, BaseTunerLayer]] = []
    _find_layers(module, None, set(), found)
    return [layer for _, layer in found]


def _find_layers(module: nn.Module, path: str | None, seen: set[int], found: list[tuple[Any, BaseTunerLayer]]) -> None:
    # A path that is None stays None: it is not asked for.
    if id(module) in seen:
        return
    seen.add(id(module))
    children = module._modules
    if is_layer(module):
        found.append((path, module))
        children = {module.base_name: children.get(module.base_name)}
    for name, child in children.items():
        if child is not None and (child._modules or is_layer(child)):
            _find_layers(child, path if path is None else f"{path}.{name}" if path else name, seen, found)


def original(model: nn.Module) -> nn.Module:
    """Return the model that was compiled, if this is what `torch.compile` returned for one, or else this one."""
    inner = model._modules.get(COMPILED)
    return model if inner is None else inner


def stack_at(module: object) -> Iterator[BaseTunerLayer]:
    """Go through the layers with adapters that stand on one another in a module's place, from the top."""
    while is_layer(module):
        yield module
        module = getattr(module, module.base_name)


def entry_name(key: str, name: str) -> str:
    """Return what a tensor of an adapter is called in the model: the adapter's name stands after that of the entry."""
    entry, dot, rest = key.partition(".")
    return f"{entry}.{name}{dot}{rest}"


def _tensors_in(container: Any, name: str, prefix: str) -> dict[str, Tensor]:
    if container is None or name not in container:
        return {}
    content = container[name]
    if isinstance(content, nn.Module):
        return {f"{prefix}.{key}": value for key, value in content.state_dict(keep_vars=True).items()}
    return {prefix: content} if isinstance(content, Tensor) else {}


def split_input(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Separate a layer's input from its other arguments; if all are given by name, it is the layer's first."""
    if args:
        return args[0], args[1:], kwargs
    given = [name for name in inspect.signature(module.forward).parameters if name in kwargs]
    first = next(iter(given or kwargs))
    return kwargs[first], (), {name: value for name, value in kwargs.items() if name != first}


def own_call(kind: type[BaseTunerLayer], name: str) -> Any:
    """Return what a method's layer class defines beyond `BaseTunerLayer` under a name, or None."""
    own = itertools.takewhile(lambda base: base is not BaseTunerLayer, kind.__mro__)
    return next((vars(base)[name] for base in own if name in vars(base)), None)
