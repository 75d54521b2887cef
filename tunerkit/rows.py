"""`Rows`: which adapter each row of a batch uses; and running parts of a batch by themselves.

Names are sorted into groups once per call. What is computed with them depends on the names and on how many rows each
has; which row is whose is in two tensors, so that a compiled graph serves every batch with the same counts.
"""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tunerkit.errors import RouteError

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping, Sequence

BASE = "__base__"
"""Stands for the base model where each row has the name of its adapter (PEFT's word)."""


class Groups:
    """The rows of one batch, sorted by adapter.

    A row's place in the sorted batch is called its slot: the first adapter's rows have the first slots.

    Attributes:
        names: The adapters, each once, sorted.
        sizes: How many rows each has.
        order: The row in each slot, int64, on the CPU.
        slot_of: The slot of each row, int64, on the CPU.
    """

    __slots__ = ("_on_device", "_parts", "names", "order", "sizes", "slot_of")

    def __init__(self, names: Sequence[str], sizes: Sequence[int], order: Tensor, slot_of: Tensor) -> None:
        self.names = tuple(names)
        self.sizes = tuple(sizes)
        self.order = order
        self.slot_of = slot_of
        self._on_device: dict[tuple[Any, ...], Tensor] = {}
        self._parts: dict[tuple[int, ...], Groups] = {}

    @classmethod
    def of(cls, by_row: Sequence[str]) -> Groups:
        """Sort the rows of a batch.

        Args:
            by_row: The name of each row's adapter.
        """
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(by_row):
            rows.setdefault(name, []).append(row)
        names = sorted(rows)
        order = [row for name in names for row in rows[name]]
        slot_of = [0] * len(order)
        for slot, row in enumerate(order):
            slot_of[row] = slot
        return cls(names, [len(rows[name]) for name in names], _whole(order), _whole(slot_of))

    def only(self, positions: Sequence[int]) -> Groups:
        """Return the groups at these positions as a batch of their own, already sorted.

        Args:
            positions: Which groups, by position; these become the groups 0, 1, ... of the batch.
        """
        key = tuple(positions)
        if key in self._parts and not torch.compiler.is_compiling():
            return self._parts[key]
        sizes = [self.sizes[position] for position in positions]
        order = _whole(range(sum(sizes)))
        part = Groups([self.names[position] for position in positions], sizes, order, order)
        if not torch.compiler.is_compiling():
            self._parts[key] = part
        return part

    def rows(self, positions: Sequence[int], device: torch.device, size: int = 0) -> Tensor:
        """Return which rows these groups have.

        Args:
            positions: Which groups, by position.
            device: Where the result is to be.
            size: To how many rows each group is filled up, by repeating its last; 0 leaves each as it is.

        Returns:
            The numbers of the rows, int64, for `index_select`: those of the first group first.
        """
        return self._kept(("rows", tuple(positions), device, size), device, lambda: self._rows(positions, size))

    def position_of_rows(self, device: torch.device) -> Tensor:
        """Return for each row the position of its group, int64.

        Args:
            device: Where the result is to be.
        """
        return self._kept(("positions", device), device, lambda: self._by_slot(self._positions()))

    def join(self, parts: Sequence[Sequence[int]], sizes: Sequence[int], outputs: Sequence[Any]) -> Any:
        """Put the outputs of parts of the batch together, in the order of the rows.

        Args:
            parts: The groups of each part, by position, every group in one part.
            sizes: To how many rows the groups of each part were filled up, as in `rows`.
            outputs: What each part put out: tensors with its rows, or equal structures of them.

        Raises:
            RouteError: Something else was put out.
        """
        first = outputs[0]
        if isinstance(first, (tuple, list)):
            return type(first)(self.join(parts, sizes, items) for items in zip(*outputs, strict=True))
        if not isinstance(first, Tensor):
            if all(output is None for output in outputs):
                return None
            msg = f"Rows cannot have adapters of their own where a layer puts out a {type(first).__name__}."
            raise RouteError(msg)
        key = ("join", tuple(map(tuple, parts)), tuple(sizes), first.device)
        places = self._kept(key, first.device, lambda: self._outputs(parts, sizes))
        return (first if len(outputs) == 1 else torch.cat(list(outputs))).index_select(0, places)

    def _positions(self) -> list[int]:
        """Return for each slot the position of its group."""
        return [position for position, size in enumerate(self.sizes) for _ in range(size)]

    def _rows(self, positions: Sequence[int], size: int) -> Tensor:
        starts, slots = self._starts(), []
        for position in positions:
            start, own = starts[position], self.sizes[position]
            slots += [*range(start, start + own), *[start + own - 1] * (size - own)]
        return self.order if slots == list(range(len(self.order))) else self.order[_whole(slots)]

    def _outputs(self, parts: Sequence[Sequence[int]], sizes: Sequence[int]) -> Tensor:
        """Return for each row where it is in the outputs of the parts, one after the other."""
        places, starts, end = list(range(len(self.order))), self._starts(), 0
        in_order = places.copy()
        for part, size in zip(parts, sizes, strict=True):
            for position in part:
                start, own = starts[position], self.sizes[position]
                places[start : start + own] = range(end, end + own)
                end += size or own
        return self.slot_of if places == in_order else self._by_slot(places)

    def _by_slot(self, numbers: Sequence[int]) -> Tensor:
        """Return for each row the number that its slot has."""
        return _whole(numbers)[self.slot_of]

    def _starts(self) -> list[int]:
        return [0, *itertools.accumulate(self.sizes)][:-1]

    def _kept(self, key: tuple[Any, ...], device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        """Return an index that all layers of a call need alike, made once for each device."""
        if torch.compiler.is_compiling():  # what is made while a graph is traced belongs to the graph
            return make().to(device)
        if key not in self._on_device:
            with torch.inference_mode(False):  # noqa: FBT003 - the compiler takes no keyword
                self._on_device[key] = make().to(device)
        return self._on_device[key]


class Rows:
    """Which adapter each row of the batches of a call uses.

    Attributes:
        by_row: The name for each row of the call's batch; `"__base__"` is the base model.
        names: The same, each once, sorted.
        repeats: How often a row may stand in a layer's input, one after the other: as many beams as `generate` follows.
    """

    __slots__ = ("_groups", "by_row", "names", "repeats")

    def __init__(self, by_row: Sequence[str], repeats: int = 1) -> None:
        self.by_row = tuple(by_row)
        self.repeats = repeats
        # The encoder of an encoder-decoder model runs before rows are repeated, its decoder after that.
        self._groups = {
            len(self.by_row) * times: Groups.of([name for name in self.by_row for _ in range(times)])
            for times in {1, repeats}
        }
        self.names = self._groups[len(self.by_row)].names

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and (self.by_row, self.repeats) == (other.by_row, other.repeats)

    def __hash__(self) -> int:
        return hash((self.by_row, self.repeats))

    def __repr__(self) -> str:
        return f"Rows({list(self.by_row)}, repeats={self.repeats})"

    def groups(self, x: Any, layer: str) -> Groups:
        """Return the groups of a layer's input.

        Args:
            x: The input, rows x ...
            layer: The layer, for the message.

        Raises:
            RouteError: The first dimension of the input is not the rows.
        """
        found = self._groups.get(x.shape[0]) if isinstance(x, Tensor) and x.dim() else None
        if found is not None:
            return found
        shape = f"an input of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        counts = " or ".join(str(count) for count in sorted(self._groups))
        msg = (
            f"Each row of the batch has an adapter of its own, {len(self.by_row)} in all, and the layer {layer!r} got "
            f"{shape}, where the first dimension must be the rows: {counts}. If the model changes the batch on the "
            "way, call it once for each adapter, within use_adapter(name)."
        )
        raise RouteError(msg)

    def none_of(self, adapters: Container[str], layer: str) -> tuple[str, ...]:
        """Return that no adapter takes part where a layer's parameters are read, which is so for all rows alike.

        Raises:
            RouteError: One of these adapters, which the layer has, is some row's.
        """
        here = next((name for name in self.names if name in adapters), None)
        if here is not None:
            msg = (
                f"Each row of the batch has an adapter of its own, and the parameters of the layer {layer!r} are read "
                f"for the whole batch, with {here!r} among the adapters. Call the model once for each adapter, within "
                "use_adapter(name)."
            )
            raise RouteError(msg)
        return ()


def rows_of(by_row: Sequence[str], repeats: int = 1) -> Rows:
    """Return `Rows`, the very same for the same names.

    A program that serves often has the names of one call in the next, of which the order of the rows is known then.
    """
    # What is made while a graph is traced belongs to the graph, and fake tensors to the mode that makes them.
    if torch.compiler.is_compiling() or type(torch.empty(0)) is not Tensor:
        return Rows(by_row, repeats)
    return _known_rows(tuple(by_row), repeats)


@functools.lru_cache(maxsize=64)
def _known_rows(by_row: tuple[str, ...], repeats: int) -> Rows:
    return Rows(by_row, repeats)


def only_input(layer: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise `RouteError` if a layer takes tensors beside its input, of which it is not known whose rows they hold."""
    if any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
        msg = (
            f"Each row of the batch has an adapter of its own, and the layer {layer!r} takes other tensors beside its "
            "input, of which it is not known what belongs to which row. Call the model once for each adapter, within "
            "use_adapter(name)."
        )
        raise RouteError(msg)


def split_rows(x: Tensor, groups: Groups, run: Callable[[str, Tensor], Any]) -> Any:
    """Run something for the rows of each adapter by themselves, and return the outputs in the order of the rows.

    Args:
        x: A batch, rows x ...
        groups: Its rows by adapter: `Rows.groups(x, layer)`.
        run: Takes an adapter's name and its rows of `x`; returns a tensor with as many rows, or a tuple of such.

    Raises:
        RouteError: `run` returned something else.
    """
    if len(groups.names) == 1:
        return run(groups.names[0], x)
    parts = [(position,) for position in range(len(groups.names))]
    outputs = [
        run(name, x.index_select(0, groups.rows(part, x.device)))
        for name, part in zip(groups.names, parts, strict=True)
    ]
    return groups.join(parts, [0] * len(parts), outputs)


def _whole(numbers: Sequence[int]) -> Tensor:
    # On the CPU also within a `with torch.device(...)` block, and fit for a backward.
    with torch.inference_mode(False):  # noqa: FBT003 - the compiler takes no keyword
        return torch.tensor(list(numbers), dtype=torch.long, device="cpu")
