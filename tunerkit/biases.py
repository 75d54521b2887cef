"""Training the base model's own biases with an adapter: PEFT's `bias="all"` and `bias="<method>_only"`.

These biases are shared: the base model has one set of them, whatever adapters it holds. So one adapter at a time may
train them, and their values follow what is active: the trained ones while that adapter is, else the base model's own,
bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tunerkit.adapted_layer import AdaptedLayer
from tunerkit.checkpoint.base_model import BasePiece, base_modules, file_path
from tunerkit.errors import AdapterStateError, ConfigError, MergeError, RouteError
from tunerkit.layer import BaseTunerLayer, layers_in
from tunerkit.naming import PREFIX, listing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from tunerkit.checkpoint.state import Piece
    from tunerkit.config import PeftConfig
    from tunerkit.journal import Journal

_BIAS = "bias"
_ALL = "all"
_ONLY = "_only"


def trained_biases(config: PeftConfig) -> str | None:
    """Return which biases a config trains, "all" or a text that ends in "_only", or None if it trains none.

    Raises:
        ConfigError: It says something else.
    """
    which: object = getattr(config, _BIAS, None)
    if not isinstance(which, str) or which == "none":
        return None
    if which != _ALL and not which.endswith(_ONLY):
        msg = (
            f"{type(config).__name__}.bias={which!r} is not known; possible are 'none', 'all' for all biases of the "
            "model, and '<method>_only' for those of the adapted layers."
        )
        raise ConfigError(msg)
    return which


class Biases:
    """The biases of the base model that one adapter trains; without arguments, none.

    The values that are not in place now are kept here; the two change places, and the parameters, which optimisers
    hold, stay the same objects.

    Args:
        name: The adapter's name. Its layers are in the model.
        which: "all", or else only those of its layers.
        model: The base model.

    Attributes:
        name: The adapter's name, or "" if none trains biases.
        shown: Whether the trained values are in place.
        kept: The other values: the trained ones where they are not in place, else the base model's own.
    """

    def __init__(self, name: str = "", which: str = "none", model: nn.Module | None = None) -> None:
        self.name = name
        self.which = which
        self.model = model
        self.shown = False
        # A bias that several modules share is one.
        wanted = (module for _, module, adapted in self._places() if adapted or which == _ALL)
        found = {id(module._parameters[_BIAS]): module for module in wanted}
        self._holders = list(found.values())
        self.kept: list[Tensor] = [parameter.detach().clone() for parameter in self.parameters()]

    def _places(self) -> Iterator[tuple[str, nn.Module, bool]]:
        if self.model is not None:
            for path, module, place in base_modules(self.model, self.name):
                if module._parameters.get(_BIAS) is not None:
                    yield path, module, path != place

    def parameters(self) -> list[nn.Parameter]:
        """Return the biases, the base model's own also where adapters are merged into others in their place."""
        merged = self._merged()
        return [_own(module, merged) for module in self._holders]

    def _merged(self) -> dict[int, nn.Parameter]:
        """Return the biases in whose place there are merged ones, by the id of their module."""
        layers = () if self.model is None else layers_in(self.model)
        return {
            id(layer.get_base_layer()): original
            for layer in layers
            if isinstance(layer, AdaptedLayer) and (original := layer.originals.get(_BIAS)) is not None
        }

    def note(self, journal: Journal) -> None:
        """Note the values and what trains, before either changes."""
        own = self.parameters()
        journal.note(self.__dict__.update, dict(self.__dict__))
        journal.note_flags(own)
        for parameter in own:
            journal.note_values(parameter)

    def show(self, *, trained: bool) -> None:
        """Put the trained values in place, or the base model's own; nothing may be merged."""
        if trained == self.shown:
            return
        own = self.parameters()
        others = [parameter.detach().clone() for parameter in own]
        for parameter, value in zip(own, self.kept, strict=True):
            # Not an operation that autograd sees: the values may change and come back before a backward.
            parameter.data.copy_(value)
        self.kept, self.shown = others, trained

    def pieces(self) -> list[Piece]:
        """Return what a checkpoint holds of the biases, under PEFT's keys."""
        own = self.parameters()
        values = own if self.shown else self.kept
        merged = self._merged()
        index = {id(parameter): number for number, parameter in enumerate(own)}
        found: list[Piece] = []
        for path, module, _ in self._places():
            number = index.get(id(_own(module, merged)))
            if number is not None:
                tensors = {_BIAS: values[number]}
                found.append(BasePiece(file_path(path, PREFIX), module, self.name, tensors, in_model=self.shown))
        return found

    def differ(self) -> bool:
        """Return whether the trained values are others than the base model's own."""
        return any(not torch.equal(kept, own) for kept, own in zip(self.kept, self.parameters(), strict=True))

    def base_values(self) -> dict[int, Tensor]:
        """Return copies of the base model's own values, whichever are in place, by the id of the parameter."""
        own = self.parameters()
        values = zip(own, self.kept if self.shown else own, strict=True)
        return {id(parameter): value.detach().to(parameter, copy=True) for parameter, value in values}

    # What cannot be done meanwhile

    def check_free(self) -> None:
        """Raise `AdapterStateError` if an adapter trains biases, before another does."""
        if self.name:
            msg = (
                f"The adapter {self.name!r} trains the base model's biases (bias={self.which!r}), which are shared, so "
                "only one adapter at a time can. Set bias='none' in the config of the other, or take this one out "
                f"first with delete_adapter({self.name!r})."
            )
            raise AdapterStateError(msg)

    def check_kept(self, configs: Mapping[str, PeftConfig]) -> None:
        """Raise `AdapterStateError` if an adapter trains biases whose other values are not kept here."""
        for name, config in configs.items():
            which = trained_biases(config)
            if which is not None and name != self.name:
                msg = (
                    f"The adapter {name!r} trains the base model's biases (bias={which!r}), and the values that are "
                    "not in place are kept by the PeftModel around this model. Pass the PeftModel itself."
                )
                raise AdapterStateError(msg)

    def check_writable(self, layers: Iterable[BaseTunerLayer]) -> None:
        """Raise `AdapterStateError` if adapters are merged, perhaps into these very biases: new ones would not show."""
        merged = next((layer.merged_adapters for layer in layers if layer.merged), None)
        if self.name and merged:
            msg = (
                f"The base model's biases, which {self.name!r} trains (bias={self.which!r}), cannot get other values "
                f"while {listing(merged)} is merged into the model. Call unmerge_adapter() first."
            )
            raise AdapterStateError(msg)

    def check_readable(self, layers: Iterable[BaseTunerLayer]) -> None:
        """Raise `AdapterStateError` if what is merged holds trained biases that do not belong to it."""
        merged = {name for layer in layers for name in layer.merged_adapters}
        if self.shown and merged and self.name not in merged:
            msg = (
                f"{listing(sorted(merged))} is merged into biases that {self.name!r} trains (bias={self.which!r}), so "
                "the base model's own with only what is merged are not there. Call unmerge_adapter() first, or merge "
                f"{self.name!r} too."
            )
            raise AdapterStateError(msg)

    def check_unmerged(self, layers: Sequence[BaseTunerLayer]) -> None:
        """Raise `AdapterStateError` if adapters are merged, perhaps into these very biases."""
        merged = next((layer.merged_adapters for layer in layers if layer.merged), None)
        if merged:
            msg = (
                f"{self.name!r} trains the base model's biases, which cannot be put back while {listing(merged)} is "
                "merged. Call unmerge_adapter() before deleting it."
            )
            raise AdapterStateError(msg)

    def check_routed(self, names: Sequence[str]) -> None:
        """Raise `RouteError` if a call with these adapters would need other biases than those that are in place."""
        if (self.name in names) == self.shown:
            return
        where = "is active" if self.shown else "is not active"
        asked = listing(names) if names else "the base model"
        msg = (
            f"Calls cannot be routed to {asked}: {self.name!r} trains the base model's own biases "
            f"(bias={self.which!r}), which all calls share, and {where}. Call set_adapter(), or use disable_adapter() "
            "for the base model."
        )
        raise RouteError(msg)

    def check_merge(self, names: Sequence[str], *, for_good: bool) -> None:
        """Raise `MergeError` if merging these adapters would leave biases in place that do not belong to them."""
        if self.name in names and not self.shown:
            msg = (
                f"The adapter {self.name!r} trains the base model's biases (bias={self.which!r}), and they are in "
                f"place only while it is active. Call set_adapter({self.name!r}) before merging it."
            )
            raise MergeError(msg)
        if for_good and self.shown and self.name not in names:
            msg = (
                f"The biases that {self.name!r} trains (bias={self.which!r}) are in place, and {self.name!r} is not "
                f"among what is merged, {listing(names)}. Merge it too, or make the others active first with "
                "set_adapter()."
            )
            raise MergeError(msg)


def _own(module: nn.Module, merged: dict[int, nn.Parameter]) -> nn.Parameter:
    return merged.get(id(module), module._parameters[_BIAS])  # type: ignore[return-value]
