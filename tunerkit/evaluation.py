"""Setting a model with adapters to evaluation, as `eval()` does, in a way that can be undone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from tunerkit.adapted_layer import AdaptedLayer
from tunerkit.modules import set_modes, sets_own_mode
from tunerkit.names import EntryModule
from tunerkit.tuner import BaseTuner

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tunerkit.journal import Journal

_PLAIN = (nn.Module.train, BaseTuner.train, AdaptedLayer.train)
"""Ways to set training mode that do no more than to set it for a module and all that is below it."""


def set_to_evaluation(model: nn.Module, parts: Iterable[nn.Module], journal: Journal) -> None:
    """Do what `model.eval()` does, noting which modules and adapters were in training mode.

    One walk does both, and touches nothing that is in evaluation already.

    Args:
        model: The model with adapters.
        parts: What its adapters have once per model.
        journal: Where to note it.
    """
    trained = journal.note_training()
    # The parts first: what a module's own `train` reaches of them has been noted then.
    found: list[nn.Module] = [*parts, model]
    for one in found:  # which grows meanwhile
        if sets_own_mode(one, _PLAIN):
            # What is below it is left to its own `train`.
            trains = [module for module in _grow([one]) if module.training]
            if trains:
                trained += trains
                set_modes([one], mode=False)
            continue
        if one.training:
            trained.append(one)
            one.__dict__["training"] = False
        if type(one) is not EntryModule and one._modules:  # most have no children
            _add_below(one, found)


def _grow(found: list[nn.Module]) -> list[nn.Module]:
    for one in found:  # which grows meanwhile
        _add_below(one, found)
    return found


def _add_below(module: nn.Module, found: list[nn.Module]) -> None:
    """Add what is right below a module, its adapters too, which stand outside the module tree."""
    if issubclass(type(module), AdaptedLayer):  # `isinstance` is answered in Python where the answer is no
        found += module.__dict__["_adapters"].values()
    if type(module) is not EntryModule:  # which only shows what the adapters hold
        for child in module._modules.values():
            if child is not None:
                found.append(child)
