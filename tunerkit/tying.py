"""Which modules of a model share a weight, as the embeddings at both ends of a language model often do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from tunerkit.naming import listing
from tunerkit.targeting import bare

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from tunerkit.targeting import ModulePlace

    Shared = list[ModulePlace]


def modules_that_share(here: Sequence[ModulePlace], bases: Sequence[nn.Module]) -> list[Shared]:
    """Return the groups of modules that hold one and the same parameter as their weight.

    Args:
        here: The places of a model's modules.
        bases: What stands at each of them below all adapters.

    Returns:
        For each such parameter the places of the modules: path, module, parent and name in it. An embedding comes
        first, for that is where the weight is at home.
    """
    held_by = [base._parameters for base in bases]
    # Not by `get`, which the parameters of a scripted module do not have.
    weights = [own["weight"] if "weight" in own else None for own in held_by]  # noqa: SIM401
    held = [id(weight) for weight in weights if weight is not None]
    if len(set(held)) == len(held):
        return []
    groups: dict[int, Shared] = {}
    for place, weight in zip(here, weights, strict=True):
        if weight is not None:
            groups.setdefault(id(weight), []).append(place)
    met = (group for group in groups.values() if len(group) > 1)
    several = [group for group in met if len({id(bare(module)) for _, module, _, _ in group}) > 1]
    return [sorted(group, key=lambda place: not isinstance(bare(place[1]), nn.Embedding)) for group in several]


def remarks_on_ties(groups: list[Shared], changed: Collection[int], *, tied: bool) -> list[str]:
    """Return what a user should know of the weights that are shared.

    Args:
        groups: The modules that share a weight.
        changed: The ids of the bare modules that are adapted or copied.
        tied: Whether they are to be tied.
    """
    met = [group for group in groups if any(id(bare(module)) in changed for _, module, _, _ in group)]
    if tied:
        return (
            [] if met else ["ensure_weight_tying=True ties nothing: nothing that is adapted or saved shares a weight."]
        )
    return [
        f"{listing(key for key, _, _, _ in group)} share a weight, which training only one of them, or each by itself, "
        "makes differ. Set ensure_weight_tying=True to tie what is trained too."
        for group in met
        # Others share one on purpose: layers that are repeated, each with an adapter of its own.
        if isinstance(bare(group[0][1]), nn.Embedding)
    ]
