"""PEFT's names for the tensors of adapters, which themselves stand outside the module tree.

An adapter is one object that holds its tensors: `adapter.lora_A`. In the model the same tensors are named the other way
round, by entry and then by adapter: `layer.lora_A.default`. Programs rely on those names, so the layer holds, for each
entry, a small module whose attribute `<adapter>` *is* that adapter's attribute `<entry>`. Reading, setting and deleting
pass through: seen from outside a struct of dicts, inside a dict of structs, and nothing is stored twice.

This is the one clever thing in the core. It rests on `nn.Module` reaching its contents only through the three dicts
`_parameters`, `_buffers` and `_modules`: `EntryModule` has live views in their place.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from torch import nn

from tunerkit.errors import AdapterStateError, ArgumentError, PluginError
from tunerkit.lean import LeanModule
from tunerkit.naming import listing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Self

_KINDS = ("_parameters", "_buffers", "_modules")

if TYPE_CHECKING:

    class _Mapping:
        """Nothing: to a type checker a `dict` is a mutable mapping already."""

else:
    _Mapping = MutableMapping  # its methods rest on the five below and must come before those of `dict`


class EntryView(_Mapping, dict[str, Any]):
    """Adapter name -> that adapter's own attribute of one name and kind. Holds nothing itself.

    It is a `dict` because `nn.Module` and the libraries around it expect one; all access goes through these methods.
    """

    __slots__ = ("adapters", "entry", "kind")

    def __init__(self, adapters: dict[str, nn.Module], kind: str, entry: str) -> None:
        self.adapters = adapters
        self.kind = kind
        self.entry = entry

    def __getitem__(self, name: str) -> Any:
        return self.adapters[name].__dict__[self.kind][self.entry]

    def __setitem__(self, name: str, value: Any) -> None:
        state = self.adapters[name].__dict__
        state[self.kind][self.entry] = value
        if self.kind == "_modules":
            state[self.entry] = value

    def __delitem__(self, name: str) -> None:
        state = self.adapters[name].__dict__
        del state[self.kind][self.entry]
        state.pop(self.entry, None)

    def __iter__(self) -> Iterator[str]:
        return (name for name, adapter in self.adapters.items() if self.entry in adapter.__dict__[self.kind])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        adapter = self.adapters.get(name)  # type: ignore[call-overload]
        return adapter is not None and self.entry in adapter.__dict__[self.kind]

    def __repr__(self) -> str:
        return repr(self.copy())

    def copy(self) -> dict[str, Any]:
        """Return what the view shows now, as a dict of its own."""
        return {name: self[name] for name in self}

    # Lists, and not by way of the methods above: torch goes through them at every walk over a model.

    def values(self) -> list[Any]:  # type: ignore[override]
        """Return the adapters' attributes."""
        kind, entry = self.kind, self.entry
        held = (adapter.__dict__[kind] for adapter in self.adapters.values())
        return [attributes[entry] for attributes in held if entry in attributes]

    def items(self) -> list[tuple[str, Any]]:  # type: ignore[override]
        """Return the adapters' names and attributes."""
        kind, entry = self.kind, self.entry
        held = ((name, adapter.__dict__[kind]) for name, adapter in self.adapters.items())
        return [(name, attributes[entry]) for name, attributes in held if entry in attributes]

    def __reduce__(self) -> tuple[Any, ...]:
        return EntryView, (self.adapters, self.kind, self.entry)

    def __ior__(self, other: Any) -> Self:  # type: ignore[override]
        self.update(other)
        return self

    def __ror__(self, other: Any) -> dict[str, Any]:  # type: ignore[override]
        return {**other, **self.copy()}

    def __or__(self, other: Any) -> dict[str, Any]:  # type: ignore[override]
        return {**self.copy(), **other}


class EntryModule(LeanModule):
    """One entry of all adapters of a layer, `layer.lora_A`; used like an `nn.ModuleDict` or `nn.ParameterDict`."""

    def __init__(self, adapters: dict[str, nn.Module], entry: str) -> None:
        super().__init__()
        state = self.__dict__
        for kind in _KINDS:
            state[kind] = EntryView(adapters, kind, entry)

    def _view_of(self, name: str) -> EntryView:
        for kind in _KINDS:
            view: EntryView = self.__dict__[kind]
            if name in view:
                return view
        raise KeyError(name)

    def __getitem__(self, name: str) -> Any:
        return self._view_of(name)[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._view_of(name)[name] = value

    def __contains__(self, name: object) -> bool:
        return any(name in self.__dict__[kind] for kind in _KINDS)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def keys(self) -> list[str]:
        """Return the names of the adapters that have this entry."""
        return [name for kind in _KINDS for name in self.__dict__[kind]]

    def values(self) -> list[Any]:
        """Return the adapters' attributes."""
        return [self[name] for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        """Return the names and the adapters' attributes."""
        return [(name, self[name]) for name in self.keys()]

    def extra_repr(self) -> str:
        """Show bare parameters, which `nn.Module` leaves out."""
        return ", ".join(f"{name}: {tuple(value.shape)}" for name, value in self.__dict__["_parameters"].items())


RESERVED_NAMES = frozenset(dir(nn.ModuleDict())) | frozenset(dir(EntryModule({}, "")))
"""Names an adapter cannot have, because `layer.lora_A.<name>` already means something else."""


class PerAdapter(MutableMapping[str, Any]):
    """A plain attribute of all adapters of a layer, by adapter: `layer.scaling["default"]`; setting passes through.

    Args:
        adapters: The adapters by name.
        attribute: The attribute's name.
        check: Called with an adapter's name before its attribute is changed; it raises if that cannot be.
    """

    def __init__(self, adapters: dict[str, nn.Module], attribute: str, check: Callable[[str], None]) -> None:
        self._adapters = adapters
        self._attribute = attribute
        self._check = check

    def __getitem__(self, name: str) -> Any:
        adapter = self._adapters[name]
        if not _gives(adapter, self._attribute):
            raise KeyError(name)
        return getattr(adapter, self._attribute)

    def __setitem__(self, name: str, value: Any) -> None:
        self._check(name)
        setattr(self._adapters[name], self._attribute, value)

    def __delitem__(self, name: str) -> None:
        self._check(name)
        delattr(self._adapters[name], self._attribute)

    def replace(self, values: object) -> None:
        """Give all adapters their values at once.

        Args:
            values: A mapping with a value for each adapter that has the attribute.

        Raises:
            ArgumentError: It is something else; nothing was changed.
        """
        names = list(self)
        if not isinstance(values, Mapping) or values.keys() != set(names):
            msg = (
                f"{self._attribute!r} is an attribute of each adapter, so it takes a dict with a value for each of "
                f"{listing(names)}; it was given {values!r}. To change one alone set {self._attribute}[name]."
            )
            raise ArgumentError(msg)
        for name in names:
            self._check(name)
        self.update(values)

    def __iter__(self) -> Iterator[str]:
        return (name for name, adapter in self._adapters.items() if _gives(adapter, self._attribute))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))


def per_adapter(adapters: dict[str, nn.Module], name: str, check: Callable[[str], None]) -> PerAdapter | None:
    """Return an attribute by adapter, or None if no adapter has it; see `PerAdapter`."""
    found = any(_gives(adapter, name) for adapter in adapters.values())
    return PerAdapter(adapters, name, check) if found else None


def _gives(adapter: nn.Module, name: str) -> bool:
    """Return whether an adapter has an attribute; a part that it has not joined is none."""
    try:
        return hasattr(adapter, name)
    except AdapterStateError:
        return False


def entries_of(adapter: nn.Module) -> list[str]:
    """Return the names of the attributes that hold an adapter's tensors."""
    return [*adapter._parameters, *adapter._buffers, *adapter._modules]


def expose(owner: nn.Module, adapters: dict[str, nn.Module], name: str) -> None:
    """Make one of the adapters visible in the tree, under `owner.<entry>.<name>`.

    Raises:
        PluginError: The owner has something else under the name of an entry.
    """
    adapter = adapters[name]
    entries = entries_of(adapter)
    shown = owner._modules
    new = [entry for entry in entries if type(shown.get(entry)) is not EntryModule]
    for entry in new:
        if _has(owner, entry):
            msg = (
                f"The adapter class {type(adapter).__name__} holds tensors under {entry!r}, which is an attribute of "
                f"every {type(owner).__name__}, so they could not be found there. Give the entry another name."
            )
            raise PluginError(msg)
    # Children are found without `nn.Module.__getattr__`, which would cost more than all else in a small forward pass.
    adapter.__dict__.update(adapter._modules)
    for entry in new:
        shown[entry] = module = EntryModule(adapters, entry)
        module.__dict__["training"] = owner.training
    for entry in adapter.__dict__.get("_non_persistent_buffers_set", ()):
        shown[entry]._non_persistent_buffers_set.add(name)  # type: ignore[union-attr]


def _has(owner: nn.Module, name: str) -> bool:
    # Not `hasattr`: what the owner merely forwards to the layer below is no obstacle.
    state = owner.__dict__
    held = name in state["_modules"] or name in state["_parameters"] or name in state["_buffers"]
    return held or name in state or hasattr(type(owner), name)


def withdraw(owner: nn.Module, adapters: dict[str, nn.Module]) -> None:
    """Remove the entries from the tree that none of the remaining adapters has."""
    for entry, module in list(owner._modules.items()):
        if isinstance(module, EntryModule) and not len(module):
            del owner._modules[entry]
        elif isinstance(module, EntryModule) and "_non_persistent_buffers_set" in module.__dict__:
            module._non_persistent_buffers_set.intersection_update(adapters)
