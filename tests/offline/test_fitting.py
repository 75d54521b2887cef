from __future__ import annotations

import pytest
import torch
from torch import nn

from tunerkit import get_peft_model, get_peft_model_state_dict
from tunerkit.offline.fitting import match
from tunerkit.offline.keys import owners_of
from tunerkit.plugins import get_method
from tunerkit_lora import LoraConfig


class Block(nn.Module):
    """Holds parameters, and a layer that is called as what layers with adapters hold."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 2))
        self.down = nn.Parameter(torch.randn(2, 2))
        self.base_layer = nn.Linear(2, 2)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()
        self.other = Block()
        self.my_orig_mod = nn.Sequential(nn.Linear(2, 2))


CONFIGS = {
    "modules": {"target_modules": r".*\.base_layer|my_orig_mod\.0"},
    "parameters": {"target_modules": [], "target_parameters": ["block.up", "block.down", "other.up"]},
}


@pytest.mark.parametrize(
    ("kind", "paths"),
    [("modules", {"block.base_layer", "other.base_layer", "my_orig_mod.0"}), ("parameters", {"block", "other"})],
)
@pytest.mark.parametrize("known", [True, False])
def test_module_names_that_look_like_parts_of_keys(kind, paths, known):
    config = LoraConfig(r=2, **CONFIGS[kind])
    tensors = get_peft_model_state_dict(get_peft_model(Base(), config))
    owners = owners_of(tensors, get_method("lora") if known else None)
    fit = match(Base(), config if known else None, tensors, owners)
    assert fit.fits, fit
    assert {target.path for target in fit.targets} == paths


def test_a_lower_parameter_of_which_tensors_are_missing():
    config = LoraConfig(r=2, **CONFIGS["parameters"])
    tensors = get_peft_model_state_dict(get_peft_model(Base(), config))
    kept = {key: tensor for key, tensor in tensors.items() if "block.base_layer" not in key}
    assert len(kept) == len(tensors) - 2
    fit = match(Base(), config, kept, owners_of(kept, get_method("lora")))
    assert {target.path: target.status for target in fit.targets} == {"block": "incomplete", "other": "found"}


def test_a_layer_of_which_only_a_lower_one_is_in_the_file():
    tensors = {f"base_model.model.block.base_layer.base_layer.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    fit = match(Base(), None, tensors, owners_of(tensors, None))
    assert {target.path for target in fit.targets} == {"block.base_layer"}
