"""Which modules an adapter trains and saves as a whole, beside what it adapts: PEFT's `modules_to_save`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from tunerkit.copied_module import ModulesToSaveWrapper
from tunerkit.errors import TargetError, UnsupportedSiteError
from tunerkit.layer import BaseTunerLayer, is_layer, layers_in, tuner_layers
from tunerkit.naming import listing
from tunerkit.targeting import HEADS, bare, match_name, paths_above, places

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tunerkit.config import PeftConfig
    from tunerkit.journal import Journal
    from tunerkit.route import Owner

_NEVER_CALLED = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


@dataclass(frozen=True)
class WholeModule:
    """A module of which an adapter is to have a copy, with every place at which it is meant."""

    name: str
    module: nn.Module
    places: tuple[tuple[nn.Module, str], ...]


class WholeModules:
    """The modules that a config means by `modules_to_save`.

    With `ensure_weight_tying` those are meant too whose weights are tied to them.

    Attributes:
        modules: The modules; one that stands inside another is part of that.
        entries: For each entry how many modules it matched.

    Args:
        model: The base model; other adapters may be attached to it.
        config: The adapter's config.

    Raises:
        UnsupportedSiteError: A module is of a kind that is never called, or is adapted, or holds what is.
    """

    def __init__(self, model: nn.Module, config: PeftConfig) -> None:
        wanted: Sequence[str] = getattr(config, "modules_to_save", None) or ()
        self._wanted = frozenset(wanted)
        self.entries: Counter[str] = Counter(dict.fromkeys(wanted, 0))
        self._layers: dict[str, BaseTunerLayer] = {}
        self._copying: dict[str, ModulesToSaveWrapper] = {}
        self._tied: set[str] = set()
        found: dict[int, WholeModule] = {}
        for key, module, parent, name in places(model):
            if is_layer(module):
                self._layers[key] = module
            if isinstance(module, ModulesToSaveWrapper):
                self._copying[key] = module
            entry = match_name(self._wanted, key)
            if not isinstance(entry, str):
                continue
            self.entries[entry] += 1
            if self.holder(key) != key:
                continue
            self._check(key, module)
            known = found.get(id(module), WholeModule(key, module, ()))
            found[id(module)] = WholeModule(known.name, module, (*known.places, (parent, name)))
        if tied_copies(config):
            self._add_tied(model, found)
        self.modules = tuple(found.values())

    def _add_tied(self, model: nn.Module, found: dict[int, WholeModule]) -> None:
        """Add the modules that hold a parameter of one that was found."""
        shared = {id(parameter) for whole in found.values() for parameter in bare(whole.module).parameters()}
        for key, module, parent, name in list(places(model)):
            own = bare(module)._parameters.values()
            if self.holder(key) is None and not shared.isdisjoint(id(one) for one in own if one is not None):
                self._check(key, module)
                self._tied.add(key)
                known = found.get(id(module), WholeModule(key, module, ()))
                found[id(module)] = WholeModule(known.name, module, (*known.places, (parent, name)))

    def holder(self, key: str) -> str | None:
        """Return the path of the module to be copied that a module is or stands in, or None."""
        if not self._wanted:
            return None
        return next((path for path in paths_above(key) if path in self._tied or match_name(self._wanted, path)), None)

    def unmatched(self) -> list[str]:
        """Return the entries that matched nothing.

        Of the names of a task's head one is enough: a config names all that models have for it.
        """
        met = {name for heads in HEADS.values() for name in heads if any(self.entries[head] for head in heads)}
        return [entry for entry, count in self.entries.items() if not count and entry not in met]

    def _check(self, key: str, module: nn.Module) -> None:
        if isinstance(module, _NEVER_CALLED):
            msg = (
                f"modules_to_save means {key!r}, a {type(module).__name__}, which is never called as a whole, so a "
                f"copy of it would never be run. Name the modules in it: {listing(module._modules, 4)}."
            )
            raise UnsupportedSiteError(msg)
        if isinstance(module, ModulesToSaveWrapper):
            return
        above = [path for path in paths_above(key) if path in self._layers]
        below = above or [f"{key}.{path}" if path else key for path, _ in tuner_layers(module)]
        if below:
            msg = (
                f"modules_to_save means {key!r} ({type(bare(module)).__name__}), and {below[0]!r} has adapters already "
                f"({self._holders(above, module)}), which a copy would take along. Name another module, or take those "
                "adapters out first with delete_adapter()."
            )
            raise UnsupportedSiteError(msg)
        for path, inner in module.named_modules():
            for name, value in inner.__dict__.items():
                if isinstance(value, Tensor) and not value.is_leaf:
                    where = f"{path}.{name}" if path else name
                    msg = (
                        f"modules_to_save means {key!r} ({type(module).__name__}), whose attribute {where!r} is a "
                        "tensor that was computed from others (as weight normalisation does), and torch cannot copy "
                        "such a module. Name another, or make it a parameter first."
                    )
                    raise UnsupportedSiteError(msg)

    def _holders(self, above: list[str], module: nn.Module) -> str:
        layers = [self._layers[above[0]]] if above else layers_in(module)
        return listing(sorted({name for layer in layers for name in layer.available_adapters}))

    def check_free(self, key: str) -> None:
        """Raise `TargetError` if a module that is to be adapted is, or stands in, one that other adapters copy."""
        for path in paths_above(key) if self._copying else ():
            layer = self._copying.get(path)
            if layer is not None:
                msg = (
                    f"The module {key!r} cannot be adapted: {listing(layer.available_adapters)} trains a copy of "
                    f"{path!r} as a whole (modules_to_save), and a copy has no adapters in it. Exclude the module, or "
                    "put it into modules_to_save of this adapter too."
                )
                raise TargetError(msg)


def tied_copies(config: PeftConfig) -> bool:
    """Return whether copies of tied modules are tied as well."""
    return bool(getattr(config, "ensure_weight_tying", False))


def put_copies(
    modules: Sequence[WholeModule], name: str, owner: Owner, journal: Journal, *, tied: bool
) -> list[BaseTunerLayer]:
    """Give an adapter its copies of modules, and put in the layers that run them; it is not active yet.

    Args:
        modules: The modules of which it gets copies.
        name: The adapter's name.
        owner: Stands for the model in the layers.
        journal: Where every step is noted before it is taken.
        tied: Whether copies share the tensors that their originals share.

    Returns:
        The layers that hold the copies.
    """
    layers: list[BaseTunerLayer] = []
    memo: dict[int, object] = {}
    for whole in modules:
        layer = whole.module
        if isinstance(layer, ModulesToSaveWrapper):
            journal.note_module(layer)
            journal.note_module(layer._container)
        else:
            layer = ModulesToSaveWrapper(layer, whole.name, owner)
        layer.add_copy(name, memo if tied else {})
        for parent, child in whole.places:
            journal.note_module(parent)
            parent._modules[child] = layer
        layers.append(layer)
    return layers
