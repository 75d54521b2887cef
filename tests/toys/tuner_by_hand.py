"""A subclass of `BaseTuner` that overrides the three methods, as PEFT's documentation teaches."""

from __future__ import annotations

from dataclasses import dataclass

from toys.config import ToyConfig
from toys.layer_by_hand import GatedLayer
from tunerkit import BaseTuner, BaseTunerLayer, Method


@dataclass
class Config(ToyConfig):
    peft_type: str | None = "TOY_TUNER_BY_HAND"


class HandLayer(GatedLayer, BaseTunerLayer, method="toy-tuner-by-hand"):
    """So that `isinstance` finds the layers of the method."""


class HandModel(BaseTuner, method="toy-tuner-by-hand"):
    prefix = "toy_"
    tuner_layer_cls = HandLayer

    def _prepare_adapter_config(self, peft_config, model_config):
        if peft_config.target_modules is None:
            peft_config.target_modules = set(self.target_module_mapping[model_config["model_type"]])
        return peft_config

    def _check_target_module_exists(self, peft_config, key):
        return any(key.endswith(target) for target in peft_config.target_modules)

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ):
        if isinstance(target, GatedLayer):
            target.update_layer(adapter_name, peft_config.rank)
            return
        layer = HandLayer(target)
        layer.update_layer(adapter_name, peft_config.rank)
        setattr(parent, target_name, layer)


method = Method(config=Config, tuner=HandModel)
