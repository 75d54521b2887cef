"""`AdapterHolder`: which adapters a layer of the core has, which are active, and which train."""

from __future__ import annotations

from operator import itemgetter
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tunerkit.errors import AdapterStateError, PluginError
from tunerkit.layer import BaseTunerLayer, is_layer
from tunerkit.lean import begin
from tunerkit.modules import cast_up, frozen_keys, parameters_in, set_modes, set_trains, state_of, tensors_in
from tunerkit.names import entries_of, expose, withdraw
from tunerkit.naming import closest, listing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tunerkit.adapter import Adapter
    from tunerkit.folding import Merged
    from tunerkit.modules import Flag
    from tunerkit.route import Owner
    from tunerkit.sites import Site

_ACTIVITY_NAMES = (
    "_stack",
    "_sole",
    "_merged",
    "_active_adapter",
    "_disable_adapters",
    "_trained_before",
    "_merged_before",
)
_ACTIVITY = itemgetter(*_ACTIVITY_NAMES)


class AdapterHolder(nn.Module, BaseTunerLayer):
    """A base layer and its adapters, without what is done with them.

    What is active is resolved when it changes, into an immutable tuple that is swapped in one assignment.

    Args:
        site: The base layer.
        owner: Stands for the model to which the layer belongs.
    """

    base_layer: nn.Module

    def __init__(self, site: Site, owner: Owner) -> None:
        begin(self)
        self._modules["base_layer"] = site.module
        self.__dict__.update(
            training=site.module.training,
            _adapters={},
            _stack=(),
            _sole=None,
            _site=site,
            _owner=owner,
            _merged=None,
            _active_adapter=[],
            _disable_adapters=False,
            _trained_before=None,
            _merged_before=None,
            _number=owner.number(),
        )

    _adapters: dict[str, Adapter]
    _stack: tuple[Adapter, ...]
    _sole: Adapter | None
    _site: Site
    _merged: Merged | None
    _merged_before: list[str] | None
    _number: int

    # Adapters

    @property
    def site_kind(self) -> str:
        """The kind of layer that is adapted."""
        return self._site.kind

    @property
    def methods(self) -> frozenset[str]:
        """The ids of the methods whose adapters the layer holds."""
        return frozenset(adapter.__dict__["_method"] for adapter in self._adapters.values())

    @property
    def merged(self) -> bool:
        """Whether adapters are merged into the base layer."""
        return self._merged is not None

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]
        """The names of the adapters that are merged, in order."""
        return [] if self._merged is None else list(self._merged.names)

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The adapters by name."""
        return dict(self._adapters)

    def get_base_layer(self) -> nn.Module:
        """Return the layer below all adapters, also where one such layer wraps another."""
        base: nn.Module = self._modules["base_layer"]  # type: ignore[assignment]
        return base.get_base_layer() if base._modules and is_layer(base) else base

    @property
    def available_adapters(self) -> list[str]:
        """The names of all adapters of the layer, sorted."""
        return sorted(self._adapters)

    def holds(self, name: str) -> bool:
        """Return whether the layer has an adapter."""
        return name in self._adapters

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """The names of the entries that hold the adapters' tensors."""
        return tuple(name for name in self._modules if name != "base_layer")

    def add_adapter(
        self,
        name: str,
        adapter: Adapter,
        method: str,
        layer_class: type[BaseTunerLayer] = BaseTunerLayer,
        *,
        upcast: bool = False,
        trains: bool = True,
    ) -> None:
        """Take in an adapter; it is not active yet.

        Args:
            name: Its name, not taken on this layer.
            adapter: The adapter.
            method: The id of its method.
            layer_class: The method's layer class, whose own calls this layer then answers too.
            upcast: Make its tensors of lower precision float32.
            trains: Let its tensors train as they do now, rather than freeze them till it is made active.

        Raises:
            PluginError: The adapter holds tensors under names that its class does not declare, or this layer has; or
                its class declares a setting that it does not have.
        """
        for entry in entries_of(adapter):
            if entry not in adapter.entries:
                msg = (
                    f"The adapter class {type(adapter).__name__} of {method!r} holds tensors under {entry!r}, which "
                    f"its `entries` {adapter.entries} does not name. Add it, so that checkpoints can be matched."
                )
                raise PluginError(msg)
        for setting in adapter.settings:
            if not hasattr(adapter, setting):
                near = closest(setting, adapter.__dict__, count=1)
                hint = f"Did you mean {near[0]!r}?" if near else "Set it in `__init__`."
                msg = (
                    f"The adapter class {type(adapter).__name__} of {method!r} names {setting!r} in its `settings`, "
                    f"and the adapter has no such attribute. {hint}"
                )
                raise PluginError(msg)
        tensors, device = tensors_in(adapter), self._site.device
        for tensor in tensors:
            if tensor.device != device and not tensor.is_meta:
                tensor.data = tensor.data.to(device)  # it was made without asking the site
        state = adapter.__dict__
        state["_method"], state["_layer_class"] = method, layer_class
        state["_frozen"] = frozen_keys(adapter, tensors)
        # Here, where its tensors are at hand: finding them once more costs as much as what is done to them.
        if upcast:
            _cast_up(adapter, tensors)
        if not trains:
            set_trains([one for one in tensors if isinstance(one, nn.Parameter)], [], trains=False)
        if adapter.training != self.training:
            set_modes((adapter,), self.training)
        self._adapters[name] = adapter
        expose(self, self._adapters, name)  # type: ignore[arg-type]

    def adapter_tensors(self, name: str) -> dict[str, Tensor]:
        """Return an adapter's own tensors (parameters and persistent buffers) by their key below the layer."""
        adapter = self._adapters.get(name)
        return {} if adapter is None else state_of(adapter)

    def cast_up(self, name: str) -> None:
        """Make an adapter's tensors float32 where they are of lower precision, in place."""
        adapter = self._adapters.get(name)
        if adapter is not None:
            _cast_up(adapter, tensors_in(adapter))

    def trainable_tensors(self, name: str) -> Sequence[Tensor]:
        """Return the tensors of an adapter that train when it does."""
        adapter = self._adapters.get(name)
        if adapter is None:
            return ()
        frozen: frozenset[str] = adapter.__dict__["_frozen"]
        if not frozen:
            return parameters_in(adapter)
        return [tensor for key, tensor in adapter.named_parameters() if key not in frozen]

    def _remove(self, name: str) -> None:
        if name in self.merged_adapters:
            msg = f"The adapter {name!r} is merged into {self._site.name!r}. Call unmerge_adapter() before deleting it."
            raise AdapterStateError(msg)
        del self._adapters[name]
        withdraw(self, self._adapters)  # type: ignore[arg-type]
        self._settle()

    # What is active, and what trains

    @property
    def activity(self) -> tuple[Any, ...]:
        """What is active, switched off and merged; `resume` puts it back."""
        return tuple(_ACTIVITY(self.__dict__))

    def resume(self, activity: tuple[Any, ...]) -> None:
        """Put back what was active, switched off and merged; the base layer's parameters are not its business."""
        self.__dict__.update(zip(_ACTIVITY_NAMES, activity, strict=True))
        self._owner.changes += 1

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters active and trainable, and freeze the others; see `BaseTunerLayer.set_adapter`."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.check_together(names)
        self._set(names, [] if inference_mode else names, [])

    # The model calls these three. They pass over the methods with PEFT's names, unless a subclass has its own: then
    # what trains is noted first, for such a method does not know `changed`.

    def _switch(self, active: list[str], trains: list[str], changed: list[Flag]) -> None:
        """Make adapters active and let all of them train, or none, which is what `trains` holds."""
        if type(self).set_adapter is AdapterHolder.set_adapter:
            self._set(active, trains, changed)
        else:
            changed += self._flags()
            super()._switch(active, trains, changed)

    def _let_train(self, names: Sequence[str], changed: list[Flag], *, trains: bool) -> None:
        """Say whether adapters train."""
        if type(self).set_requires_grad is AdapterHolder.set_requires_grad:
            self._set_trains(names, changed, trains=trains)
        else:
            changed += self._flags()
            super()._let_train(names, changed, trains=trains)

    def _switch_on(self, changed: list[Flag], *, enabled: bool) -> None:
        """Switch all adapters off, or on again."""
        if type(self).enable_adapters is AdapterHolder.enable_adapters:
            self._enable(changed, enabled=enabled)
        else:
            changed += self._flags()
            super()._switch_on(changed, enabled=enabled)

    def _flags(self) -> list[Flag]:
        """Return which of the adapters' tensors train now."""
        return [(one, one.requires_grad) for name in self._adapters for one in self.trainable_tensors(name)]

    def _set(self, active: list[str], trains: list[str], changed: list[Flag]) -> None:
        """Make adapters active, let some of them train, and freeze the others; names not known here are passed over.

        While all are switched off, those that are to train do so as soon as they are on again.
        """
        if self._disable_adapters:
            self.__dict__["_trained_before"] = [one for name in trains for one in self.trainable_tensors(name)]
            trains = []
        for name in self._adapters:
            if name not in trains:
                set_trains(self.trainable_tensors(name), changed, trains=False)
        for name in trains:
            set_trains(self.trainable_tensors(name), changed, trains=True)
        self._activate(active)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Say whether adapters train; names that this layer does not have are passed over."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._set_trains(names, [], trains=requires_grad)

    def _set_trains(self, names: Sequence[str], changed: list[Flag], *, trains: bool) -> None:
        """Say whether adapters train; names that this layer does not have are passed over."""
        for name in names:
            set_trains(self.trainable_tensors(name), changed, trains=trains)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters off, or on again; what is merged is taken out and put back: off means the base layer."""
        self._enable([], enabled=enabled)

    def _enable(self, changed: list[Flag], *, enabled: bool) -> None:
        """Switch all adapters off, or on again; see `enable_adapters`."""
        if enabled != self._disable_adapters:
            return
        state = self.__dict__
        if enabled:
            set_trains(self._trained_before or (), changed, trains=True)
            merged = self._merged_before
            state.update(_disable_adapters=False, _trained_before=None, _merged_before=None)
            self._settle()
            if merged:
                self.merge(adapter_names=merged)
            return
        merged = self.merged_adapters
        if merged:
            self.unmerge()
        tensors = [tensor for name in self._adapters for tensor in self.trainable_tensors(name)]
        trained = [tensor for tensor in tensors if tensor.requires_grad]
        set_trains(trained, changed, trains=False)
        state.update(_disable_adapters=True, _trained_before=trained, _merged_before=merged)
        self._settle()

    def _activate(self, names: list[str]) -> None:
        if names != self.active_adapters:
            self.__dict__["_merged_before"] = None  # others are to take part when the adapters are switched on again
        self.__dict__["_active_adapter"] = list(names)
        self._settle()

    def check_together(self, names: Sequence[str]) -> None:
        """Raise `AdapterStateError` if these adapters cannot be active together on this layer."""
        stack = [self._adapters[name] for name in names if name in self._adapters] if len(names) > 1 else []
        for adapter in stack if len(stack) > 1 else ():
            reason = adapter.together([other for other in stack if other is not adapter])
            if reason is not None:
                msg = f"{listing(names)} cannot be active together on {self._site.name!r}: {reason}."
                raise AdapterStateError(msg)

    def _settle(self) -> None:
        """Resolve which adapters the next forward runs."""
        state, adapters, merged = self.__dict__, self._adapters, self._merged
        active = () if state["_disable_adapters"] else self.active_adapters
        inside = () if merged is None else merged.names
        stack = tuple([adapters[name] for name in active if name in adapters and name not in inside])
        state["_stack"] = stack
        # While adapters are merged, the bare layer is not what the base layer holds; only the general way knows that.
        state["_sole"] = stack[0] if len(stack) == 1 and merged is None else None
        self._owner.changes += 1


def _cast_up(adapter: Adapter, tensors: Sequence[Tensor]) -> None:
    """Make an adapter's tensors float32 where they are of lower precision, in place."""
    kept = {id(getattr(adapter, name)) for name in adapter.base_like}
    cast_up([tensor for tensor in tensors if id(tensor) not in kept] if kept else tensors)
