"""Running adapters on rows of their own in one batch: those that are alike together, the others by themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tunerkit.adapter import Adapter
    from tunerkit.rows import Groups
    from tunerkit.sites import Below, Site

Module = TypeVar("Module", bound=nn.Module)


class Once:
    """What is below the adapters of all rows; if their own input is what they ask it for, it is run once for all."""

    __slots__ = ("_output", "below", "x")

    def __init__(self, below: Below, x: Tensor) -> None:
        self.below = below
        self.x = x
        self._output: Tensor | None = None

    def output(self, rows: Tensor) -> Tensor:
        """Return some rows of the output."""
        if self._output is None:
            self._output = self.below(self.x)
        return self._output.index_select(0, rows)


class OfRows:
    """What is below the adapters of some of the rows."""

    __slots__ = ("once", "rows", "x")

    def __init__(self, once: Once, rows: Tensor, x: Tensor) -> None:
        self.once = once
        self.rows = rows
        self.x = x

    @property
    def weight(self) -> Tensor:
        """The weight of the layer."""
        return self.once.below.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the layer."""
        return self.once.below.bias

    @property
    def base(self) -> Site:
        """The bare layer."""
        return self.once.below.base

    def __call__(self, x: Tensor) -> Tensor:
        """Run the layer."""
        return self.once.output(self.rows) if x is self.x else self.once.below(x)

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Run the layer with these parameters."""
        return self.once.below.run(x, weight, bias)


def run_alike(adapters: Sequence[Adapter], x: Tensor, below: Below, groups: Groups) -> Any:
    """Return a layer's output with an adapter for each group of rows, by calls of their `forward` alone.

    Adapters of one class with equal settings and shapes are run together, by `torch.vmap` over their stacked tensors.
    Groups are filled up to equal sizes for that, to less than twice their rows.

    Args:
        adapters: One for each group.
        x: The layer's input, rows x ...
        below: The layer.
        groups: The rows by adapter.
    """
    once = Once(below, x)
    parts: list[tuple[int, ...]] = []
    sizes: list[int] = []
    outputs: list[Tensor] = []
    for positions in _alike(adapters, groups.sizes):
        chosen = [adapters[position] for position in positions]
        size = max(groups.sizes[position] for position in positions)
        output = _run_stacked(chosen, once, groups.rows(positions, x.device, size).view(len(positions), size))
        if output is not None:
            parts.append(positions)
            sizes.append(size)
            outputs.append(output)
            continue
        parts += [(position,) for position in positions]
        sizes += [0] * len(positions)
        outputs += [_run_one(adapters[position], position, once, groups) for position in positions]
    return groups.join(parts, sizes, outputs)


def run_each(adapters: Sequence[Adapter], x: Tensor, below: Below, groups: Groups) -> Any:
    """Return what `Adapter.forward_rows` does, with the adapters run one after the other, alike or not.

    This is for those whose tensors are so large that stacking them costs more than running them.

    Args:
        adapters: One for each group.
        x: The layer's input, rows x ...
        below: The layer.
        groups: The rows by adapter.
    """
    once, positions = Once(below, x), range(len(adapters))
    outputs = [_run_one(adapters[position], position, once, groups) for position in positions]
    return groups.join([(position,) for position in positions], [0] * len(adapters), outputs)


def _run_one(adapter: Adapter, position: int, once: Once, groups: Groups) -> Tensor:
    rows = groups.rows((position,), once.x.device)
    x = once.x.index_select(0, rows)
    return adapter.forward(x, OfRows(once, rows, x))


def _alike(adapters: Sequence[Adapter], sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the positions of adapters that can be run together."""
    found: dict[Any, list[int]] = {}
    for position, (adapter, size) in enumerate(zip(adapters, sizes, strict=True)):
        # A part is one object for all layers: to stack it at each of them would cost more than is won.
        key = position if "part" in adapter.__dict__ else (_signature(adapter), (size - 1).bit_length())
        found.setdefault(key, []).append(position)
    return [tuple(positions) for positions in found.values()]


def _run_stacked(adapters: Sequence[Adapter], once: Once, rows: Tensor) -> Tensor | None:
    """Return the output of adapters that are alike on their rows (adapters x rows), or None if that cannot be done."""
    if len(adapters) == 1 or torch.compiler.is_compiling():
        return None  # the compiler traces plain calls, and fuses them itself

    def run(rows: Tensor, x: Tensor, tensors: list[Tensor]) -> Tensor:
        return _with_tensors(adapters[0], iter(tensors)).forward(x, OfRows(once, rows, x))

    tensors = [torch.stack(same) for same in zip(*map(_tensors, adapters), strict=True)]
    x = once.x.index_select(0, rows.flatten()).view(*rows.shape, *once.x.shape[1:])
    try:
        output: Tensor = torch.vmap(run, randomness="different")(rows, x, tensors)
    except RuntimeError:
        # Not every operation can be run for several adapters at once (`.item()`, an autograd function without a rule
        # for it); an error that has another cause comes again when they are run one by one.
        return None
    return output.flatten(0, 1)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Go through the tensors of a module, in the order in which `_with_tensors` takes others for them."""
    for place in (module._parameters, module._buffers):
        yield from (tensor for tensor in place.values() if tensor is not None)
    for child in module._modules.values():
        if child is not None:
            yield from _tensors(child)


def _with_tensors(module: Module, tensors: Iterator[Tensor]) -> Module:
    """Return a copy of a module that holds other tensors; the module is not touched."""
    other = object.__new__(type(module))
    state = dict(module.__dict__)
    for name in ("_parameters", "_buffers"):
        state[name] = {key: None if old is None else next(tensors) for key, old in state[name].items()}
    children = {
        name: None if child is None else _with_tensors(child, tensors) for name, child in module._modules.items()
    }
    state["_modules"] = children
    # An entry that was given its module through the layer stands among the plain attributes too.
    state.update((name, child) for name, child in children.items() if name in state)
    other.__dict__.update(state)
    return other


_HELD = frozenset({"_parameters", "_buffers", "_modules"})
_AT_START = {name: value for name, value in vars(nn.Module()).items() if name not in _HELD}
"""What every module holds beside its tensors before something is hooked or switched; not looked at one by one."""


def _signature(module: nn.Module) -> tuple[Any, ...]:
    """Return what must be equal for two modules to differ only in the numbers of their tensors."""
    children = module._modules
    settings = [
        (name, _setting(value))
        for name, value in vars(module).items()
        if name not in _HELD and name not in children and not (name in _AT_START and value == _AT_START[name])
    ]
    held = [
        (name, None if tensor is None else (type(tensor), tensor.shape, tensor.dtype, tensor.device, tensor.layout))
        for place in (module._parameters, module._buffers)
        for name, tensor in place.items()
    ]
    below = [(name, None if child is None else _signature(child)) for name, child in children.items()]
    return type(module), tuple(settings), tuple(held), tuple(below)


def _setting(value: Any) -> Any:
    """Return a plain value in a form that can be looked up; of anything else, which object it is."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return kind, value
    if kind in (tuple, list):
        return kind, tuple(map(_setting, value))
    if kind in (set, frozenset):
        return kind, frozenset(map(_setting, value))
    if isinstance(value, dict):
        return kind, tuple((key, _setting(item)) for key, item in value.items())
    return kind, id(value)
