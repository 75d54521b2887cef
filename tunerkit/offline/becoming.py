"""What each tensor of a base model becomes when an adapter is merged: decided before anything is read or written."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunerkit.adapted_layer import AdaptedLayer
from tunerkit.copied_module import CopiedModule
from tunerkit.errors import CheckpointError, MergeError
from tunerkit.folding import merge_order
from tunerkit.layer import BaseTunerLayer, tuner_layers
from tunerkit.merge import check_not_shared
from tunerkit.naming import listing
from tunerkit.offline.fitting import NAME
from tunerkit.offline.tensor_file import DTYPES, FLOATS, Entry

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    import torch
    from torch import Tensor, nn

    from tunerkit.config import PeftConfig
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
        sources: Where its weights and bias are read: the name in the module, and the key in the base's files.
        results: Where it is written: its name in the module, and the key in the files written. Not the same where it
            was tied to the tensor of another module.
    """

    layers: tuple[AdaptedLayer, ...]
    sources: Mapping[str, str]
    results: Mapping[str, str]


@dataclass(frozen=True)
class Added:
    """A tensor that the base's files leave out and that now needs a place of its own.

    Attributes:
        beside: The key of the tensor after which it stands.
        entry: Its dtype, shape and size.
        tied: Whether the files leave it out because it was tied to that one; otherwise they have nothing like it.
    """

    beside: str
    entry: Entry
    tied: bool


@dataclass(frozen=True)
class Becoming:
    """What the tensors of a base model become. Those that nothing is said of are copied as they are.

    Attributes:
        adapter: The adapter's config.
        model: The class of the model.
        folded: The modules into which adapters are folded.
        given: The base's own tensors that the checkpoint holds too, in place of what the files hold: biases that were
            trained, embeddings that were saved along. By their key in the base's files.
        replaced: The tensors of modules that were trained as a whole, by their key in the files written.
        added: What stands there beside the base's own, by key. Where it is neither folded nor replaced, it is what it
            was tied to.
        config: What `config.json` is to hold instead, or None if it stays.
    """

    adapter: PeftConfig
    model: str
    folded: tuple[Folded, ...]
    given: Mapping[str, Tensor]
    replaced: Mapping[str, Tensor]
    added: Mapping[str, Added]
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
    given = known.given(tuner.model)
    whole = _Whole({}, [], [])
    for path, layer in tuner_layers(tuner.model):
        if isinstance(layer, CopiedModule):
            whole.add(layer, known)
        else:
            modules.setdefault(id(layer.get_base_layer()), []).append(_mergeable(path, layer))
    folded = tuple(_folded(layers, known) for layers in modules.values())
    tied = [one.results[local] for one in folded for local in one.sources if known.is_tied(one, local)] + whole.tied
    model = type(skeleton.model).__name__
    config: dict[str, Any] | None = None
    added: dict[str, Added] = {}
    if tied:
        config = _without_ties(folder.config)
        added = _untie(known, skeleton.untied(config).names(), tied)
    if whole.new:
        # The files now are those of the class that has these modules.
        config = {**(config or folder.config), "architectures": [model]}
        added.update({key: known.place_for(key, whole.tensors[key]) for key in whole.new})
    replaced = {key: tensor for key, tensor in whole.tensors.items() if key in known.entries or key in added}
    return Becoming(tuner.peft_config[NAME], model, folded, given, replaced, added, config)


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

    def given(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the tensors of the base that are there on its skeleton, because a checkpoint held them, by key.

        Raises:
            CheckpointError: The files hold nothing for one, or it is of another form there.
        """
        real = {
            name: tensor
            for module in model.modules()
            if id(module) in self.names.places
            for local, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None and not tensor.is_meta
            for name in self.own_names(module, local)
            if name in self.names.aliases
        }
        found: dict[str, Tensor] = {}
        for group in dict.fromkeys(self.names.aliases[name] for name in real):
            first = next(name for name in group if name in real)
            keys = [key for name in group if (key := self.key_of([name])) is not None]
            if not keys:
                msg = (
                    f"The base model's files hold no tensor for {first!r}, which the adapter's checkpoint does. "
                    f"{_INSTEAD}"
                )
                raise CheckpointError(msg)
            for key in keys:
                self.check(key, real[first].shape, DTYPES)
                found[key] = real[first]
        return found

    def is_tied(self, folded: Folded, local: str) -> bool:
        """Return whether a parameter of a module is also one of another module."""
        own = self.own_names(folded.layers[0].site.owner, local)
        return folded.results[local] != folded.sources[local] or not set(self.names.aliases[own[0]]) <= set(own)

    def check(self, key: str, shape: torch.Size, dtypes: Collection[str]) -> None:
        """Raise `CheckpointError` if a tensor has not the shape that the model's config says, or no fitting dtype."""
        entry = self.entries[key]
        if entry.shape != tuple(shape) or entry.dtype not in dtypes:
            msg = (
                f"The base model's files hold {key!r} as {entry.dtype} of shape {entry.shape}; by its config it has "
                f"the shape {tuple(shape)}, and only {', '.join(dtypes)} can be written anew."
            )
            raise CheckpointError(msg)

    def place_for(self, key: str, tensor: Tensor) -> Added:
        """Return where a tensor is to stand of which the base's files hold nothing.

        Raises:
            CheckpointError: Transformers would take it for another.
        """
        if self.names.parameter(key) != (key, False):
            msg = (
                f"The adapter brings {key!r} along, which the base model's files do not hold and which transformers "
                f"would load under another name. {_INSTEAD}"
            )
            raise CheckpointError(msg)
        dtype = next(name for name, kind in DTYPES.items() if kind is tensor.dtype)
        if dtype in FLOATS:
            held = [entry.dtype for entry in self.entries.values() if entry.dtype in FLOATS]
            dtype = Counter([*held, dtype]).most_common(1)[0][0]
        size = tensor.numel() * DTYPES[dtype].itemsize
        return Added(next(reversed(self.entries)), Entry(dtype, tuple(tensor.shape), 0, size), tied=False)


@dataclass
class _Whole:
    """Modules that were trained as a whole.

    Attributes:
        tensors: Their tensors, by their key in the files, which may leave some out that are tied.
        tied: The keys of those that were tied to a tensor of another module.
        new: The keys of those of which the base's files hold nothing.
    """

    tensors: dict[str, Tensor]
    tied: list[str]
    new: list[str]

    def add(self, layer: CopiedModule, known: _Known) -> None:
        """Add the tensors of an adapter's copy."""
        original = layer.get_base_layer()
        own = {
            name: tensor
            for local, tensor in layer.adapter_tensors(NAME).items()
            for name in known.own_names(original, local)
        }
        for group in dict.fromkeys(known.names.aliases[name] for name in own):
            mine = [name for name in group if name in own]
            keys = [known.key_of([name]) or name for name in mine]
            held = [key for key in keys if key in known.entries]
            for key in held:
                known.check(key, own[mine[0]].shape, DTYPES)
            others = [name for name in group if name not in own]
            tied = bool(others) and any(name in known.keys for name in group)
            self.tied += (held or keys[:1]) if tied else []
            self.new += [] if held or tied else keys[:1]
            self.tensors.update(dict.fromkeys(keys, own[mine[0]]))


def _folded(layers: list[AdaptedLayer], known: _Known) -> Folded:
    owner = layers[0].site.owner
    weights = {layer.site.weight_name for layer in layers}
    biases = {layer.site.bias_name for layer in layers if layer.site.bias is not None}
    sources, results = {}, {}
    for local in sorted(weights | biases):
        parameter = owner._parameters.get(local)
        if parameter is None:
            msg = (
                f"{layers[0].site.name!r} ({type(owner).__name__}) has no parameter {local!r} of its own, which the "
                f"adapter on it may change, so it is not known in which of the base's tensors that is. {_INSTEAD}"
            )
            raise CheckpointError(msg)
        own = known.own_names(owner, local)
        key = known.key_of(own)
        source = key or known.key_of(name for name in known.names.aliases[own[0]] if name not in own)
        if source is not None:
            known.check(source, parameter.shape, FLOATS)
            sources[local], results[local] = source, key or own[0]
        elif local in weights:
            msg = f"The base model's files hold no tensor for {own[0]!r}, which the adapter changes. {_INSTEAD}"
            raise CheckpointError(msg)
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


def _untie(known: _Known, names: Names, tied: list[str]) -> dict[str, Added]:
    """Return the tensors that need a place of their own once nothing is tied.

    Args:
        known: The base's tensors.
        names: What the parameters are called in the model without ties.
        tied: The keys of the tensors that change and were tied.

    Raises:
        CheckpointError: The model ties them whatever its config says, or renames what would be written.
    """
    added: dict[str, Added] = {}
    for group in dict.fromkeys(known.names.aliases.values()):
        source = known.key_of(group) if sum(len(known.keys.get(name, ())) for name in group) == 1 else None
        for name in group:
            apart = names.aliases.get(name, ())
            if source is not None and not any(known.keys.get(other) or other in added for other in apart):
                added[name] = Added(source, known.entries[source], tied=True)
    still = [key for key in tied if len(names.aliases.get(known.names.parameter(key)[0], ())) > 1]
    lost = [key for key in (*known.entries, *added) if names.parameter(key) != known.names.parameter(key)]
    if still or lost or any(names.parameter(key)[0] != key for key in added):
        msg = (
            f"The adapter changes {listing(tied)}, which the base model ties to another tensor, and this model's "
            f"config cannot say that they differ. {_INSTEAD}"
        )
        raise CheckpointError(msg)
    return added
