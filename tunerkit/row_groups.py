"""Running a layer whose rows have adapters of their own, of whatever methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunerkit.adapter import Adapter
from tunerkit.alike import OfRows, Once

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from tunerkit.rows import Groups
    from tunerkit.sites import Below


def run_rows(adapters: Sequence[Adapter | None], x: Tensor, below: Below, groups: Groups) -> Any:
    """Return a layer's output with an adapter, or none, for each group of rows.

    Args:
        adapters: One for each group.
        x: The layer's input, rows x ...
        below: The layer.
        groups: The rows by adapter.
    """
    kinds: dict[type[Adapter] | None, list[int]] = {}
    for position, adapter in enumerate(adapters):
        kinds.setdefault(None if adapter is None else _runner(type(adapter)), []).append(position)
    if len(kinds) == 1:
        return _run_kind(next(iter(kinds)), adapters, x, below, groups)
    once = Once(below, x)
    outputs = []
    for kind, positions in kinds.items():
        rows = groups.rows(positions, x.device)
        part = x.index_select(0, rows)
        chosen = [adapters[position] for position in positions]
        outputs.append(_run_kind(kind, chosen, part, OfRows(once, rows, part), groups.only(positions)))
    return groups.join(list(kinds.values()), [0] * len(kinds), outputs)


def _run_kind(kind: type[Adapter] | None, adapters: Sequence[Any], x: Tensor, below: Below, groups: Groups) -> Any:
    if kind is None:
        return below(x)
    if len(adapters) == 1:
        return adapters[0].forward(x, below)
    return kind.forward_rows(adapters, x, below, groups)


def _runner(kind: type[Adapter]) -> type[Adapter]:
    """Return the class whose `forward_rows` is right for adapters of a class: one that did not change `forward` after.

    Adapters for which it is the same class are given to it together.
    """
    for base in kind.__mro__:
        if "forward_rows" in vars(base):
            return base
        if "forward" in vars(base) or "merged" in vars(base) or "delta" in vars(base):
            break
    return Adapter
