"""IA3 for tunerkit."""

from __future__ import annotations

from typing import Any

from tunerkit import Method, hookimpl
from tunerkit.defaults import fill_target_modules
from tunerkit_ia3.adapter import IA3Adapter, IA3Embedding
from tunerkit_ia3.config import IA3Config, among
from tunerkit_ia3.model import IA3Layer, IA3Model
from tunerkit_ia3.targets import DEFAULT_FEEDFORWARD, DEFAULT_TARGETS

__all__ = ["DEFAULT_FEEDFORWARD", "IA3Adapter", "IA3Config", "IA3Embedding", "IA3Layer", "IA3Model", "method"]


method = Method(config=IA3Config, adapter=(IA3Adapter, IA3Embedding), tuner=IA3Model)


@hookimpl
def _prepare_adapter_config(peft_config: IA3Config, model_config: dict[str, Any]) -> IA3Config:
    """Fill in the targets and which of them are feed-forward layers, by the model's type."""
    config = fill_target_modules(peft_config, model_config, DEFAULT_TARGETS, "ia3")
    if config.feedforward_modules is None:
        entries = DEFAULT_FEEDFORWARD.get(model_config["model_type"], ())
        targets = config.target_modules
        config.feedforward_modules = among(targets, entries) if isinstance(targets, set) else set(entries)
    return config
