"""Merging and taking apart: what is done to all layers of a model at once, so that it happens to all or to none."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tunerkit.adapted_layer import AdaptedLayer
from tunerkit.errors import ArgumentError, MergeError, MergeWarning, QuantisationWarning
from tunerkit.folding import fold, merge_order, move
from tunerkit.journal import Journal
from tunerkit.layer import BaseTunerLayer, is_layer, layers_in
from tunerkit.model_config import embedding_layers
from tunerkit.modules import modules_in
from tunerkit.names import EntryModule
from tunerkit.naming import listing
from tunerkit.targeting import bare, places

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tunerkit.biases import Biases


KEEPS = ("device", "cpu", "none")
"""Where the original parameters can be kept while adapters are merged: where they are, on the CPU, or not at all."""


def merge_layers(
    model: nn.Module, names: Sequence[str], trainable: list[nn.Parameter], *, safe: bool, keep_base: str
) -> None:
    """Merge adapters into all layers that have them.

    If anything goes wrong it is into none of them. With "none" that holds for whatever can be refused; if the loop is
    interrupted, the layers done so far are merged and the others still have their adapters active.

    Args:
        model: The base model with the layers.
        names: The adapters.
        trainable: The base model's parameters that are to train when the adapters are gone; those that are given up are
            replaced.
        safe: Refuse NaN and infinities.
        keep_base: One of `KEEPS`.

    Raises:
        MergeError: An adapter cannot be merged; nothing was changed.
    """
    layers = layers_in(model)
    _check(model, layers, names)
    if keep_base == "none":
        _check_foldable(layers, names, safe=safe)
        with torch.no_grad(), Journal() as journal:
            _merge_by_hand(journal, layers, names, safe=safe)
            _merge_quantised(journal, layers, names, safe=safe)
            _report_rounding(_roundings(layers))
        _merge_rest(layers, names, trainable, safe=safe)
        return
    shared = _shared_parameters(model) if keep_base == "cpu" else set()
    with torch.no_grad(), Journal() as journal:
        for layer in layers:
            note_parameters(journal, layer)
            layer.merge(safe_merge=safe, adapter_names=list(names))
            # A quantised weight is small, and is more than the one tensor that would be moved.
            if keep_base == "cpu" and isinstance(layer, AdaptedLayer) and not layer.site.quantised:
                for original in layer.originals.values():
                    if original is not None and id(original) not in shared:
                        journal.note(move, original, original.device)
                        move(original, torch.device("cpu"))
        _report_rounding(_roundings(layers))


@torch.no_grad()
def _merge_rest(
    layers: Sequence[BaseTunerLayer], names: Sequence[str], trainable: list[nn.Parameter], *, safe: bool
) -> None:
    """Merge in the layers that are not merged yet, and give up the originals of all of them."""
    with _held_weakly(trainable) as trained:
        for layer in layers:
            if isinstance(layer, AdaptedLayer):
                if not layer.site.quantised:
                    layer.merge(safe_merge=safe, adapter_names=list(names))
                trainable += [heir for old, heir in layer.forget_base() if id(old) in trained]


def check_keep(keep_base: str, biases: Biases) -> None:
    """Raise if originals cannot be kept there: `ArgumentError`, or `MergeError` where biases that train are lost."""
    if keep_base not in KEEPS:
        msg = f"keep_base is {keep_base!r}; it can be {listing(KEEPS)}."
        raise ArgumentError(msg)
    if keep_base == "none" and biases.name:
        msg = (
            f"{biases.name!r} trains the base model's biases (bias={biases.which!r}), and without the originals "
            "(keep_base='none') they could not be told from merged ones. Use keep_base='device' or merge_and_unload()."
        )
        raise MergeError(msg)


def _shared_parameters(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that several modules hold."""
    held = [id(one) for module in modules_in(model) for one in set(module._parameters.values()) if one is not None]
    return {name for name, count in Counter(held).items() if count > 1}


def _check_foldable(layers: Sequence[BaseTunerLayer], names: Sequence[str], *, safe: bool) -> None:
    """Raise what folding adapters would raise, with nothing changed."""
    for layer in layers:
        if isinstance(layer, AdaptedLayer) and (safe or not layer.keeps_base):
            adapters = [layer.adapters[name] for name in merge_order(layer, names)]
            fold(layer.site, layer.bare_site, adapters, safe=safe)


def _merge_by_hand(journal: Journal, layers: Sequence[BaseTunerLayer], names: Sequence[str], *, safe: bool) -> None:
    """Merge in the layers written by hand, which come first because they alone know whether they can."""
    for layer in layers:
        if not isinstance(layer, AdaptedLayer):
            note_parameters(journal, layer)
            layer.merge(safe_merge=safe, adapter_names=list(names))


def _merge_quantised(journal: Journal, layers: Sequence[BaseTunerLayer], names: Sequence[str], *, safe: bool) -> None:
    """Merge in the quantised layers, with their originals, which are small, kept until it is known that they can go.

    How far that rounds them is told meanwhile: whoever makes an error of it finds the model as it was.
    """
    for layer in layers:
        if isinstance(layer, AdaptedLayer) and layer.site.quantised:
            note_parameters(journal, layer)
            layer.merge(safe_merge=safe, adapter_names=list(names))


def unmerge_layers(model: nn.Module) -> None:
    """Take what is merged out of all layers, or out of none if anything goes wrong."""
    with Journal() as journal:
        # Where one layer's base holds another's, what was merged last is taken out first.
        for layer in reversed(layers_in(model)):
            if layer.merged:
                note_parameters(journal, layer)
                layer.unmerge()


def note_activity(journal: Journal, layers: Sequence[BaseTunerLayer]) -> None:
    """Note what is active on layers, and which tensors of their adapters train, before either changes."""
    journal.note_all(
        AdaptedLayer.resume, [(layer, layer.activity) for layer in layers if isinstance(layer, AdaptedLayer)]
    )
    by_hand = [layer for layer in layers if not isinstance(layer, AdaptedLayer)]
    note_layers(journal, by_hand)
    for layer in by_hand:
        journal.note_flags(tensor for name in layer.available_adapters for tensor in layer.trainable_tensors(name))


def note_layers(journal: Journal, layers: Sequence[BaseTunerLayer]) -> None:
    """Note layers before adapters are taken out of them."""
    for layer in layers:
        journal.note_module(layer)  # type: ignore[arg-type]
        if isinstance(layer, AdaptedLayer):
            for entry in layer._modules.values():
                if isinstance(entry, EntryModule):  # they name the adapters of whose buffers some are not saved
                    journal.note_module(entry)
        else:
            # It keeps what is the adapters' in containers of its own.
            for container in (getattr(layer, entry, None) for entry in layer.adapter_layer_names):
                if isinstance(container, nn.Module):
                    journal.note_module(container)


def note_parameters(journal: Journal, layer: BaseTunerLayer) -> None:
    """Note a layer's base parameters before adapters are merged into them or taken out."""
    if isinstance(layer, AdaptedLayer):
        held = layer.site.owner._parameters
        journal.note(_take_back, layer, layer.activity, held, held.copy())
        return
    journal.note_module(layer)  # type: ignore[arg-type]
    base = layer.get_base_layer()
    journal.note_module(base)
    if not layer.replaces:
        # A layer written by hand changes them in place.
        for parameter in base.parameters():
            journal.note_values(parameter)


def _take_back(layer: AdaptedLayer, activity: tuple[Any, ...], held: dict[str, Any], before: dict[str, Any]) -> None:
    for name in [name for name in held if name not in before]:
        del held[name]
    held.update(before)
    layer.resume(activity)


def merge_for_good(
    model: nn.Module,
    names: Sequence[str],
    trainable: list[nn.Parameter],
    *,
    safe: bool,
    progressbar: bool,
    dequantize: bool,
) -> None:
    """Merge adapters into all layers without keeping the original parameters.

    Whatever can be refused is refused before the first layer is changed. If the loop is interrupted, the layers done so
    far are merged and the others still have their adapters: the model computes what it did, and a second call does the
    rest.

    Args:
        model: The base model with the layers.
        names: The adapters.
        trainable: The base model's parameters that are to train when the adapters are gone; the new ones are added, and
            those that nothing uses any more are left out.
        safe: Refuse NaN and infinities.
        progressbar: Show progress.
        dequantize: Put layers that are not quantised in place of those that are, so that nothing is rounded.

    Raises:
        MergeError: An adapter cannot be merged; nothing was changed.
    """
    layers = layers_in(model)
    _check(model, layers, names)
    _check_foldable(layers, names, safe=safe)
    progress = _progress("merging", len(layers), show=progressbar)
    with torch.no_grad(), progress as advance, _held_weakly(trainable) as trained:

        def finish(layer: BaseTunerLayer) -> list[nn.Parameter]:
            heirs = [heir for old, heir in layer.merge_for_good(list(names)) if id(old) in trained]
            advance()
            return heirs

        # Layers written by hand alone know whether they can, so they come first, and all of them or none.
        heirs: list[nn.Parameter] = []
        with Journal() as journal:
            for layer in layers:
                if not isinstance(layer, AdaptedLayer):
                    note_parameters(journal, layer)
                    journal.note_flags(layer.parameters())  # type: ignore[attr-defined]
                    heirs += finish(layer)
            if not dequantize:
                _merge_quantised(journal, layers, names, safe=False)
                _report_rounding(_roundings(layers))
        trainable += heirs
        for layer in layers:
            if isinstance(layer, AdaptedLayer):
                if dequantize:
                    layer.dequantize()
                trainable += finish(layer)
    _untie(model, trainable)


@contextlib.contextmanager
def _held_weakly(parameters: list[nn.Parameter]) -> Iterator[set[int]]:
    """Within the block a list keeps no parameter alive; yields the ids of those that were in it."""
    known = [(id(parameter), weakref.ref(parameter)) for parameter in parameters]
    parameters.clear()
    try:
        yield {name for name, _ in known}
    finally:
        parameters += [parameter for _, alive in known if (parameter := alive()) is not None]


def unwrap(model: nn.Module, journal: Journal, *, only_empty: bool = False) -> None:
    """Put the base layers back where layers with adapters are.

    Args:
        model: The base model with the layers.
        journal: Where each step is noted before it is taken.
        only_empty: Only where a layer holds no adapter any more.
    """
    for _, module, parent, name in places(model):
        holder, child, layer = parent, name, module
        while isinstance(layer, BaseTunerLayer):
            base = getattr(layer, layer.base_name)
            if only_empty and layer.available_adapters:
                holder, child = layer, layer.base_name
            else:
                journal.note_module(holder)
                holder._modules[child] = base
            layer = base


def _check(model: nn.Module, layers: Sequence[BaseTunerLayer], names: Sequence[str]) -> None:
    merged = {name for layer in layers for name in layer.merged_adapters}
    again = [name for name in names if name in merged]
    if again:
        warnings.warn(MergeWarning(f"{listing(again)} is merged already and is not merged again."), stacklevel=4)
    for layer in layers:
        layer.check_merge(names)
    check_not_shared(model, names)
    _check_in_place(model, layers, names)


def check_not_shared(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse to merge into a module that also stands where the adapters do not apply, or where others do."""
    holders: dict[int, nn.Module] = {}
    twice: set[int] = set()
    for _, module, _, _ in places(model):
        base = id(bare(module))
        if holders.setdefault(base, module) is not module:
            twice.add(base)
    if not twice:
        return
    here = [(path, module) for path, module, _, _ in places(model) if id(bare(module)) in twice]
    for path, module in here:
        if is_layer(module) and not module.replaces and not set(names).isdisjoint(module.available_adapters):
            others = [place for place, other in here if other is not module and bare(other) is bare(module)]
            msg = (
                f"The module at {path!r} also stands at {listing(others)}, where other adapters apply "
                "or none, so merging into it would change the output there. Target all of its places with one adapter, "
                "or keep the adapter as it is."
            )
            raise MergeError(msg)


def _check_in_place(model: nn.Module, layers: Sequence[BaseTunerLayer], names: Sequence[str]) -> None:
    """Refuse to merge in layers written by hand, which change their parameters in place, if others hold these too."""
    for layer in layers:
        if isinstance(layer, AdaptedLayer) or layer.replaces or set(names).isdisjoint(layer.available_adapters):
            continue
        base = layer.get_base_layer()
        own = {id(module) for module in base.modules()}
        parameters = {id(parameter) for parameter in base.parameters()}
        others = [
            path
            for path, module in model.named_modules()
            if id(module) not in own and not parameters.isdisjoint(map(id, module._parameters.values()))
        ]
        if others:
            here = next(path for path, module in model.named_modules() if module is layer)
            msg = (
                f"The module at {here!r} shares a parameter with {listing(others)}, and a {type(layer).__name__}, "
                "which its method's own code put in, may change it in place, so merging into it would change the "
                "others. Keep the adapter as it is, or give the module a parameter of its own first."
            )
            raise MergeError(msg)


def _roundings(layers: Sequence[BaseTunerLayer]) -> dict[str, float]:
    return {layer.site.name: layer.rounding for layer in layers if isinstance(layer, AdaptedLayer)}


def _report_rounding(roundings: dict[str, float]) -> None:
    errors = {name: error for name, error in roundings.items() if error}
    if errors:
        worst = max(errors, key=errors.__getitem__)
        msg = (
            f"Adapters were merged into {len(errors)} quantised layers, which rounds their weights: by up to "
            f"{errors[worst]:.2%} of the norm of the exact weight ({worst!r}). merge_and_unload(dequantize=True) is "
            "exact and leaves these layers unquantised."
        )
        warnings.warn(QuantisationWarning(msg, errors), stacklevel=4)


def _untie(model: nn.Module, trainable: list[nn.Parameter]) -> None:
    """Tie a transformers model's embeddings again if they became the same, or tell it that they are not tied any more.

    Args:
        model: The base model.
        trainable: Its parameters that are to train; what is given up is left out.
    """
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    embeddings = embedding_layers(model)
    weights = [None if module is None else getattr(module, "weight", None) for module in embeddings]
    first, second = weights
    if first is not None and second is not None and first is not second:
        holder = bare(embeddings[1])._parameters
        same = first.device == second.device and torch.equal(first, second)
        if same and holder.get("weight") is second:
            holder["weight"] = first
            trainable[:] = [parameter for parameter in trainable if parameter is not second]
            return
        config.tie_word_embeddings = False  # type: ignore[union-attr]
        msg = (
            "Merging into one of two tied embeddings made them differ, so the model's config says "
            "tie_word_embeddings=False now; save the config with the model."
        )
        warnings.warn(MergeWarning(msg), stacklevel=5)


@contextlib.contextmanager
def _progress(label: str, total: int, *, show: bool) -> Iterator[Callable[[], None]]:
    if not show:
        yield lambda: None
        return
    from rich.console import Console  # noqa: PLC0415 - imported only when a bar is asked for
    from rich.progress import Progress  # noqa: PLC0415 - the same

    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total)
        yield lambda: progress.advance(task)
