"""What is particular to IA3; what every method has to pass stands in `test_conformance.py`."""

import pytest
import torch
from torch import nn

from tunerkit import get_peft_model
from tunerkit_ia3 import IA3Config, IA3Layer, IA3Model

X = torch.linspace(-1, 1, 24).reshape(4, 6)


def adapted(*, feedforward, bias=True, **settings):
    torch.manual_seed(0)
    config = IA3Config(target_modules=["0"], feedforward_modules=["0"] if feedforward else [], **settings)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5, bias=bias)), config)
    layer = model.get_base_model()[0]
    with torch.no_grad():
        layer.ia3_l["default"].normal_()
    return model.eval(), layer


@pytest.mark.parametrize("bias", [True, False])
class TestFormula:
    def test_scales_the_outputs_bias_included(self, bias):
        model, layer = adapted(feedforward=False, bias=bias)
        scale = layer.ia3_l["default"]
        assert scale.shape == (5, 1)
        expected = layer.base_layer(X) * scale[:, 0]
        assert torch.allclose(model(X), expected, atol=1e-6)
        model.merge_adapter()
        assert (layer.bias is not None) == bias
        assert torch.allclose(model(X), expected, atol=1e-6)

    def test_scales_the_inputs_of_a_feedforward_layer(self, bias):
        model, layer = adapted(feedforward=True, bias=bias)
        scale = layer.ia3_l["default"]
        before = layer.bias
        assert scale.shape == (1, 6)
        expected = layer.base_layer(X * scale[0])
        assert torch.allclose(model(X), expected, atol=1e-6)
        model.merge_adapter()
        assert (layer.bias is None) if before is None else torch.equal(layer.bias, before)
        assert torch.allclose(model(X), expected, atol=1e-6)


class TestFeedforward:
    def test_layers_are_told_apart_by_the_end_of_their_path(self):
        base = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("key", "value", "down")})
        config = IA3Config(target_modules=["key", "value", "down"], feedforward_modules=["down"])
        get_peft_model(base, config)
        assert {name: layer.is_feedforward["default"] for name, layer in base.items()} == {
            "key": False,
            "value": False,
            "down": True,
        }

    def test_none_if_the_config_and_the_model_name_none(self):
        base = nn.Sequential(nn.Linear(6, 5))
        model = get_peft_model(base, IA3Config(target_modules=["0"]))
        assert model.peft_config["default"].feedforward_modules == set()
        assert base[0].ia3_l["default"].shape == (5, 1)


class TestStart:
    @pytest.mark.parametrize("feedforward", [True, False])
    def test_is_one_unless_asked_otherwise(self, feedforward):
        def start(**settings):
            config = IA3Config(target_modules=["0"], feedforward_modules=["0"] if feedforward else [], **settings)
            base = nn.Sequential(nn.Linear(6, 5))
            get_peft_model(base, config)
            return base[0].ia3_l["default"]

        assert (start() == 1).all()
        assert (start(init_ia3_weights=False) != 1).all()


class TestNames:
    def test_cannot_be_turned_into_a_low_rank_adapter(self):
        model, layer = adapted(feedforward=False)
        assert not layer.supports_lora_conversion("default")
        assert not model.base_model.supports_lora_conversion("default")

    def test_layer_and_tuner_are_ia3_while_they_hold_it(self):
        model, layer = adapted(feedforward=False)
        assert isinstance(layer, IA3Layer)
        assert isinstance(model.base_model, IA3Model)
        base = model.get_base_model()
        model.delete_adapter("default")
        assert not isinstance(base[0], IA3Layer)
        assert not isinstance(model.base_model, IA3Model)
