"""What `bias` of a config means to the core; its effects are tested with the methods that have the setting."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from toys import bias as toy

from tunerkit import BaseTuner, get_peft_model, inject_adapter_in_model, register
from tunerkit.biases import Biases, trained_biases
from tunerkit.config import PeftConfig
from tunerkit.errors import ConfigError
from tunerkit.plugins import unregister
from tunerkit.testing.bench import Snapshot


@dataclass
class Config(toy.Config):
    peft_type: str | None = "TOY_BIAS"
    bias: str | None = "none"


class Pair(nn.Module):
    """Two layers that share their bias, and a module that has none."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.none = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
        self.two.bias = self.one.bias

    def forward(self, x):
        return self.none(self.two(self.one(x)))


@pytest.fixture
def method():
    register("toy-bias", type("Plugin", (), {"method": toy.Method(config=Config, adapter=toy.BiasAdapter)})())
    yield
    unregister("toy-bias")


@pytest.mark.parametrize("which", ["all", "toy_only", "other_only"])
def test_values_that_train(which):
    assert trained_biases(Config(bias=which)) == which


@pytest.mark.parametrize("config", [Config(), Config(bias=None), PeftConfig()])
def test_values_that_do_not(config):
    assert trained_biases(config) is None


def test_a_value_that_is_not_known(method):
    model = Pair()
    before = Snapshot.of(model)
    config = Config(target_modules=["one"], bias="some")
    for call in (lambda: get_peft_model(model, config), lambda: inject_adapter_in_model(config, model)):
        with pytest.raises(ConfigError) as caught:
            call()
        assert str(caught.value) == (
            "Config.bias='some' is not known; possible are 'none', 'all' for all biases of the model, and "
            "'<method>_only' for those of the adapted layers."
        )
    assert before.differences(model) == []


def test_none():
    none = Biases()
    none.show(trained=True)
    none.check_free()
    assert none.parameters() == none.pieces() == []


def test_a_shared_bias_is_one(method):
    base = Pair()
    own = base.one.bias.detach().clone()
    model = get_peft_model(base, Config(target_modules=["one"], bias="all"))
    biases = model.base_model.biases
    assert len(biases.kept) == 1
    assert {piece.key("bias") for piece in biases.pieces()} == {
        "base_model.model.one.base_layer.bias",
        "base_model.model.two.bias",
    }
    with torch.no_grad():
        base.two.bias.add_(1)
    with model.disable_adapter():
        assert torch.equal(base.two.bias, own)
    assert torch.equal(base.two.bias, own + 1)


def test_a_tuner_by_itself(method):
    base = Pair()
    before = Snapshot.of(base)
    tuner = BaseTuner(base, Config(target_modules=["one"], bias="toy_only"), "a")
    assert tuner.biases.shown
    assert base.two.bias.requires_grad
    with torch.no_grad():
        base.two.bias.add_(1)
    tuner.unload()
    assert before.differences(base) == []
