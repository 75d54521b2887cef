"""A checkpoint's tensors go straight to their place: nothing is made at random first, to be thrown away."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tunerkit
from tunerkit.testing.bench import difference, move
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoraConfig

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
CONFIGS = {
    "LoRA": LoraConfig(r=2, target_modules=["0", "2"]),
    "LoRA, gaussian": LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights="gaussian"),
    "DoRA": LoraConfig(r=2, target_modules=["0", "2"], use_dora=True, lora_bias=False),
    "IA3": IA3Config(target_modules=["0", "2"], feedforward_modules=["2"]),
    "IA3, at random": IA3Config(target_modules=["0", "2"], feedforward_modules=["2"], init_ia3_weights=False),
}


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).eval()


def run(model):
    with torch.no_grad():
        return model(X)


class NoStart(torch.overrides.TorchFunctionMode):
    """Raises where numbers are drawn for a tensor that has memory."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if name.rstrip("_") in {"normal", "uniform", "rand", "randn", "trunc_normal"} and not result.is_meta:
            raise AssertionError(f"{name} made numbers for a tensor that is to be loaded")
        return result


@pytest.fixture
def no_start(monkeypatch):
    def fail(*_args, **_kwargs):
        raise AssertionError("a first value was made")

    def forbid():
        for name in dir(nn.init):
            if name.endswith("_") and not name.startswith("_"):
                monkeypatch.setattr(nn.init, name, fail)
        return NoStart()

    return forbid


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
class TestNoStart:
    def saved(self, config, folder):
        model = tunerkit.get_peft_model(base(), config.copy()).eval()
        move(model, "default")
        model.save_pretrained(folder)
        y = run(model)
        assert difference(y, run(base())) > 1e-3
        return y

    def test_from_pretrained(self, config, no_start, tmp_path):
        y, net = self.saved(config, tmp_path), base()
        with no_start():
            model = tunerkit.PeftModel.from_pretrained(net, tmp_path)
        assert torch.equal(run(model), y)

    def test_load_adapter(self, config, no_start, tmp_path):
        y = self.saved(config, tmp_path)
        model = tunerkit.get_peft_model(base(), LoraConfig(r=3, target_modules=["2"]), "other")
        with no_start():
            model.load_adapter(tmp_path, "default")
        model.set_adapter("default")
        assert torch.equal(run(model.eval()), y)


@pytest.mark.parametrize("name", ["LoRA", "IA3, at random"])
def test_the_raisers_raise(name, no_start):
    """A new adapter has a start, which they see."""
    net = base()
    with no_start(), pytest.raises(AssertionError, match=r"made numbers for a tensor|a first value"):
        tunerkit.get_peft_model(net, CONFIGS[name])
