"""Saving an adapter in the form that stands on the unchanged base by itself."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from toys import registered, started
from toys.started import Config

import tunerkit
from tunerkit import PeftModel, get_peft_model
from tunerkit.errors import CheckpointError, ConfigError
from tunerkit_ia3 import IA3Config


@pytest.fixture(autouse=True)
def toy():
    with registered(started):
        yield


X = torch.linspace(-1, 1, 6).reshape(2, 3)


def make(**settings):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model = get_peft_model(copy.deepcopy(base), Config(target_modules=["0", "1"], **settings))
    return base, model


def move(model):
    with torch.no_grad():
        for layer in model.base_model.layers():
            layer.toy_shift["default"].add_(torch.arange(len(layer.toy_shift["default"])))


@pytest.mark.parametrize("named", [True, False])
def test_what_is_written_needs_no_start(named, tmp_path):
    base, model = make(always=not named)
    model.peft_config["default"].always = False
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].always = not named
    move(model)
    assert (model(X) - base(X)).abs().max() > 1e-3
    options = {"path_initial_model_for_weight_conversion": tmp_path / "initial"} if named else {}
    model.save_pretrained(tmp_path / "final", **options)
    loaded = PeftModel.from_pretrained(base, tmp_path / "final")
    assert loaded.peft_config["default"].start == 0
    torch.testing.assert_close(loaded(X), model(X))
    assert model.peft_config["default"].start == 1


def test_without_being_asked_for_it_is_saved_in_its_own_form(tmp_path):
    _, model = make()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["start"] == 1


def test_several_adapters(tmp_path):
    base, model = make()
    model.add_adapter("other", Config(target_modules=["0", "1"]))
    model.save_pretrained(tmp_path / "initial", selected_adapters=["default"])
    move(model)
    model.save_pretrained(
        tmp_path / "final",
        selected_adapters=["default", "other"],
        path_initial_model_for_weight_conversion=tmp_path / "initial",
    )
    loaded = PeftModel.from_pretrained(base, tmp_path / "final", "other", subfolder="other")
    torch.testing.assert_close(loaded(X), base[1].base_layer(base[0].base_layer(X)))


def test_a_method_without_that_form(tmp_path):
    base = nn.Sequential(nn.Linear(3, 4))
    model = get_peft_model(base, IA3Config(target_modules=["0"], feedforward_modules=[]))
    model.save_pretrained(tmp_path / "initial")
    with pytest.raises(ConfigError) as error:
        model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=tmp_path / "initial")
    assert str(error.value) == (
        "An adapter of IA3 takes nothing off the base model, so there is nothing to convert. Leave "
        "path_initial_model_for_weight_conversion out."
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("shift", "found"), [({}, "lacks it"), ({"base_model.model.0.toy_shift": torch.ones(7)}, "has it as (7,)")]
)
def test_an_initial_adapter_of_another_model(shift, found, tmp_path):
    _, model = make()
    model.save_pretrained(tmp_path / "initial")
    save_file(shift, tmp_path / "initial" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError) as error:
        model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=tmp_path / "initial")
    assert str(error.value) == (
        f"The adapter's base_model.model.0.toy_shift is (4,), and the initial adapter {found}. Give the folder of this "
        "very adapter as it was saved before training."
    )
    assert not (tmp_path / "out").exists()


def test_tensors_of_no_adapter_are_left_as_they_are():
    base = nn.Sequential(nn.Linear(3, 4))
    model = get_peft_model(base, IA3Config(target_modules=["0"], feedforward_modules=[]))
    adapter = model.get_base_model()[0].adapters["default"]
    tensors = tunerkit.get_peft_model_state_dict(model)
    assert adapter.standalone(tensors, None) is tensors
