"""What each tensor of a base model becomes when an adapter is merged: decided before anything is read or written."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunerkit.adapted_layer import AdaptedLayer
from tunerkit.errors import CheckpointError, MergeError
from tunerkit.folding import merge_order
from tunerkit.layer import BaseTunerLayer, tuner_layers
from tunerkit.merge import check_not_shared
from tunerkit.naming import listing
from tunerkit.offline.fitting import NAME
from tunerkit.offline.tensor_file import DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import nn

    from tunerkit.offline.model_folder import ModelFolder
    from tunerkit.offline.skeleton import Names, Skeleton
    from tunerkit.tuner import BaseTuner

_TIE = "tie_word_embeddings"
_INSTEAD = "Load the model, call merge_and_unload() and save that."


@dataclass(frozen=True)
class Folded:
    """A module whose tensors are read together, because an adapter is folded into them.

    Attributes:
        layers: The layers with adapters: one, or one for each parameter that is adapted by itself.
        sources: Where each of its parameters is read: its name in the module, and the key in the base's files.
        results: Where it is written: its name in the module, and the key in the files written. Not the same where it
            was tied to the tensor of another module.
    """

    layers: tuple[AdaptedLayer, ...]
    sources: Mapping[str, str]
    results: Mapping[str, str]


@dataclass(frozen=True)
class Becoming:
    """What the tensors of a base model become. Those that nothing is said of are copied as they are.

    Attributes:
        folded: The modules into which adapters are folded.
        added: Tensors that the base's files leave out, because they are tied, and that now need a place of their own:
            by their key, the key of the tensor they were tied to.
        config: What `config.json` is to hold instead, or None if it stays.
    """

    folded: tuple[Folded, ...]
    added: Mapping[str, str]
    config: dict[str, Any] | None


def decide(folder: ModelFolder, skeleton: Skeleton, names: Names, tuner: BaseTuner) -> Becoming:
    """Say what each tensor of a base model becomes.

    Args:
        folder: The base model.
        skeleton: Its skeleton.
        names: What its parameters were called before the adapter was put onto it.
        tuner: The skeleton with the adapter.

    Raises:
        MergeError: The adapter cannot be merged.
        CheckpointError: It is not certain which of the base's tensors a parameter is.
    """
    known = _Known(folder, names)
    check_not_shared(tuner.model, [NAME])
    modules: dict[int, list[AdaptedLayer]] = {}
    for path, layer in tuner_layers(tuner.model):
        modules.setdefault(id(layer.get_base_layer()), []).append(_mergeable(path, layer))
    folded = tuple(_folded(layers, known) for layers in modules.values())
    tied = [
        one.results[local] for one in folded for local, key in one.sources.items() if known.is_tied(one, local, key)
    ]
    if not tied:
        return Becoming(folded, {}, None)
    config = _without_ties(folder.config)
    added = _untie(known, skeleton.untied(config).names(), tied)
    return Becoming(folded, added, config)


def _mergeable(path: str, layer: BaseTunerLayer) -> AdaptedLayer:
    if not isinstance(layer, AdaptedLayer):
        msg = (
            f"{path!r} became a {type(layer).__name__}, a layer that its method puts in place itself, which cannot be "
            f"merged into files. {_INSTEAD}"
        )
        raise MergeError(msg)
    merge_order(layer, [NAME])
    return layer


class _Known:
    """What is known of the base's tensors: the parameter that each of them is."""

    def __init__(self, folder: ModelFolder, names: Names) -> None:
        self.names = names
        self.entries = {key: file.entries[key] for key, file in folder.where.items()}
        self.keys: dict[str, list[str]] = {}
        self.computed: set[str] = set()
        for key in self.entries:
            name, computed = names.parameter(key)
            self.keys.setdefault(name, []).append(key)
            if computed:
                self.computed.add(name)

    def own_names(self, owner: nn.Module, local: str) -> list[str]:
        """Return the names of a module's parameter, one for each place at which the module stands."""
        return [f"{path}.{local}" if path else local for path in self.names.places[id(owner)]]

    def key_of(self, names: Iterable[str]) -> str | None:
        """Return the key of the tensor that has one of these names, or None if the files hold none.

        Raises:
            CheckpointError: There are several, or the parameter is computed from them.
        """
        found = [(name, key) for name in names for key in self.keys.get(name, ())]
        if not found:
            return None
        if len(found) > 1 or found[0][0] in self.computed:
            msg = (
                f"transformers makes the parameter {found[0][0]!r} out of {listing(key for _, key in found)} when it "
                f"loads the base model, so an adapter on it cannot be merged into the files. {_INSTEAD}"
            )
            raise CheckpointError(msg)
        return found[0][1]

    def is_tied(self, folded: Folded, local: str, key: str) -> bool:
        """Return whether a parameter of a module is also one of another module."""
        own = self.own_names(folded.layers[0].site.owner, local)
        return folded.results[local] != key or not set(self.names.aliases[own[0]]) <= set(own)


def _folded(layers: list[AdaptedLayer], known: _Known) -> Folded:
    owner = layers[0].site.owner
    needed = {layer.site.weight_name for layer in layers}
    sources, results = {}, {}
    for local, parameter in owner._parameters.items():
        if parameter is None:
            continue
        own = known.own_names(owner, local)
        key = known.key_of(own)
        source = key or known.key_of(name for name in known.names.aliases[own[0]] if name not in own)
        if source is None:
            if local in needed:
                msg = f"The base model's files hold no tensor for {own[0]!r}, which the adapter changes. {_INSTEAD}"
                raise CheckpointError(msg)
            continue
        entry = known.entries[source]
        if entry.shape != tuple(parameter.shape) or entry.dtype not in DTYPES:
            msg = (
                f"The base model's files hold {source!r} as {entry.dtype} of shape {entry.shape}; by its config it has "
                f"the shape {tuple(parameter.shape)}, and only {', '.join(DTYPES)} can be folded into."
            )
            raise CheckpointError(msg)
        sources[local], results[local] = source, key or own[0]
    return Folded(tuple(layers), sources, results)


def _without_ties(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's config that says that no embeddings are tied, also in the configs within it."""
    untied = copy.deepcopy(dict(config))
    for part in _configs(untied):
        if part is untied or _TIE in part:
            part[_TIE] = False
    return untied


def _configs(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _configs(value)


def _untie(known: _Known, names: Names, tied: list[str]) -> dict[str, str]:
    """Return the tensors that need a place of their own once nothing is tied.

    Args:
        known: The base's tensors.
        names: What the parameters are called in the model without ties.
        tied: The keys of the tensors that are folded and were tied.

    Raises:
        CheckpointError: The model ties them whatever its config says, or renames what would be written.
    """
    added: dict[str, str] = {}
    for group in dict.fromkeys(known.names.aliases.values()):
        source = known.key_of(group) if sum(len(known.keys.get(name, ())) for name in group) == 1 else None
        for name in group:
            apart = names.aliases.get(name, ())
            if source is not None and not any(known.keys.get(other) or other in added for other in apart):
                added[name] = source
    still = [key for key in tied if len(names.aliases.get(known.names.parameter(key)[0], ())) > 1]
    lost = [key for key in (*known.entries, *added) if names.parameter(key) != known.names.parameter(key)]
    if still or lost or any(names.parameter(key)[0] != key for key in added):
        msg = (
            f"The adapter changes {listing(tied)}, which the base model ties to another tensor, and this model's "
            f"config cannot say that they differ. {_INSTEAD}"
        )
        raise CheckpointError(msg)
    return added
