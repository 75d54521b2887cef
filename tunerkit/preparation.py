"""Preparing a model for training: gradients through checkpointed blocks, and the dtypes of what is frozen."""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tunerkit.errors import AdapterStateError, ConfigError, KeywordWarning
from tunerkit.journal import Journal
from tunerkit.layer import layers_in
from tunerkit.model_config import embedding_layers
from tunerkit.modules import forward_hooks_in, remove_hooks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tunerkit.modules import Hook

_KEPT_AS_STORED = ("aqlm", "eetq", "gptq", "hqq", "torchao")
"""The ways of storing a model's weights (transformers' `quantization_method`) whose other tensors keep their dtype."""

_HALF = (torch.float16, torch.bfloat16)


def prepare_model_for_gradient_checkpointing(model: nn.Module) -> nn.Module:
    """Let gradients flow through a base model whose parameters are frozen, also where its blocks are checkpointed.

    The older, re-entrant kind of checkpointing computes no gradients in a block none of whose inputs needs one. So the
    output of the input embeddings is made to need one: by the model itself if it has `enable_input_require_grads`,
    otherwise by a hook on what its `get_input_embeddings()` returns. Models with neither, and those whose weights
    transformers says are quantised, are left alone.

    Args:
        model: The base model.

    Returns:
        `model`.
    """
    add_input_hooks(model)
    return model


def add_input_hooks(model: nn.Module) -> list[Hook]:
    """Do what `prepare_model_for_gradient_checkpointing` does, and return the hooks that it puts on modules."""
    quantised = any(getattr(model, flag, False) for flag in ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized"))
    if quantised or not any(hasattr(model, call) for call in ("enable_input_require_grads", "get_input_embeddings")):
        return []
    before = forward_hooks_in(model)
    with Journal() as journal:
        journal.note_module(model)
        journal.note(lambda: remove_hooks(forward_hooks_in(model) - before))
        enable_input_gradients(model)
    return [*(forward_hooks_in(model) - before)]


def enable_input_gradients(model: Any) -> None:
    """Make the output of a model's input embeddings need a gradient, if it says which they are."""
    embeddings, _ = embedding_layers(model)
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    elif embeddings is not None:
        embeddings.register_forward_hook(_require_gradient)


def _require_gradient(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
    output.requires_grad_()


def checkpoints_gradients(model: nn.Module) -> bool:
    """Return whether a model's blocks are checkpointed; one that does not say may be, as in PEFT."""
    for flag in ("is_activation_checkpointing", "is_gradient_checkpointing"):  # the first is transformers 5's name
        if hasattr(model, flag):
            return bool(getattr(model, flag))
    return True


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Prepare a transformers model with quantised weights for training adapters on it.

    Freezes everything, makes the tensors float32 that are of half precision (norms, embeddings, the head), and if the
    weights are quantised switches gradient checkpointing on.

    Args:
        model: The base model, before adapters are attached.
        use_gradient_checkpointing: Whether to switch gradient checkpointing on.
        gradient_checkpointing_kwargs: Arguments of `torch.utils.checkpoint.checkpoint`.
        auto_clear_cache: Give the accelerator's memory back that the casts freed.

    Returns:
        `model`.

    Raises:
        ConfigError: The model cannot checkpoint gradients; nothing was changed.

    Warns:
        KeywordWarning: It can, and takes no arguments for it.
    """
    as_stored = getattr(model, "quantization_method", None) in _KEPT_AS_STORED or getattr(model, "hqq_quantized", False)
    quantised = as_stored or getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)
    checkpoint = _checkpointing(model) if quantised and use_gradient_checkpointing else None
    for parameter in model.parameters():
        parameter.requires_grad = False
        if not as_stored and parameter.dtype in _HALF and type(parameter).__name__ != "Params4bit":
            parameter.data = parameter.data.float()
    if auto_clear_cache and not as_stored:
        for backend in (torch.cuda, torch.xpu):
            if backend.is_available():
                backend.empty_cache()
    if checkpoint is not None:
        options = dict(gradient_checkpointing_kwargs or {})
        if options.get("use_reentrant", True):
            enable_input_gradients(model)
        checkpoint(options)
    return model


def _checkpointing(model: nn.Module) -> Callable[[dict[str, Any]], object]:
    """Return what switches a model's gradient checkpointing on, given arguments for it."""
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):  # the first is transformers 5's
        enable = getattr(model, name, None)
        if enable is not None:
            keyword = name.replace("enable", "kwargs")
            takes = keyword in inspect.signature(enable).parameters
            return lambda options: enable(**{keyword: options}) if takes else _enable_plainly(enable, options)
    msg = (
        f"{type(model).__name__} has no gradient checkpointing to switch on (no gradient_checkpointing_enable). Pass "
        "use_gradient_checkpointing=False."
    )
    raise ConfigError(msg)


def _enable_plainly(enable: Callable[[], object], options: dict[str, Any]) -> None:
    if options:
        msg = "gradient_checkpointing_kwargs has no effect: the model's gradient_checkpointing_enable does not take it."
        warnings.warn(KeywordWarning(msg), stacklevel=4)
    enable()


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Make what is frozen of a model half precision, and what trains float32, as mixed-precision training wants it.

    Args:
        model: The model with its adapters.
        dtype: The dtype of frozen tensors, `torch.float16` or `torch.bfloat16`. Tensors of integers stay as they are.

    Raises:
        ConfigError: `dtype` is no dtype of floating-point numbers.
        AdapterStateError: Adapters are merged.
    """
    if not getattr(dtype, "is_floating_point", False):
        msg = f"dtype must be one of floating-point numbers, such as torch.bfloat16; it is {dtype!r}."
        raise ConfigError(msg)
    if any(layer.merged for layer in layers_in(model)):
        msg = "Adapters are merged, and the originals that are kept would not be cast. Call unmerge_adapter() first."
        raise AdapterStateError(msg)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
