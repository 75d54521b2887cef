"""LoRA for tunerkit."""

from __future__ import annotations

from tunerkit import BaseTuner, BaseTunerLayer, Method
from tunerkit_lora.adapter import LoraAdapter
from tunerkit_lora.config import LoraConfig, LoraRuntimeConfig
from tunerkit_lora.targets import DEFAULT_TARGETS

__all__ = ["LoraAdapter", "LoraConfig", "LoraLayer", "LoraModel", "LoraRuntimeConfig", "method"]


class LoraLayer(BaseTunerLayer, method="lora"):
    """A layer is one exactly while it holds a LoRA adapter."""


class LoraModel(BaseTuner, method="lora"):
    """A tuner is one exactly while it holds a LoRA adapter."""

    prefix = "lora_"
    tuner_layer_cls = LoraLayer
    target_module_mapping = DEFAULT_TARGETS


method = Method(config=LoraConfig, adapter=LoraAdapter, tuner=LoraModel, tags=("lora",))
