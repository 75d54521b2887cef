"""LoRA for tunerkit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunerkit import Method, hookimpl
from tunerkit.defaults import find_site
from tunerkit.sites import OutputProjectionSite
from tunerkit_lora.adapter import LoraAdapter
from tunerkit_lora.attention import LoraAttention, LoraOutputProjection
from tunerkit_lora.base import LowRankAdapter
from tunerkit_lora.config import LoraConfig, LoraRuntimeConfig
from tunerkit_lora.convolution import LoraConvolution
from tunerkit_lora.embedding import LoraEmbedding
from tunerkit_lora.experts import LoraExperts
from tunerkit_lora.layers import (
    Conv1d,
    Conv2d,
    Conv3d,
    Embedding,
    Linear,
    LoraLayer,
    MultiheadAttention,
    ParamWrapper,
)
from tunerkit_lora.model import LoraModel
from tunerkit_lora.scale import rescale_adapter_scale

if TYPE_CHECKING:
    from torch import nn

    from tunerkit.adapter import Adapter

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "LoraAdapter",
    "LoraAttention",
    "LoraConfig",
    "LoraConvolution",
    "LoraEmbedding",
    "LoraExperts",
    "LoraLayer",
    "LoraModel",
    "LoraOutputProjection",
    "LoraRuntimeConfig",
    "LowRankAdapter",
    "MultiheadAttention",
    "ParamWrapper",
    "method",
    "rescale_adapter_scale",
]


method = Method(
    config=LoraConfig,
    adapter=(LoraAdapter, LoraEmbedding, LoraConvolution, LoraAttention, LoraExperts),
    tuner=LoraModel,
)


@hookimpl
def _create_and_replace(
    peft_config: LoraConfig, target: nn.Module, current_key: str, parameter_name: str | None
) -> Adapter:
    """Make the adapter for the kind of layer."""
    site = find_site(method, peft_config, target, current_key, parameter_name)
    kind = LoraOutputProjection if isinstance(site, OutputProjectionSite) else method.adapter_for(site.kind)
    return kind(site, peft_config)
