"""Running a layer whose rows have adapters of their own, of whatever methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunerkit.adapter import Adapter
from tunerkit.alike import OfRows, Once
from tunerkit.layer import layers_in, split_input
from tunerkit.route import narrowed
from tunerkit.rows import only_input, split_rows
from tunerkit.sites import Bound

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from tunerkit.route import Owner
    from tunerkit.rows import Groups, Rows
    from tunerkit.sites import Below, Site


def run_layer(
    site: Site,
    adapters: Mapping[str, Adapter],
    rows: Rows,
    owner: Owner,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Return a layer's output with an adapter, or none, for each row of its input.

    Args:
        site: The layer; nothing is merged into it.
        adapters: Its adapters by name; rows of others are rows of the base model here.
        rows: The adapter of each row.
        owner: Stands for the model in routes.
        args: The arguments of the call.
        kwargs: The same, by name.

    Raises:
        RouteError: It cannot be known what belongs to which row.
    """
    if not any(name in adapters for name in rows.names) or not (args or kwargs):
        return site.module(*args, **kwargs)
    x, args, kwargs = split_input(site.owner, args, kwargs)
    only_input(site.name, args, kwargs)
    groups = rows.groups(x, site.name)
    below = Bound(site, site, args, kwargs)
    if not layers_in(site.module):
        return run_rows([adapters.get(name) for name in groups.names], x, below, groups)

    def run(name: str, part: Tensor) -> Any:
        adapter = adapters.get(name)
        # The layers that the base layer is or holds are to take the rows of one adapter for the whole batch.
        with narrowed(owner, (name,)):
            return below(part) if adapter is None else adapter.forward(part, below)

    return split_rows(x, groups, run)


def run_rows(adapters: Sequence[Adapter | None], x: Tensor, below: Below, groups: Groups) -> Any:
    """Return a layer's output with an adapter, or none, for each group of rows.

    Args:
        adapters: One for each group.
        x: The layer's input, rows x ...
        below: The layer.
        groups: The rows by adapter.
    """
    runners = {kind: _runner(kind) for kind in set(map(type, adapters))}
    if len(set(runners.values())) == 1:
        return _run_kind(next(iter(runners.values())), adapters, x, below, groups)
    kinds: dict[type[Adapter] | None, list[int]] = {}
    for position, adapter in enumerate(adapters):
        kinds.setdefault(runners[type(adapter)], []).append(position)
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


def _runner(kind: type[Adapter | None]) -> type[Adapter] | None:
    """Return the class whose `forward_rows` is right for adapters of a class: one that did not change `forward` after.

    Adapters for which it is the same class are given to it together. Where there is no adapter, it is None.
    """
    if kind is type(None):
        return None
    for base in kind.__mro__:
        if "forward_rows" in vars(base):
            return base
        if "forward" in vars(base) or "merged" in vars(base) or "delta" in vars(base):
            break
    return Adapter
