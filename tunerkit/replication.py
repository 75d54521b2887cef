"""Repeating a model's layers with shared weights, so that each repetition has adapters of its own.

From "SOLAR 10.7B" (arXiv 2312.15166), depth up-scaling, in PEFT's form: `layer_replication=[(0, 4), (2, 5)]` makes the
layers 0, 1, 2, 3, 2, 3, 4 of the layers 0 to 4. Base weights are not copied.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from tunerkit.errors import AdapterStateError, TargetError
from tunerkit.layer import layers_in
from tunerkit.naming import listing

if TYPE_CHECKING:
    from tunerkit.config import PeftConfig
    from tunerkit.journal import Journal

Ranges = tuple[tuple[int, int], ...]

REPLICATION = "_tunerkit_replication"
"""Under what attribute the base model holds its `Replication`: where adapters are injected, no tuner stays."""


def wanted_ranges(config: PeftConfig) -> Ranges:
    """Return the ranges of layers that a config repeats; none if it repeats nothing."""
    return tuple((start, end) for start, end in getattr(config, "layer_replication", None) or ())


class Replication:
    """The layers that were repeated in a model; without arguments, none.

    Args:
        model: The base model.
        ranges: From which layer to before which, one after the other.

    Attributes:
        ranges: The ranges; none if no layer is repeated.

    Raises:
        TargetError: The model's layers are not found, or a range goes beyond them.
    """

    def __init__(self, model: nn.Module | None = None, ranges: Ranges = ()) -> None:
        self.ranges = ranges
        self._trunk: list[tuple[nn.Module, str]] = []
        if model is None or not ranges:
            return
        self._trunk = _trunk(model)
        self._layers: nn.ModuleList = _child(*self._trunk[-1])  # type: ignore[assignment]
        count = len(self._layers)
        for start, end in ranges:
            if not 0 <= start < end <= count:
                msg = (
                    f"layer_replication={[*ranges]} holds {(start, end)}, and the model has {count} layers: a range "
                    f"starts at 0 or later, and ends after its start and at {count} at most."
                )
                raise TargetError(msg)
        self._sources = [number for start, end in ranges for number in range(start, end)]
        self._config: Any = None
        for holder, _ in self._trunk:
            self._config = getattr(holder, "config", self._config)
        self._number: int | None = getattr(self._config, "num_hidden_layers", None)
        self._types: list[Any] | None = getattr(self._config, "layer_types", None)

    def _copies(self) -> nn.ModuleList:
        """Return the repeated layers; their parameters and buffers are those of the model's own."""
        # What is shared is known to `deepcopy` as copied already; configs too, for what is set there holds for all.
        shared = [*self._layers.parameters(), *self._layers.buffers()]
        configs = [config for module in self._layers.modules() if (config := vars(module).get("config")) is not None]
        layers = []
        for number, source in enumerate(self._sources):
            layer = copy.deepcopy(self._layers[source], {id(one): one for one in [*shared, *configs]})
            for module in layer.modules():
                if "layer_idx" in vars(module):  # transformers' place in the cache
                    module.__dict__["layer_idx"] = number
            layers.append(layer)
        made = nn.ModuleList(layers)
        made.training = self._layers.training
        return made

    def preview(self, model: nn.Module) -> nn.Module:
        """Return a shallow copy of the model in which the layers are repeated; the model is not changed."""
        if not self._trunk:
            return model
        inner: nn.Module = self._copies()
        for holder, name in reversed(self._trunk):
            above = copy.copy(holder)
            above.__dict__["_modules"] = {**holder._modules, name: inner}
            inner = above
        return inner

    def apply(self, journal: Journal) -> None:
        """Put the repeated layers in the place of the model's own, and say in its config how many there are."""
        if self._trunk:
            holder, name = self._trunk[-1]
            made = self._copies()
            self._put(journal, holder, name, made)
            types = None if self._types is None else [self._types[source] for source in self._sources]
            self._configure(journal, len(self._sources), types)

    def undo(self, journal: Journal) -> None:
        """Put the model's own layers back, moved and converted as the repeated ones were; these hold no adapters."""
        if not self._trunk:
            return
        holder, name = self._trunk[-1]
        made: Any = holder._modules[name]
        first = {source: number for number, source in reversed([*enumerate(self._sources)])}
        for source, number in first.items():
            for own, repeated in zip(self._layers[source].modules(), made[number].modules(), strict=True):
                journal.note_module(own)
                own._parameters.update(repeated._parameters)
                own._buffers.update(repeated._buffers)
                own.training = repeated.training
        journal.note_module(self._layers)
        self._layers.training = made.training
        self._put(journal, holder, name, self._layers)
        self._configure(journal, self._number, self._types)

    @staticmethod
    def _put(journal: Journal, holder: nn.Module, name: str, layers: nn.ModuleList) -> None:
        journal.note_module(holder)
        holder._modules[name] = layers

    def _configure(self, journal: Journal, number: Any, types: list[Any] | None) -> None:
        """Let the config say how many layers there are, and of what type each is where it lists that."""
        for setting, value in (("num_hidden_layers", number), ("layer_types", types)):
            if getattr(self._config, setting, None) is not None:
                journal.note(setattr, self._config, setting, getattr(self._config, setting))
                setattr(self._config, setting, value)

    def repeats_more(self, ranges: Ranges, model: nn.Module) -> bool:
        """Return whether layers are to be repeated for another adapter: not if the same are already.

        Raises:
            AdapterStateError: Other layers are repeated, or the model has adapters already.
        """
        if not ranges or ranges == self.ranges:
            return False
        held = sorted({name for layer in layers_in(model) for name in layer.available_adapters})
        if held:
            now = f"the layers {[*self.ranges]} repeated" if self.ranges else "its layers as they are"
            msg = (
                f"layer_replication={[*ranges]} repeats layers, and the model has the adapters {listing(held)} on "
                f"{now}. Attach the adapter that repeats layers first, and the others with the same layer_replication "
                "or none."
            )
            raise AdapterStateError(msg)
        return True


def _trunk(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the way to the list of a model's layers: each module on it with the name of the next.

    Raises:
        TargetError: There is no such list where models have it.
    """
    way: list[tuple[nn.Module, str]] = []
    inner = model
    while True:
        prefix = str(getattr(type(inner), "base_model_prefix", ""))
        name = next((name for name in ("model", "bert", prefix) if _child(inner, name) is not None), None)
        if name is None:
            break
        way.append((inner, name))
        inner = inner._modules[name]  # type: ignore[assignment]
    for path in ("layers", "encoder.layer", "h"):
        *above, last = path.split(".")
        found, end = list(way), inner
        for name in above:
            found.append((end, name))
            end = _child(end, name) or nn.Module()
        if isinstance(_child(end, last), nn.ModuleList):
            return [*found, (end, last)]
    msg = (
        f"layer_replication needs the list of the model's layers, and {type(inner).__name__} has none under 'layers', "
        "'encoder.layer' or 'h'. Leave it out for this model."
    )
    raise TargetError(msg)


def _child(module: nn.Module, name: str) -> nn.Module | None:
    return module._modules.get(name)
