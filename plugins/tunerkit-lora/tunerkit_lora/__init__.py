"""LoRA for tunerkit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunerkit import BaseTuner, Method, hookimpl
from tunerkit.defaults import find_site
from tunerkit_lora.adapter import LoraAdapter
from tunerkit_lora.anchored import AnchoredLora
from tunerkit_lora.base import LowRankAdapter
from tunerkit_lora.config import LoraConfig, LoraRuntimeConfig
from tunerkit_lora.convolution import LoraConvolution
from tunerkit_lora.dora import AnchoredDora, DoraConvolution, DoraEmbedding, DoraLinear
from tunerkit_lora.embedding import LoraEmbedding
from tunerkit_lora.inits.eva import get_eva_state_dict, initialize_lora_eva_weights
from tunerkit_lora.layers import Conv1d, Conv2d, Conv3d, Embedding, Linear, LoraLayer
from tunerkit_lora.scale import rescale_adapter_scale
from tunerkit_lora.subconfigs import EvaConfig, LoftQConfig
from tunerkit_lora.targets import DEFAULT_TARGETS

if TYPE_CHECKING:
    from torch import nn

    from tunerkit.adapter import Adapter

__all__ = [
    "AnchoredDora",
    "AnchoredLora",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "DoraConvolution",
    "DoraEmbedding",
    "DoraLinear",
    "Embedding",
    "EvaConfig",
    "Linear",
    "LoftQConfig",
    "LoraAdapter",
    "LoraConfig",
    "LoraConvolution",
    "LoraEmbedding",
    "LoraLayer",
    "LoraModel",
    "LoraRuntimeConfig",
    "LowRankAdapter",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "method",
    "rescale_adapter_scale",
]


class LoraModel(BaseTuner, method="lora"):
    """A tuner is one exactly while it holds a LoRA adapter."""

    prefix = "lora_"
    tuner_layer_cls = LoraLayer
    target_module_mapping = DEFAULT_TARGETS


_PLAIN: tuple[type[LowRankAdapter], ...] = (LoraAdapter, LoraEmbedding, LoraConvolution)
_DORA: tuple[type[LowRankAdapter], ...] = (DoraLinear, DoraEmbedding, DoraConvolution)

method = Method(config=LoraConfig, adapter=(*_PLAIN, AnchoredLora, *_DORA, AnchoredDora), tuner=LoraModel)


@hookimpl
def _create_and_replace(
    peft_config: LoraConfig, target: nn.Module, current_key: str, parameter_name: str | None
) -> Adapter:
    """Make the adapter for the kind of layer and what the config asks for."""
    site = find_site(method, peft_config, target, current_key, parameter_name)
    return _adapter_class(site.kind, peft_config)(site, peft_config)


def _adapter_class(kind: str, config: LoraConfig) -> type[LowRankAdapter]:
    if config.is_anchored and kind == "linear":
        return AnchoredDora if config.use_dora else AnchoredLora
    return next(adapter for adapter in (_DORA if config.use_dora else _PLAIN) if kind in adapter.kinds)
