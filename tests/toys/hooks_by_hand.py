"""A plugin that writes all three hooks itself and replaces the modules itself; it uses none of the core's defaults."""

from __future__ import annotations

from dataclasses import dataclass

from toys.config import ToyConfig
from toys.layer_by_hand import GatedLayer
from tunerkit import Method, hookimpl


@dataclass
class Config(ToyConfig):
    peft_type: str | None = "TOY_HOOKS_BY_HAND"


method = Method(config=Config)


@hookimpl
def _prepare_adapter_config(peft_config, model_config):
    if peft_config.target_modules is None:
        raise ValueError(f"say what to target in a model of type {model_config['model_type']}")
    return peft_config


@hookimpl
def _check_target_module_exists(peft_config, key):
    return key.rpartition(".")[2] in peft_config.target_modules


@hookimpl
def _create_and_replace(peft_config, adapter_name, target, target_name, parent):
    if isinstance(target, GatedLayer):
        target.update_layer(adapter_name, peft_config.rank)
        return target
    layer = GatedLayer(target)
    layer.update_layer(adapter_name, peft_config.rank)
    setattr(parent, target_name, layer)
    return layer
