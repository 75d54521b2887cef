"""Modules without the containers that torch makes for hooks, until one is asked for.

A module's empty containers take 2 KiB and the time to make them, and an adapter of small factors is three modules,
on each of thousands of layers, or a thousand times on one. So these have none at first; whoever asks for one, torch or
a program that registers a hook, gets one that stays. Nothing else about them is different.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

# Taken from a module, so that it is right for whatever version of torch runs.
_BLANK = nn.Module().__dict__
_HELD = ("_parameters", "_buffers", "_modules")
_LATER = {name: type(value) for name, value in _BLANK.items() if isinstance(value, (dict, set)) and name not in _HELD}
_EMPTY_AT_FIRST = {*_LATER, "_buffers"}
_VALUES = [(name, value) for name, value in _BLANK.items() if not isinstance(value, (dict, set))]


def begin(module: nn.Module) -> None:
    """Do what `nn.Module.__init__` does, at half of its cost."""
    _begin_lean(module)
    state = module.__dict__
    for name, kind in _LATER.items():
        state[name] = kind()


def _begin_lean(module: nn.Module, held: tuple[str, ...] = _HELD) -> None:
    # One by one: then the dicts of all modules of a class share their keys, and take a third of the memory.
    state = module.__dict__
    for name, value in _VALUES:
        state[name] = value
    for name in held:
        state[name] = {}


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """Return a module's attributes without the containers that are empty: a lean module may not have them yet."""
    return {name: value for name, value in module.__dict__.items() if name not in _EMPTY_AT_FIRST or value}


class LeanModule(nn.Module):
    """A module that makes its containers for hooks when they are first asked for."""

    def __init__(self) -> None:
        _begin_lean(self)

    def __getattr__(self, name: str) -> Any:
        kind = _LATER.get(name)
        # In one step: two threads that ask at once get the same.
        return super().__getattr__(name) if kind is None else self.__dict__.setdefault(name, kind())

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Torch's adds what an old file lacks, which here need not be there.
        self.__dict__.update(state)


class Linear(LeanModule, nn.Linear):
    """An `nn.Linear` that holds a ready-made weight; see `tunerkit.adapter.linear`.

    It has no container for buffers either before one is asked for.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, trains: bool = True) -> None:
        _begin_lean(self, ("_parameters", "_modules"))
        state = self.__dict__
        own = state["_parameters"]
        state["out_features"], state["in_features"] = weight.shape
        own["weight"] = nn.Parameter(weight, requires_grad=trains)
        own["bias"] = None if bias is None else nn.Parameter(bias, requires_grad=trains)

    def __getattr__(self, name: str) -> Any:
        return self.__dict__.setdefault(name, {}) if name == "_buffers" else super().__getattr__(name)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Register a buffer, as any module does."""
        self.__dict__.setdefault("_buffers", {})
        super().register_buffer(name, tensor, persistent)
