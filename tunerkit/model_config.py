"""Reading a base model's own config."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

CUSTOM = {"model_type": "custom"}
"""The config of a model that has none."""


def config_of(model: nn.Module) -> Any:
    """Return a model's own config as it is there, or a dict that says it has none."""
    config = getattr(model, "config", None)
    return dict(CUSTOM) if config is None else config


def config_dict(model: nn.Module, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a model's own config as a dict.

    Args:
        model: The model.
        default: What a model without a config has; `{"model_type": "custom"}` if not given.
    """
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        return dict(CUSTOM, **config.to_dict())
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return dict(CUSTOM, **dataclasses.asdict(config))
    if isinstance(config, dict):
        return dict(CUSTOM, **config)
    return dict(CUSTOM if default is None else default)


def embedding_layers(model: Any) -> tuple[Any, Any]:
    """Return what a model says its input and its output embeddings are, each None if it does not say or has none."""
    return _asked(model, "get_input_embeddings"), _asked(model, "get_output_embeddings")


def _asked(model: Any, call: str) -> Any:
    getter = getattr(model, call, None)
    if not callable(getter):
        return None
    try:
        return getter()
    except NotImplementedError:  # Models of images have the call and no answer.
        return None
