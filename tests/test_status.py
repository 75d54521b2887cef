from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from toys import registered, shared

from tunerkit import TunerLayerStatus, get_layer_status, get_model_status, get_peft_model, inject_adapter_in_model
from tunerkit.errors import StatusError, UnknownAdapterError
from tunerkit.status import count_parameters
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoraConfig


def make_base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def lora(*targets, **others):
    return LoraConfig(target_modules=list(targets or ("0", "2")), r=2, **others)


def ia3(*targets):
    return IA3Config(target_modules=list(targets or ("0",)), feedforward_modules=[])


def as_dicts(found):
    return [dataclasses.asdict(item) for item in found]


STEPS = {
    "fresh": lambda model: None,
    "second adapter": lambda model: model.add_adapter("b", model.peft_config["default"]),
    "other active": lambda model: model.set_adapter("b"),
    "frozen": lambda model: model.set_adapter("b", inference_mode=True),
    "trains in part": lambda model: model.base_model.model[0].lora_A["b"].weight.requires_grad_(True),  # noqa: FBT003
    "merged": lambda model: model.merge_adapter(["b"]),
    "merged in part": lambda model: model.base_model.model[0].unmerge(),
    "unmerged": lambda model: model.base_model.model[2].unmerge(),
    "switched off in part": lambda model: model.base_model.model[2].enable_adapters(False),  # noqa: FBT003
    "active in part": lambda model: model.base_model.model[0].set_adapter(["default"]),
}


class TestAgainstPeft:
    """The same steps on both libraries; after each, both say the same of every layer and of the model."""

    def test_lora(self):
        peft = pytest.importorskip("peft", reason="comparing with PEFT needs it")
        mine = get_peft_model(make_base(), lora())
        theirs = peft.get_peft_model(make_base(), peft.LoraConfig(target_modules=["0", "2"], r=2))
        seen = set()
        for step, change in STEPS.items():
            change(mine)
            change(theirs)
            assert as_dicts(mine.get_layer_status()) == as_dicts(theirs.get_layer_status()), step
            status = dataclasses.asdict(mine.get_model_status())
            assert status == dataclasses.asdict(theirs.get_model_status()), step
            seen |= {key for key, value in status.items() if "irregular" in {str(value), *map(str, _inner(value))}}
        assert seen == {"enabled", "active_adapters", "merged_adapters", "requires_grad"}

    def test_ia3(self):
        """All but the type of the layer, in which PEFT leaves the method out."""
        peft = pytest.importorskip("peft", reason="comparing with PEFT needs it")
        mine = get_peft_model(make_base(), ia3("0", "2"))
        theirs = peft.get_peft_model(make_base(), peft.IA3Config(target_modules=["0", "2"], feedforward_modules=[]))
        for own, other in zip(mine.get_layer_status(), theirs.get_layer_status(), strict=True):
            assert (own.module_type, other.module_type) == ("ia3.Linear", "Linear")
            assert dataclasses.replace(own, module_type="Linear") == TunerLayerStatus(**dataclasses.asdict(other))
        assert dataclasses.asdict(mine.get_model_status()) == dataclasses.asdict(theirs.get_model_status())

    def test_injected(self):
        """PEFT does not say what the base and the methods are; the model knows."""
        peft = pytest.importorskip("peft", reason="comparing with PEFT needs it")
        mine = inject_adapter_in_model(lora(), make_base())
        theirs = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0", "2"], r=2), make_base())
        assert as_dicts(get_layer_status(mine)) == as_dicts(peft.get_layer_status(theirs))
        own, other = get_model_status(mine), peft.get_model_status(theirs)
        assert (own.base_model_type, other.base_model_type) == ("Sequential", "other")
        assert (own.peft_types, other.peft_types) == ({"default": "LORA"}, {})
        assert own.adapter_model_type == other.adapter_model_type == "None"
        same = {"base_model_type": "other", "peft_types": {}}
        assert dataclasses.asdict(own) | same == dataclasses.asdict(other)


def _inner(value):
    return value.values() if isinstance(value, dict) else ()


def test_methods_on_one_layer():
    model = get_peft_model(make_base(), lora("0"))
    model.add_adapter("scale", ia3("0", "2"))
    assert [(one.name, one.module_type, one.available_adapters) for one in model.get_layer_status()] == [
        ("model.0", "ia3+lora.Linear", ["default", "scale"]),
        ("model.2", "ia3.Linear", ["scale"]),
    ]
    assert model.get_model_status().peft_types == {"default": "LORA", "scale": "IA3"}
    assert model.get_model_status().active_adapters == ["default"]
    model.merge_adapter(["default"])
    # It is merged wherever it is.
    assert model.get_model_status().merged_adapters == ["default"]


def test_what_is_never_trained_does_not_count():
    model = get_peft_model(make_base(), lora("0"))
    layer = model.base_model.model[0]
    adapter = layer.adapters["default"]
    adapter.__dict__["_frozen"] = frozenset({"lora_A.weight"})
    adapter.lora_A.weight.requires_grad = False
    assert model.get_layer_status()[0].requires_grad == {"default": True}
    adapter.__dict__["_frozen"] = frozenset({"lora_A.weight", "lora_B.weight"})
    assert model.get_layer_status()[0].requires_grad == {}


def test_what_an_adapter_has_once_per_model_counts():
    with registered(shared):
        model = get_peft_model(make_base(), shared.Config(target_modules=["0", "2"], train_shared=True))
        assert model.get_model_status().requires_grad == {"default": True}
        next(model.base_model.parts["default"].parameters()).requires_grad = False
        assert [layer.requires_grad for layer in model.get_layer_status()] == [{"default": True}] * 2
        assert model.get_model_status().requires_grad == {"default": "irregular"}


@pytest.mark.parametrize("call", [get_layer_status, get_model_status])
def test_refusals(call):
    with pytest.raises(
        UnknownAdapterError,
        match=r"The model \(Sequential\) has no layers with adapters. Attach one with get_peft_model\(model, config\)",
    ):
        call(make_base())
    with pytest.raises(ValueError, match="or put one in with inject_adapter_in_model"):
        call(make_base())
    for error in (StatusError, TypeError, ValueError):
        with pytest.raises(error, match=r"The status is that of a model, a torch.nn.Module; this is a dict."):
            call({})


class Params4bit(nn.Parameter):
    """As bitsandbytes has it: two numbers to a byte."""


class TestCount:
    def model(self, storage):
        model = nn.Linear(4, 4, bias=False)
        data = torch.zeros(8 // storage.itemsize, dtype=storage)
        model.weight = Params4bit(data, requires_grad=False)
        return model

    @pytest.mark.parametrize("storage", [torch.uint8, torch.float16, torch.float32])
    def test_numbers_of_four_bits(self, storage):
        peft = pytest.importorskip("peft", reason="comparing with PEFT needs it")
        model = self.model(storage)
        assert count_parameters(model) == (0, 16) == peft.PeftModel.get_nb_trainable_parameters(model)

    def test_spread_over_processes(self):
        peft = pytest.importorskip("peft", reason="comparing with PEFT needs it")
        model = nn.Linear(3, 2)
        model.weight = nn.Parameter(torch.empty(0))
        model.weight.ds_numel = 6
        model.bias.ds_numel = 99  # gathered, so its own size counts
        assert count_parameters(model) == (8, 8) == peft.PeftModel.get_nb_trainable_parameters(model)

    def test_shared_counts_once(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        assert count_parameters(model) == (15, 15)
