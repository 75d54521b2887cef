"""Adapters on any `nn.Module`, without a wrapper around it: PEFT's functions."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from tunerkit.biases import trained_biases
from tunerkit.checkpoint.base_model import repeated_keys
from tunerkit.checkpoint.files import WEIGHTS_NAME, read_tensors
from tunerkit.checkpoint.hub import fetched
from tunerkit.checkpoint.state import Loading, Piece, collect, pieces
from tunerkit.config import check_config
from tunerkit.embeddings import check_writable, embeddings_to_load, embeddings_to_save
from tunerkit.errors import AdapterStateError, TargetError, UnknownAdapterError
from tunerkit.keywords import check_loading, of_download
from tunerkit.layer import tuner_layers
from tunerkit.naming import PREFIX, listing
from tunerkit.plugins import get_method
from tunerkit.tuner import BaseTuner, find_tuner, tuner_of

if TYPE_CHECKING:
    import contextlib
    import os
    from collections.abc import Mapping, Sequence

    import torch
    from torch import Tensor, nn

    from tunerkit.checkpoint.report import LoadReport
    from tunerkit.config import PeftConfig
    from tunerkit.layer import BaseTunerLayer


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, Tensor] | None = None,
) -> nn.Module:
    """Put an adapter into a model and return the model itself, without anything around it.

    Args:
        peft_config: The adapter's config.
        model: The model; its layers are replaced in place.
        adapter_name: The adapter's name.
        low_cpu_mem_usage: Make the adapter's tensors on the meta device, to be filled by a checkpoint.
        state_dict: A checkpoint's tensors, to go where they say rather than where the config says.

    Returns:
        `model`.

    Raises:
        TunerkitError: The adapter cannot be put in; the model is as it was.
    """
    method = get_method(str(check_config(peft_config).peft_type))
    if find_tuner(model) is not None:
        msg = (
            f"The model is a {type(model).__name__} already, which keeps account of its adapters. Call "
            f"add_adapter({adapter_name!r}, config) on it."
        )
        raise AdapterStateError(msg)
    if trained_biases(peft_config) is not None:
        msg = (
            f"bias={peft_config.bias!r} trains the model's own biases, whose original values need a home "  # type: ignore[attr-defined]
            "beside the model. Use get_peft_model(model, config), or leave bias at 'none'."
        )
        raise TargetError(msg)
    if method.method.part is not None:
        msg = (
            f"{method.id!r} shares tensors between all its layers, which need a home beside the model. "
            "Use get_peft_model(model, config)."
        )
        raise TargetError(msg)
    kind = method.method.tuner or BaseTuner
    kind(model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)
    return model


def use_adapter(model: nn.Module, adapter_name: str | Sequence[str]) -> contextlib.AbstractContextManager[None]:
    """Within the block, calls of an adapted model in this thread use these adapters; nothing on the model changes.

    Args:
        model: A `PeftModel`, or a model into which adapters were injected.
        adapter_name: One name or several, which stand on one another in this order; none for the base model.

    Raises:
        UnknownAdapterError: There is no such adapter.
        RouteError: Adapters are merged.
    """
    return tuner_of(model, adapted=True).use_adapter(adapter_name)


def use_rows(
    model: nn.Module, adapter_names: Sequence[str], repeats: int = 1
) -> contextlib.AbstractContextManager[None]:
    """Within the block, each row of the batches that an adapted model gets in this thread has an adapter of its own.

    Args:
        model: A `PeftModel`, or a model into which adapters were injected.
        adapter_names: The adapter of each row; `"__base__"` is the base model.
        repeats: How often `generate` repeats each row; see `BaseTuner.use_rows`.

    Raises:
        UnknownAdapterError: There is no such adapter.
        RouteError: Rows of this model cannot have adapters of their own.
    """
    return tuner_of(model, adapted=True).use_rows(adapter_names, repeats)


def set_adapter(model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False) -> None:
    """Make adapters of a model active and trainable, and freeze the others; see `BaseTuner.set_adapter`.

    Args:
        model: A `PeftModel`, or a model into which adapters were injected.
        adapter_name: One name or several, which stand on one another in this order.
        inference_mode: Keep the active ones frozen too.

    Raises:
        UnknownAdapterError: There is no such adapter.
        AdapterStateError: They cannot be active together.
    """
    tuner_of(model, adapted=True).set_adapter(adapter_name, inference_mode=inference_mode)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Say whether adapters of a model train, whether they are active or not; unknown names are passed over.

    Args:
        model: A `PeftModel`, or a model into which adapters were injected.
        adapter_names: One name or several.
        requires_grad: Whether they train.
    """
    tuner_of(model, adapted=True).set_requires_grad(adapter_names, requires_grad)


def delete_adapter(model: nn.Module, adapter_name: str, prefix: str = "") -> list[str] | None:
    """Take an adapter out of a model, its config too; layers that hold no other become the base layers they were.

    Args:
        model: A `PeftModel`, or a model into which adapters were injected.
        adapter_name: The adapter's name.
        prefix: Accepted for PEFT's sake; layers are found by what they hold, whatever they are called.

    Returns:
        The names of the adapters that are active now, or None if there are none.

    Raises:
        UnknownAdapterError: There is no such adapter.
        AdapterStateError: It is merged.
    """
    del prefix
    tuner = tuner_of(model, adapted=True)
    tuner.delete_adapter(adapter_name)
    return tuner.active_adapters or None


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Make an adapter's tensors float32 where they are of lower precision, so that training is stable.

    Args:
        model: A `PeftModel`, or a model into which adapters were injected.
        adapter_name: The adapter's name.
        autocast_adapter_dtype: Whether to do it at all.
    """
    tuner_of(model)._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, Tensor]:
    """Return an adapter's tensors under the keys that a checkpoint has.

    Args:
        model: A `PeftModel`, or a model into which adapters were injected.
        state_dict: The model's state, gathered elsewhere, to take the values from.
        adapter_name: The adapter.
        unwrap_compiled: Accepted for PEFT's sake; keys are those of a model that is not compiled.
        save_embedding_layers: Whether the base model's input and output embeddings are saved beside the adapter. "auto"
            does that, with a `SaveWarning`, if `target_modules` names `embed_tokens` or `lm_head`, or if the model's
            vocabulary is not of the size that the `config.json` in the folder says from which the model came.

    Raises:
        UnknownAdapterError: There is no such adapter.
        CheckpointError: The given state lacks a tensor of the adapter.
    """
    del unwrap_compiled
    found = pieces_of(model, adapter_name)
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if config is not None:
        base, prefix = _base(model)
        found += embeddings_to_save(base, config, adapter_name, prefix, save_embedding_layers)
    names = {id(module): name for name, module in model.named_modules()} if state_dict is not None else {}

    def path_of(piece: Piece) -> str:
        name = names[id(piece.holder)]
        return f"{name}." if name else ""

    return collect(found, state_dict, path_of)


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadReport:
    """Put a checkpoint's tensors into an adapter of a model, and report which found their place.

    Args:
        model: A `PeftModel`, or a model into which adapters were injected.
        peft_model_state_dict: The checkpoint's tensors; not changed.
        adapter_name: The adapter.
        ignore_mismatched_sizes: Leave out tensors whose shapes differ, and report them.
        low_cpu_mem_usage: Accepted for PEFT's sake; tensors on the meta device are always replaced.

    Returns:
        The report, with PEFT's `missing_keys` and `unexpected_keys`.

    Raises:
        UnknownAdapterError: There is no such adapter.
        AdapterStateError: It is merged.
        CheckpointError: Shapes differ; nothing was changed.
    """
    del low_cpu_mem_usage
    loading = loading_for(model, adapter_name, peft_model_state_dict)
    if not ignore_mismatched_sizes:
        loading.report.refuse_mismatched("The state dict")
    loading.write()
    return loading.report


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint.

    Args:
        model_id: The checkpoint's folder, or its id on the hub.
        device: Where the tensors are to be; the CPU if not given.
        key_mapping: Patterns and what replaces them in the keys below the base model; the first that matches counts.
        kwargs: What a download takes, and `subfolder`; see `tunerkit.keywords`.

    Raises:
        KeywordError: A keyword argument is unknown.
        CheckpointError: The file is not there or cannot be read.
    """
    subfolder = kwargs.pop("subfolder", None)
    check_loading("load_peft_weights", kwargs, ("device", "key_mapping", "subfolder"))
    folder = fetched(model_id, (WEIGHTS_NAME,), subfolder, of_download(kwargs))
    tensors = read_tensors(folder, "cpu" if device is None else device)
    return renamed(tensors, key_mapping)


def renamed(tensors: Mapping[str, Tensor], key_mapping: Mapping[str, str] | None) -> dict[str, Tensor]:
    """Return tensors under other keys: the first pattern that matches changes a key's part below the base model."""
    return {_renamed(key, key_mapping) if key_mapping else key: tensor for key, tensor in tensors.items()}


def _renamed(key: str, mapping: Mapping[str, str]) -> str:
    prefix = PREFIX if key.startswith(PREFIX) else ""
    below = key.removeprefix(prefix)
    for pattern, replacement in mapping.items():
        changed, count = re.subn(pattern, replacement, below)
        if count:
            return f"{prefix}{changed}"
    return key


def _base(model: nn.Module) -> tuple[nn.Module, str]:
    """Return the base model, and what stands before its modules' paths in a checkpoint's keys."""
    tuner = find_tuner(model)
    return (model, "") if tuner is None else (tuner.model, PREFIX)


def pieces_of(model: nn.Module, name: str, layers: Mapping[str, BaseTunerLayer] | None = None) -> list[Piece]:
    """Return what a model holds of an adapter.

    Args:
        model: A `PeftModel`, or a model into which adapters were injected.
        name: The adapter.
        layers: The layers of the base model by path, if they are known.

    Raises:
        UnknownAdapterError: There is no such adapter.
    """
    tuner = find_tuner(model)
    if tuner is not None:
        tuner.check_known([name])
    base, prefix = _base(model)
    layers = dict(tuner_layers(base)) if layers is None else layers
    found = pieces(layers, name, prefix, {} if tuner is None else tuner.parts, tuner)
    if tuner is not None and tuner.biases.name == name:
        found += tuner.biases.pieces()
    if not found:
        names = {known for layer in layers.values() for known in layer.available_adapters}
        msg = f"The model has no adapter {name!r}; it has {listing(sorted(names))}."
        raise UnknownAdapterError(msg)
    return found


def loading_for(
    model: nn.Module, name: str, tensors: Mapping[str, Any], layers: Mapping[str, BaseTunerLayer] | None = None
) -> Loading:
    """Match a checkpoint's tensors with an adapter of a model; nothing is written yet.

    Args:
        model: A `PeftModel`, or a model into which adapters were injected.
        name: The adapter.
        tensors: The checkpoint's tensors.
        layers: The layers of the base model by path, if they are known.

    Raises:
        UnknownAdapterError: There is no such adapter.
        AdapterStateError: It is merged, so that new values would have no effect.
    """
    base, prefix = _base(model)
    layers = dict(tuner_layers(base)) if layers is None else layers
    if any(name in layer.merged_adapters for layer in layers.values()):
        msg = f"The adapter {name!r} is merged, so new tensors would have no effect. Call unmerge_adapter() first."
        raise AdapterStateError(msg)
    tuner = find_tuner(model)
    if tuner is not None and tuner.biases.name == name:
        tuner.biases.check_writable(list(layers.values()))
    repeated = repeated_keys(layers, name, prefix)
    if repeated:
        tensors = {key: value for key, value in tensors.items() if key not in repeated}
    loading = Loading(pieces_of(model, name, layers), tensors, embeddings_to_load(base, name, prefix))
    check_writable(base, loading.optional)
    return loading
