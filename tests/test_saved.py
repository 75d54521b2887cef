"""Putting a saved adapter into a model."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tunerkit import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tunerkit.errors import AdapterNameError, AdapterStateError, CheckpointError
from tunerkit_lora import LoraConfig


@pytest.fixture
def folder(tmp_path):
    model = get_peft_model(
        nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path)
    return tmp_path


def test_a_taken_name_with_the_same_config(folder):
    model = get_peft_model(
        nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    )
    model.load_adapter(folder, "default")
    found = get_peft_model_state_dict(model)
    assert all(torch.equal(found[key], value) for key, value in load_file(folder / "adapter_model.safetensors").items())


def test_a_taken_name_with_another_config(folder):
    config = LoraConfig(r=2, lora_alpha=64, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    before = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    with pytest.raises(AdapterNameError) as error:
        model.load_adapter(folder, "default")
    assert str(error.value) == (
        f"There is an adapter 'default' already, and the config of the checkpoint in '{folder}' differs "
        "(lora_alpha: 8 there, 64 here). Choose another name, or delete that adapter first."
    )
    assert all(torch.equal(before[key], value) for key, value in get_peft_model_state_dict(model).items())


def test_a_merged_adapter(folder):
    model = PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 4)), folder, is_trainable=True)
    tensors = get_peft_model_state_dict(model)
    model.merge_adapter()
    message = r"The adapter 'default' is merged, so new tensors would have no effect. Call unmerge_adapter\(\) first."
    with pytest.raises(AdapterStateError, match=message):
        set_peft_model_state_dict(model, tensors)
    model.unmerge_adapter()
    assert set_peft_model_state_dict(model, tensors).complete


def test_no_initial_values_to_keep(folder):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop("base_model.model.0.lora_B.weight")
    save_file(tensors, file)
    base = nn.Sequential(nn.Linear(4, 4))
    layer = base[0]
    with (
        pytest.warns(UserWarning, match="missing"),
        pytest.raises(CheckpointError, match="with low_cpu_mem_usage=True there are no initial values to keep"),
    ):
        PeftModel.from_pretrained(base, folder, strict=False, low_cpu_mem_usage=True)
    assert base[0] is layer
