"""What torch does to modules, at a fraction of the cost where a model gets thousands of small ones."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterable

Flag: TypeAlias = tuple[Tensor, bool]
"""A tensor, and whether it trains."""

Hook: TypeAlias = tuple[nn.Module, int]
"""A forward hook: the module on which it is, and the number that torch gave it there."""

_DTYPES = (value for value in vars(torch).values() if isinstance(value, torch.dtype))
_LOW = frozenset(dtype for dtype in _DTYPES if dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize)
"""The dtypes of lower precision than float32."""

_NONE: frozenset[str] = frozenset()  # one for all modules: Python makes another each time
_WORDS = frozenset({"state_dict", "_save_to_state_dict", "get_extra_state"})
"""By what a module can tell its state in a way of its own."""


def set_modes(modules: Iterable[nn.Module | None], mode: bool) -> None:
    """Do what `train(mode)` of each module does; one with a way of its own to it is asked to do it itself."""
    for module in modules:
        if module is None:
            continue
        if sets_own_mode(module):
            module.train(mode)
        else:
            module.__dict__["training"] = mode
            if module._modules:  # most have none
                set_modes(module._modules.values(), mode)


def sets_own_mode(module: nn.Module, plain: tuple[object, ...] = (nn.Module.train,)) -> bool:
    """Return whether a module does more, on `train(mode)`, than to set an attribute, its own and those of all below.

    Args:
        module: The module.
        plain: The methods `train` of which it is known that they do no more.
    """
    state = module.__dict__
    # A scripted module keeps its mode elsewhere.
    return type(module).train not in plain or "train" in state or "training" not in state


def modules_in(module: nn.Module) -> list[nn.Module]:
    """Return a module and those below it; one that stands at two places comes twice."""
    found = [module]
    for one in found:  # which grows meanwhile
        children = one._modules
        for child in children.values() if children else ():
            if child is not None:
                found.append(child)  # noqa: PERF401 - most have no children, and then a list is what costs
    return found


def parameters_in(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a module and of those below it; one that stands at two places comes twice."""
    found: list[nn.Parameter] = []
    left = [module]
    for one in left:  # as in `modules_in`, and in the same pass
        own, children = one._parameters, one._modules
        for value in own.values() if own else ():
            if value is not None:
                found.append(value)  # noqa: PERF401 - most modules have one or none, and then a list is what costs
        for child in children.values() if children else ():
            if child is not None:
                left.append(child)  # noqa: PERF401 - the same
    return found


def tensors_in(module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of a module and of those below it; one at two places comes twice."""
    found: list[Tensor] = []
    left = [module]
    for one in left:  # as in `modules_in`, and in the same pass
        own, children = one._parameters, one._modules
        buffers = one.__dict__.get("_buffers")  # which is not there yet in `tunerkit.lean.Linear`
        for value in own.values() if own else ():
            if value is not None:
                found.append(value)  # noqa: PERF401 - as above
        if buffers:
            found += [value for value in buffers.values() if value is not None]
        for child in children.values() if children else ():
            if child is not None:
                left.append(child)  # noqa: PERF401 - as above
    return found


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Return what `module.state_dict(keep_vars=True)` does; a module that has its own way to it is asked for that."""
    found: dict[str, Tensor] = {}
    return found if _collect(module, "", found) else module.state_dict(keep_vars=True)


def _collect(module: nn.Module, prefix: str, found: dict[str, Tensor]) -> bool:
    """Add the tensors of a module and of those below it by key; return whether that is all that torch would do."""
    kind: type = type(module)
    state = module.__dict__
    if state.get("_state_dict_hooks") or state.get("_state_dict_pre_hooks") or not _is_plain(kind):
        return False
    if not state.keys().isdisjoint(_WORDS):  # set on this very module
        return False
    for name, parameter in state["_parameters"].items():
        if parameter is not None:
            found[prefix + name] = parameter
    buffers = state.get("_buffers")
    for name, buffer in buffers.items() if buffers else ():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            found[prefix + name] = buffer
    for name, child in state["_modules"].items():
        if child is not None and not _collect(child, f"{prefix}{name}.", found):
            return False
    return True


@functools.cache
def _is_plain(kind: type) -> bool:
    """Return whether a type of modules leaves it to torch how its state is told."""
    return all(getattr(kind, word) is getattr(nn.Module, word) for word in _WORDS)


def cast_up(tensors: Iterable[Tensor]) -> None:
    """Make tensors of lower precision float32, in place."""
    for tensor in tensors:
        if tensor.dtype in _LOW:
            tensor.data = tensor.data.float()


def set_trains(tensors: Iterable[Tensor], changed: list[Flag], *, trains: bool) -> None:
    """Say whether tensors train; each that did not, or did, goes into a list first, with what it was."""
    for tensor in tensors:
        if tensor.requires_grad is not trains:
            changed.append((tensor, not trains))
            tensor.requires_grad = trains


def forward_hooks_in(module: nn.Module) -> set[Hook]:
    """Return the forward hooks of a module and of those below it."""
    return {(one, number) for one in modules_in(module) for number in one._forward_hooks}


def remove_hooks(hooks: Iterable[Hook]) -> None:
    """Take forward hooks off; those that are gone already are passed over."""
    for module, number in hooks:
        module._forward_hooks.pop(number, None)


def frozen_keys(module: nn.Module, tensors: Iterable[Tensor]) -> frozenset[str]:
    """Return the names of the parameters of a module, and of those below it, that do not train.

    Args:
        module: The module.
        tensors: What `tensors_in` returns for it.
    """
    for tensor in tensors:
        if not tensor.requires_grad:
            return frozenset(key for key, parameter in module.named_parameters() if not parameter.requires_grad)
    return _NONE
