"""Swapping the numbers of an adapter for those of another one in place, for every method.

The adapter that comes in is made beside the model, as its config says, and each adapter of the model then takes over
the numbers of its counterpart (`Adapter.take`). So shapes, settings and the form in a file are the method's business,
as they are when it is attached, and a compiled model sees nothing but other numbers in the same tensors.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Literal

import torch

from tunerkit._typecheck import fits
from tunerkit.adapted_layer import AdaptedLayer
from tunerkit.adapter import Adapter
from tunerkit.biases import trained_biases
from tunerkit.checkpoint.state import PREFIX, Loading, Piece, piece_of
from tunerkit.config import check_config
from tunerkit.embeddings import embeddings_to_load
from tunerkit.errors import AdapterStateError, AdapterWarning, CheckpointError, ConfigError, UnknownAdapterError
from tunerkit.journal import Journal
from tunerkit.layer import tuner_layers
from tunerkit.naming import listing, method_id
from tunerkit.replication import wanted_ranges
from tunerkit.route import Owner
from tunerkit.saved import SavedAdapter
from tunerkit.sites import make_on_meta
from tunerkit.tuner import BaseTuner, find_tuner

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn

    from tunerkit.config import PeftConfig


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | torch.device | None = None,
    *,
    subfolder: str | None = None,
    key_mapping: dict[str, str] | None = None,
) -> None:
    """Put the numbers of a saved adapter into an adapter of a model, in place; a compiled model need not recompile.

    To swap adapters of other ranks or scalings into a compiled model, call `prepare_model_for_compiled_hotswap` before
    compiling it.

    Args:
        model: A `PeftModel`, or a model into which adapters were injected; it may be compiled.
        model_name_or_path: The checkpoint's folder.
        adapter_name: The adapter whose numbers are replaced; it keeps its name, and whether it is active and trains.
        torch_device: Where the checkpoint's tensors are read to; the CPU if not given.
        subfolder: A folder below, for adapters that were saved beside others.
        key_mapping: See `load_peft_weights`.

    Raises:
        CheckpointError: The checkpoint is not there, or does not fit; the model is as it was.
        AdapterStateError: The adapter is merged, or the method cannot be swapped; the model is as it was.
    """
    saved = SavedAdapter(
        model_name_or_path, subfolder, None, is_trainable=False, device=torch_device, key_mapping=key_mapping
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

    Layers of the adapter for which there are no tensors get an adapter as it is at its start, without effect.

    Args:
        model: A `PeftModel`, or a model into which adapters were injected; it may be compiled.
        state_dict: The tensors, under keys as in a checkpoint, or with the adapter's name in them; not changed.
        adapter_name: The adapter whose numbers are replaced.
        config: The config of the adapter that comes in.
        parameter_prefix: Accepted for PEFT's sake; which tensors belong to the adapter follows from its layers.

    Raises:
        CheckpointError: The tensors do not fit; the model is as it was.
        AdapterStateError: The adapter is merged, or the method cannot be swapped; the model is as it was.
    """
    del parameter_prefix
    tuner = _tuner_of(model)
    layers = _layers_to_swap(tuner, adapter_name, check_config(config))
    with Journal() as journal:
        journal.note_module(tuner)
        journal.note(tuner.peft_config.update, dict(tuner.peft_config))
        for layer, other in _filled(tuner, layers, adapter_name, config, state_dict):
            adapter = layer.adapters[adapter_name]
            for module in adapter.modules():
                journal.note_module(module)
            for tensor in adapter.state_dict(keep_vars=True).values():
                journal.note_values(tensor)
            adapter.take(other)
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
    if "_orig_mod" in model._modules or model.__dict__.get("_compiled_call_impl") is not None:
        msg = "The model is compiled already, so preparing it now makes it compile again. Prepare it first."
        if check_compiled == "error":
            raise AdapterStateError(msg)
        if check_compiled == "warn":
            warnings.warn(AdapterWarning(msg), stacklevel=2)
    layers = [layer for layer in _tuner_of(model).layers() if isinstance(layer, AdaptedLayer)]
    if not layers:
        msg = "The model has no adapters to prepare. Load the first adapter, then prepare the model, then compile it."
        raise UnknownAdapterError(msg)
    with Journal() as journal:
        for layer in layers:
            for adapter in layer.adapters.values():
                for module in adapter.modules():
                    journal.note_module(module)
                adapter.make_room(target_rank, layer.site.device)


def _tuner_of(model: nn.Module) -> BaseTuner:
    inner = model._modules.get("_orig_mod")
    whole = model if inner is None else inner
    return find_tuner(whole) or BaseTuner.around(whole)


def _layers_to_swap(tuner: BaseTuner, name: str, config: PeftConfig) -> list[tuple[str, AdaptedLayer]]:
    """Return the layers that hold the adapter, by path, if all of it can be swapped for one with this config."""
    found = [(path, layer) for path, layer in tuner_layers(tuner.model) if name in layer.available_adapters]
    if not found:
        known = sorted({known for layer in tuner.layers() for known in layer.available_adapters})
        msg = f"The model has no adapter {name!r} to swap; it has {listing(known)}. Load one with load_adapter()."
        raise UnknownAdapterError(msg)
    for whose, settings in (("The adapter to swap in", config), (f"The adapter {name!r}", tuner.peft_config.get(name))):
        whole = getattr(settings, "modules_to_save", None)
        biases = None if settings is None else trained_biases(settings)
        if whole or biases:
            setting = f"modules_to_save={whole!r}" if whole else f"bias={biases!r}"
            msg = (
                f"{whose} has {setting}, and what is trained of the base model itself cannot be swapped. Delete the "
                "adapter and load the other one."
            )
            raise AdapterStateError(msg)
    if name in tuner.peft_config and wanted_ranges(config) != wanted_ranges(tuner.peft_config[name]):
        msg = (
            f"The adapter to swap in has layer_replication={[*wanted_ranges(config)]}, and the adapter {name!r} has "
            f"layer_replication={[*wanted_ranges(tuner.peft_config[name])]}: they are for different layers. Delete the "
            "adapter and load the other one."
        )
        raise AdapterStateError(msg)
    layers: list[tuple[str, AdaptedLayer]] = []
    for path, layer in found:
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
    return layers


def _filled(
    tuner: BaseTuner,
    layers: Iterable[tuple[str, AdaptedLayer]],
    name: str,
    config: PeftConfig,
    state_dict: Mapping[str, Tensor],
) -> list[tuple[AdaptedLayer, Adapter]]:
    """Return each layer with the adapter that is to be swapped in there, made beside the model and filled."""
    beside = {path: (layer, _made_beside(tuner, path, layer, name, config, meta=True)) for path, layer in layers}
    pieces = {path: piece_of(path, other, name, PREFIX) for path, (_, other) in beside.items()}
    tensors = _without_embeddings(tuner, name, _under_file_keys(state_dict, pieces.values()))
    loading = Loading(list(pieces.values()), tensors)
    report = loading.report
    missing = set(report.missing_keys)
    for path, piece in pieces.items():
        keys = [piece.key(local) for local in piece.in_file(piece.tensors)]
        if missing.issuperset(keys):
            missing.difference_update(keys)
            beside[path] = beside[path][0], _made_beside(tuner, path, beside[path][0], name, config, meta=False)
    report.missing_keys = sorted(missing)
    report.settle("The adapter to swap in", strict=True, optional=False)
    if not report.loaded_keys:
        msg = f"None of the tensors to swap in belongs to a layer of the adapter {name!r}."
        raise CheckpointError(msg)
    loading.write()
    return [(layer, other.adapters[name]) for layer, other in beside.values()]


def _without_embeddings(tuner: BaseTuner, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint's tensors without the embeddings that were saved beside the adapter, which stay as they are.

    Raises:
        CheckpointError: They are not those of the base model.
    """
    for piece in embeddings_to_load(tuner.model, name, PREFIX):
        for local, own in piece.tensors.items():
            theirs = tensors.pop(piece.key(local), own)
            if theirs.shape != own.shape or not torch.equal(theirs.to(own), own):
                msg = (
                    f"The adapter to swap in holds other embeddings than the base model has, {piece.key(local)!r}, and "
                    "these cannot be swapped. Load it with load_adapter(), or save it with save_embedding_layers=False."
                )
                raise CheckpointError(msg)
    return tensors


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
