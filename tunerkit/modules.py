"""What torch does to modules, at a fraction of the cost where a model gets thousands of small ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

# Taken from a module, so that it is right for whatever version of torch runs.
_BLANK = nn.Module().__dict__
_CONTAINERS = [(name, type(value)) for name, value in _BLANK.items() if isinstance(value, (dict, set))]
_VALUES = {name: value for name, value in _BLANK.items() if not isinstance(value, (dict, set))}


def begin(module: nn.Module) -> None:
    """Do what `nn.Module.__init__` does, at a third of its cost."""
    state = module.__dict__
    state.update(_VALUES)
    for name, kind in _CONTAINERS:
        state[name] = kind()


def set_mode(module: nn.Module, mode: bool) -> None:
    """Do what `module.train(mode)` does; a module with a `train` of its own is asked to do it itself."""
    if type(module).train is not nn.Module.train or "train" in module.__dict__:
        module.train(mode)
        return
    module.__dict__["training"] = mode
    for child in module._modules.values():
        if child is not None:
            set_mode(child, mode)


def modules_in(module: nn.Module) -> Iterator[nn.Module]:
    """Go through a module and those below it; one that stands at two places comes twice."""
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from modules_in(child)


def parameters_in(module: nn.Module) -> Iterator[nn.Parameter]:
    """Go through a module's parameters and those below it; one that stands at two places comes twice."""
    for parameter in module._parameters.values():
        if parameter is not None:
            yield parameter
    for child in module._modules.values():
        if child is not None:
            yield from parameters_in(child)


def tensors_in(module: nn.Module) -> Iterator[Tensor]:
    """Go through a module's parameters and buffers and those below it; one that stands at two places comes twice."""
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            yield tensor
    for child in module._modules.values():
        if child is not None:
            yield from tensors_in(child)
