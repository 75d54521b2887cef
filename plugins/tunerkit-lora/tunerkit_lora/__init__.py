"""LoRA for tunerkit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunerkit import Method, hookimpl
from tunerkit.defaults import find_site
from tunerkit.errors import UnsupportedSiteError
from tunerkit.sites import OutputProjectionSite
from tunerkit_lora.adapter import LoraAdapter
from tunerkit_lora.anchored import AnchoredLora
from tunerkit_lora.attention import LoraAttention, LoraOutputProjection
from tunerkit_lora.base import LowRankAdapter
from tunerkit_lora.config import LoraConfig, LoraRuntimeConfig
from tunerkit_lora.convolution import LoraConvolution
from tunerkit_lora.dora import AnchoredDora, DoraConvolution, DoraEmbedding, DoraLinear, LoftqDora
from tunerkit_lora.embedding import LoraEmbedding
from tunerkit_lora.experts import LoraExperts
from tunerkit_lora.inits.eva import get_eva_state_dict, initialize_lora_eva_weights
from tunerkit_lora.inits.replacing import replace_lora_weights_loftq
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
from tunerkit_lora.loftq import LoftqLora
from tunerkit_lora.model import LoraModel
from tunerkit_lora.scale import rescale_adapter_scale
from tunerkit_lora.subconfigs import EvaConfig, LoftQConfig

if TYPE_CHECKING:
    from torch import nn

    from tunerkit.adapter import Adapter
    from tunerkit.sites import Site

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
    "LoftqDora",
    "LoftqLora",
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
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "method",
    "replace_lora_weights_loftq",
    "rescale_adapter_scale",
]


_PLAIN: tuple[type[LowRankAdapter], ...] = (LoraAdapter, LoraEmbedding, LoraConvolution, LoraAttention, LoraExperts)
_DORA: tuple[type[LowRankAdapter], ...] = (DoraLinear, DoraEmbedding, DoraConvolution)
_BY_KIND = {kind: adapter for adapter in _PLAIN for kind in adapter.kinds}
_BY_KIND_WITH_DORA = {**_BY_KIND, **{kind: adapter for adapter in _DORA for kind in adapter.kinds}}

method = Method(
    config=LoraConfig,
    adapter=(*_PLAIN, AnchoredLora, LoftqLora, *_DORA, AnchoredDora, LoftqDora),
    tuner=LoraModel,
    tags=("lora",),
)


@hookimpl
def _create_and_replace(
    peft_config: LoraConfig, target: nn.Module, current_key: str, parameter_name: str | None
) -> Adapter:
    """Make the adapter for the kind of layer and what the config asks for."""
    site = find_site(method, peft_config, target, current_key, parameter_name)
    return _adapter_class(site, peft_config)(site, peft_config)


def _adapter_class(site: Site, config: LoraConfig) -> type[LowRankAdapter]:
    if isinstance(site, OutputProjectionSite) or site.kind == "attention":
        if config.use_dora or config.is_anchored or config.replaces_base:
            asked = "use_dora=True" if config.use_dora else f"init_lora_weights={config.init_lora_weights!r}"
            msg = (
                f"The attention layer {site.name!r} cannot be adapted with {asked}. Leave it out, or do not target it."
            )
            raise UnsupportedSiteError(msg)
        return LoraAttention if site.kind == "attention" else LoraOutputProjection
    if site.kind == "linear" and config.is_anchored:
        return AnchoredDora if config.use_dora else AnchoredLora
    if site.kind == "linear" and config.replaces_base:
        return LoftqDora if config.use_dora else LoftqLora
    return (_BY_KIND_WITH_DORA if config.use_dora else _BY_KIND)[site.kind]
