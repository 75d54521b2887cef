"""LoftQ on a model that is quantised already: factors from what its weights lack of those in the model's files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tunerkit import PeftModel
from tunerkit.adapted_layer import AdaptedLayer
from tunerkit.checkpoint.folder import check_folder
from tunerkit.errors import AdapterStateError, ArgumentError, CheckpointError
from tunerkit.journal import Journal
from tunerkit.naming import closest, listing
from tunerkit.offline.model_folder import WEIGHTS, files_by_key, open_weights
from tunerkit.offline.tensor_file import FLOATS, TensorFile
from tunerkit.saved import name_or_path
from tunerkit_lora.adapter import LoraAdapter
from tunerkit_lora.anchored import AnchoredLora
from tunerkit_lora.inits.spectral import pissa

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from tunerkit.sites import Site


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: PeftModel,
    model_path: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Callable[[PeftModel, str], bool] | None = None,
) -> None:
    """Let an adapter of a quantised model start from what the quantised weights lack of the original ones.

    On each quantised layer with weight ``Q`` the scaled product ``s B A`` becomes the best approximation of
    ``W - Q``, so that training starts closer to the model before it was quantised (LoftQ, arXiv 2310.08659, with one
    round). What the adapter has learned so far is lost there; other layers stay as they are. The original weights are
    read one by one from the model's safetensors files.

    Args:
        peft_model: The model; any quantised layers that LoRA adapts do.
        model_path: The folder with the model's files as they were before it was quantised, or its one file. If not
            given, the folder that the model was loaded from.
        adapter_name: The adapter.
        callback: Called after each layer with the model and the layer's path in the base model; False takes the
            layer's change back. It may compare the model's output with the original model's.

    Raises:
        ArgumentError: The model is no `PeftModel`, or has no quantised layer with a LoRA adapter of that name.
        UnknownAdapterError: There is no such adapter.
        AdapterStateError: It is merged, or its factors are not free to start anew.
        CheckpointError: The files are not there or broken, or lack a weight, or have it in another form. In any case
            the model is as it was.
    """
    given: object = peft_model
    if not isinstance(given, PeftModel):
        msg = f"peft_model must be a PeftModel; it is a {type(given).__name__}. Call get_peft_model first."
        raise ArgumentError(msg)
    peft_model.base_model.check_known([adapter_name])
    layers = _quantised_layers(peft_model, adapter_name)
    files = _open(peft_model, model_path)
    keys = [_key_of(layer.bare_site, files, peft_model) for layer, _ in layers]
    with Journal() as journal:
        for (layer, adapter), key in zip(layers, keys, strict=True):
            base, before = layer.bare_site, [tensor.clone() for tensor in adapter.parameters()]
            journal.note(_put_back, adapter, before)
            lacking = files[key].read(key).to(base.device, torch.float32) - base.weight.float()
            adapter.restart(base, *pissa(lacking, adapter.r, adapter.scaling))
            if callback is not None and not callback(peft_model, base.name):
                _put_back(adapter, before)


def _put_back(adapter: LoraAdapter, before: list[Tensor]) -> None:
    for tensor, values in zip(adapter.parameters(), before, strict=True):
        tensor.copy_(values)


def _quantised_layers(model: PeftModel, name: str) -> list[tuple[AdaptedLayer, LoraAdapter]]:
    """Return the quantised layers that a LoRA adapter has, with what it is there, which can start anew."""
    found: list[tuple[AdaptedLayer, LoraAdapter]] = []
    for layer in model.base_model.layers():
        if not isinstance(layer, AdaptedLayer) or not layer.site.quantised:
            continue
        adapter = layer.adapters.get(name)
        if not isinstance(adapter, LoraAdapter):
            continue
        layer.check_not_merged(name)
        why = _not_free(adapter)
        if why is not None:
            msg = f"{name!r} cannot start anew on {layer.site.name!r}: {why}."
            raise AdapterStateError(msg)
        found.append((layer, adapter))
    if not found:
        msg = (
            f"{name!r} is no LoRA adapter on a quantised layer of this model, so there is nothing to start from. Load "
            "the base model quantised; one that is not has init_lora_weights='loftq'."
        )
        raise ArgumentError(msg)
    return found


def _not_free(adapter: LoraAdapter) -> str | None:
    if isinstance(adapter, AnchoredLora):
        return "its start is one of the weight's own directions, which is taken off again. Use init_lora_weights=True"
    if adapter.scaling <= 0:
        return f"its scale is {float(adapter.scaling):g}, and it must be above zero. Set another lora_alpha"
    return None


def _open(model: PeftModel, given: str | os.PathLike[str] | None) -> dict[str, TensorFile]:
    """Return the file that holds each of the original weights, by key."""
    path = name_or_path(model.get_base_model()) if given is None else given
    if not path:
        msg = (
            f"The base model, a {type(model.get_base_model()).__name__}, does not say what folder it was loaded from. "
            "Pass model_path, the folder of the model before it was quantised."
        )
        raise ArgumentError(msg)
    file = Path(path)
    if file.is_file():
        return files_by_key([TensorFile.open(file)])
    # As in PEFT also the name that the file of a model in several files would have.
    folder = check_folder(file.parent if file.name == WEIGHTS else file)
    return files_by_key(open_weights(folder)[1])


def _key_of(base: Site, files: Mapping[str, TensorFile], model: PeftModel) -> str:
    """Return the key of a layer's original weight.

    As in transformers the files may be those of the model with its head or without it, whichever this one is.
    """
    key = f"{base.name}.{base.weight_name}"
    prefix = getattr(model.get_base_model(), "base_model_prefix", "")
    found = next((each for each in (key, key.removeprefix(f"{prefix}."), f"{prefix}.{key}") if each in files), None)
    if found is None:
        near = closest(key, files)
        hint = f" Closest: {listing(near)}." if near else ""
        msg = f"The model's files lack the weight of {base.name!r}, {key!r}; they hold {len(files)} tensors.{hint}"
        raise CheckpointError(msg)
    entry = files[found].entries[found]
    shape = (base.out_features, base.in_features)
    if entry.dtype not in FLOATS or entry.shape != shape:
        msg = (
            f"{found!r} is {entry.shape} of {entry.dtype} in '{files[found].path}', and the weight of {base.name!r} is "
            f"{shape} of floating point numbers. Pass the files of this model as it was before it was quantised."
        )
        raise CheckpointError(msg)
    return found
