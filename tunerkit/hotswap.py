"""Swapping the numbers of an adapter for those of another one in place, for every method.

The adapter that comes in is made beside the model, as its config says, and each adapter of the model then takes over
the numbers of its counterpart (`Adapter.take`). So shapes, settings and the form in a file are the method's business,
as they are when it is attached, and a compiled model sees nothing but other numbers in the same tensors.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch

from tunerkit._typecheck import fits
from tunerkit.adapted_layer import AdaptedLayer
from tunerkit.adapter import Adapter
from tunerkit.biases import trained_biases
from tunerkit.checkpoint.base_model import repeated_keys
from tunerkit.checkpoint.state import Loading, Piece, piece_of, untied
from tunerkit.config import check_config
from tunerkit.copied_module import CopiedModule
from tunerkit.embeddings import check_writable, embeddings_to_load
from tunerkit.errors import AdapterStateError, AdapterWarning, CheckpointError, ConfigError, UnknownAdapterError
from tunerkit.journal import Journal
from tunerkit.keywords import check_loading, of_download
from tunerkit.layer import original, tuner_layers
from tunerkit.naming import PREFIX, listing, method_id
from tunerkit.replication import wanted_ranges
from tunerkit.route import Owner
from tunerkit.saved import SavedAdapter
from tunerkit.sites import make_on_meta
from tunerkit.tuner import tuner_of

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn

    from tunerkit.config import PeftConfig
    from tunerkit.tuner import BaseTuner


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | torch.device | None = None,
    *,
    subfolder: str | None = None,
    key_mapping: dict[str, str] | None = None,
    **kwargs: Any,
) -> None:
    """Put the numbers of a saved adapter into an adapter of a model, in place; a compiled model need not recompile.

    To swap adapters of other ranks or scalings into a compiled model, call `prepare_model_for_compiled_hotswap` before
    compiling it.

    Args:
        model: A `PeftModel`, or a model into which adapters were injected; it may be compiled.
        model_name_or_path: The checkpoint's folder, or its id on the hub.
        adapter_name: The adapter whose numbers are replaced; it keeps its name, and whether it is active and trains.
        torch_device: Where the checkpoint's tensors are read to; the CPU if not given.
        subfolder: A folder below, for adapters that were saved beside others.
        key_mapping: See `load_peft_weights`.
        kwargs: What a download takes; see `tunerkit.keywords`.

    Raises:
        KeywordError: A keyword argument is unknown.
        CheckpointError: The checkpoint is not there, or does not fit; the model is as it was.
        AdapterStateError: The adapter is merged, or the method cannot be swapped; the model is as it was.
    """
    check_loading("hotswap_adapter", kwargs, ("torch_device", "subfolder", "key_mapping"))
    saved = SavedAdapter(
        model_name_or_path,
        subfolder,
        None,
        is_trainable=False,
        device=torch_device,
        key_mapping=key_mapping,
        download=of_download(kwargs),
    )
    hotswap_adapter_from_state_dict(model, saved.tensors, adapter_name, saved.config)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: PeftConfig,
    parameter_prefix: str | None = None,
) -> None:
    """Put a checkpoint's tensors into an adapter of a model, in place.

    Layers of the adapter for which there are no tensors get an adapter as the config starts it, which must be without
    effect. What the adapter has beside its layers is swapped too, if the other one has the same: copies of whole
    modules (`modules_to_save`) and trained biases. Embeddings in the checkpoint go into the base model, as in loading.

    Args:
        model: A `PeftModel`, or a model into which adapters were injected; it may be compiled.
        state_dict: The tensors, under keys as in a checkpoint, or with the adapter's name in them; not changed.
        adapter_name: The adapter whose numbers are replaced.
        config: The config of the adapter that comes in.
        parameter_prefix: Accepted for PEFT's sake; which tensors belong to the adapter follows from its layers.

    Raises:
        CheckpointError: The tensors do not fit; the model is as it was.
        AdapterStateError: The adapter is merged, the method cannot be swapped, the two do not train the same biases, or
            where there are no tensors the start would have an effect; the model is as it was.
    """
    del parameter_prefix
    tuner = tuner_of(model)
    layers = _layers_to_swap(tuner, adapter_name, check_config(config))
    with Journal() as journal:
        journal.note_module(tuner)
        journal.note(tuner.peft_config.update, dict(tuner.peft_config))
        filled = _filled(tuner, layers, adapter_name, config, state_dict)
        for _, layer, other in filled:
            adapter = layer.adapters[adapter_name]
            for module in adapter.modules():
                journal.note_module(module)
            for tensor in adapter.state_dict(keep_vars=True).values():
                journal.note_values(tensor)
            adapter.take(other)
        _check_tied(filled, adapter_name)
        if adapter_name in tuner.peft_config:
            new = config.copy()
            new.inference_mode = tuner.peft_config[adapter_name].inference_mode
            tuner.peft_config[adapter_name] = new


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: PeftConfig | dict[str, PeftConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Prepare the adapters of a model so that others can be swapped in after `torch.compile` without recompilation.

    Plain numbers such as scalings become tensors, and ranks are filled up with zeros. Outputs stay the same.

    Args:
        model: A `PeftModel`, or a model into which adapters were injected, not compiled yet.
        target_rank: The largest rank of the adapters to come; if not given, ranks stay.
        config: Accepted for PEFT's sake; a swap takes the rank from the config that comes with the adapter.
        check_compiled: What to do if the model is compiled already.

    Raises:
        ConfigError: `target_rank` is no rank, or `check_compiled` none of its values.
        AdapterStateError: The model is compiled, or an adapter has a larger rank; nothing was changed.
        UnknownAdapterError: The model has no adapters.
    """
    del config
    if check_compiled not in ("error", "warn", "ignore"):
        msg = f"check_compiled={check_compiled!r} is not known; possible are 'error', 'warn', 'ignore'."
        raise ConfigError(msg)
    if target_rank is not None and not (fits(target_rank, int) and target_rank > 0):
        msg = f"target_rank must be a whole number above 0, or None to leave ranks as they are; it is {target_rank!r}."
        raise ConfigError(msg)
    if original(model) is not model or model.__dict__.get("_compiled_call_impl") is not None:
        msg = "The model is compiled already, so preparing it now makes it compile again. Prepare it first."
        if check_compiled == "error":
            raise AdapterStateError(msg)
        if check_compiled == "warn":
            warnings.warn(AdapterWarning(msg), stacklevel=2)
    layers = [layer for layer in tuner_of(model).layers() if isinstance(layer, AdaptedLayer)]
    if not layers:
        msg = "The model has no adapters to prepare. Load the first adapter, then prepare the model, then compile it."
        raise UnknownAdapterError(msg)
    with Journal() as journal:
        for layer in layers:
            for adapter in layer.adapters.values():
                for module in adapter.modules():
                    journal.note_module(module)
                adapter.make_room(target_rank, layer.site.device)


def _layers_to_swap(tuner: BaseTuner, name: str, config: PeftConfig) -> list[tuple[str, AdaptedLayer]]:
    """Return the layers that hold the adapter, by path, if all of it can be swapped for one with this config."""
    found = [(path, layer) for path, layer in tuner_layers(tuner.model) if layer.holds(name)]
    if not found:
        known = sorted({known for layer in tuner.layers() for known in layer.available_adapters})
        msg = f"The model has no adapter {name!r} to swap; it has {listing(known)}. Load one with load_adapter()."
        raise UnknownAdapterError(msg)
    if name in tuner.peft_config and wanted_ranges(config) != wanted_ranges(tuner.peft_config[name]):
        msg = (
            f"The adapter to swap in has layer_replication={[*wanted_ranges(config)]}, and the adapter {name!r} has "
            f"layer_replication={[*wanted_ranges(tuner.peft_config[name])]}: they are for different layers. Delete the "
            "adapter and load the other one."
        )
        raise AdapterStateError(msg)
    layers: list[tuple[str, AdaptedLayer]] = []
    for path, layer in found:
        if isinstance(layer, CopiedModule):
            continue
        if not isinstance(layer, AdaptedLayer):
            msg = (
                f"The layer {path!r} of the adapter {name!r} is a {type(layer).__name__}, which cannot be swapped. "
                "Delete the adapter and load the other one."
            )
            raise AdapterStateError(msg)
        if name in layer.merged_adapters:
            msg = (
                f"The adapter {name!r} is merged, so other numbers would have no effect. Call unmerge_adapter() first."
            )
            raise AdapterStateError(msg)
        own, new = layer.adapters[name].__dict__["_method"], method_id(str(config.peft_type))
        if own != new:
            msg = f"The adapter {name!r} is of the method {own!r} and cannot be swapped for one of {new!r}."
            raise CheckpointError(msg)
        layers.append((path, layer))
    if name in tuner.parts:
        msg = (
            f"The adapter {name!r} has tensors that all its layers share, which cannot be swapped. Delete the adapter "
            "and load the other one."
        )
        raise AdapterStateError(msg)
    _check_biases(tuner, name, config)
    return layers


def _check_biases(tuner: BaseTuner, name: str, config: PeftConfig) -> None:
    tuner.biases.check_kept(tuner.peft_config)
    mine = tuner.biases.name == name
    own, new = tuner.biases.which if mine else "none", trained_biases(config) or "none"
    if own != new:
        msg = (
            f"The adapter {name!r} has bias={own!r} and the other bias={new!r}, so they do not train the same biases "
            "and cannot be swapped. Delete the adapter and load the other one."
        )
        raise AdapterStateError(msg)
    if mine:
        tuner.biases.check_writable(tuner.layers())


def _beside_layers(tuner: BaseTuner, name: str) -> list[Piece]:
    """Return what the adapter has beside its layers, to be written in place: copies of modules, and biases."""
    copies = [
        piece_of(path, layer, name, PREFIX)
        for path, layer in tuner_layers(tuner.model)
        if isinstance(layer, CopiedModule) and layer.holds(name)
    ]
    return copies + (tuner.biases.pieces() if tuner.biases.name == name else [])


def _check_tied(filled: Iterable[tuple[Piece, AdaptedLayer, Adapter]], name: str) -> None:
    """Raise `CheckpointError` if a tensor that several layers share was given two different values."""
    states = [(piece, layer.adapters[name].state_dict(keep_vars=True), other) for piece, layer, other in filled]
    last = {id(tensor): piece.key(local) for piece, own, _ in states for local, tensor in own.items()}
    for piece, own, other in states:
        theirs = other.state_dict()
        for local, tensor in own.items():
            key = piece.key(local)
            if last[id(tensor)] != key and not torch.equal(tensor, theirs[local].to(tensor)):
                raise CheckpointError(untied(key, last[id(tensor)]))


def _filled(
    tuner: BaseTuner,
    layers: Iterable[tuple[str, AdaptedLayer]],
    name: str,
    config: PeftConfig,
    state_dict: Mapping[str, Tensor],
) -> list[tuple[Piece, AdaptedLayer, Adapter]]:
    """Return each layer with the adapter that is to be swapped in there, made beside the model and filled.

    What the adapter has beside its layers is filled in place; an open journal holds what was there.
    """
    beside = {path: (layer, _made_beside(tuner, path, layer, name, config, meta=True)) for path, layer in layers}
    pieces = {path: piece_of(path, other, name, PREFIX) for path, (_, other) in beside.items()}
    everything = [*pieces.values(), *_beside_layers(tuner, name)]
    repeated = repeated_keys(dict(tuner_layers(tuner.model)), name, PREFIX)
    tensors = {key: tensor for key, tensor in _under_file_keys(state_dict, everything).items() if key not in repeated}
    loading = Loading(everything, tensors, embeddings_to_load(tuner.model, name, PREFIX))
    check_writable(tuner.model, loading.optional)
    report = loading.report
    missing = set(report.missing_keys)
    for path, piece in pieces.items():
        keys = piece.keys().values()
        if missing.issuperset(keys):
            missing.difference_update(keys)
            layer = beside[path][0]
            beside[path] = layer, _made_beside(tuner, path, layer, name, config, meta=False)
            _check_without_effect(path, layer, beside[path][1].adapters[name])
    report.missing_keys = sorted(missing)
    report.settle("The adapter to swap in", strict=True, optional=False)
    if not report.loaded_keys:
        msg = f"None of the tensors to swap in belongs to a layer of the adapter {name!r}."
        raise CheckpointError(msg)
    loading.write()
    return [(pieces[path], layer, other.adapters[name]) for path, (layer, other) in beside.items()]


def _check_without_effect(path: str, layer: AdaptedLayer, adapter: Adapter) -> None:
    if adapter.has_effect(layer.bare_site):
        why = adapter.unfoldable or "as its config starts it, it changes the weight"
        msg = (
            f"What is to be swapped in has no tensors for {path!r}, where the adapter has to be without effect then, "
            f"and that a {type(adapter).__name__} cannot be seen to be there: {why}. Load it as another adapter."
        )
        raise AdapterStateError(msg)


def _made_beside(
    tuner: BaseTuner, path: str, layer: AdaptedLayer, name: str, config: PeftConfig, *, meta: bool
) -> AdaptedLayer:
    """Return a layer of its own around the same site, with an adapter as the config says."""
    face = tuner._face_for(config)

    def make() -> object:
        return face._create_and_replace(
            config,
            name,
            layer,
            path.rpartition(".")[2],
            tuner.model.get_submodule(path.rpartition(".")[0]),
            path,
            parameter_name=layer.parameter_name,
        )

    made = make_on_meta(make) if meta else make()
    if not isinstance(made, Adapter):
        msg = f"The method of {name!r} puts its layers in by itself, so it cannot be swapped."
        raise AdapterStateError(msg)
    other = AdaptedLayer(layer.bare_site, Owner())
    other.add_adapter(name, made, method_id(str(config.peft_type)))
    other.cast_up(name)  # so that what the file holds is not rounded on the way
    return other


def _under_file_keys(state_dict: Mapping[str, Tensor], pieces: Iterable[Piece]) -> dict[str, Tensor]:
    """Return tensors under the keys of a checkpoint, also those whose keys hold the adapter's name."""
    named = {piece.key(piece.named(local)): piece.key(local) for piece in pieces for local in piece.tensors}
    bare = {key.removeprefix(PREFIX): file for key, file in named.items()}
    return {named.get(key, bare.get(key, key)): tensor for key, tensor in state_dict.items()}
