"""The method of the tutorial, which knows nothing of quantised layers, works on them without a line of it changed."""

import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from quantised import FORMATS, Mlp, quantised
from test_conformance import OnEightBits, OnFourBits

from tunerkit import PeftModel, get_peft_model, register
from tunerkit.errors import QuantisationWarning
from tunerkit.plugins import unregister
from tunerkit.sites import make_site

EXAMPLE = Path(__file__).parents[3] / "examples" / "tunerkit-ssf"


@pytest.fixture(scope="module", autouse=True)
def ssf():
    """The example as it stands in the repository; it is installed nowhere."""
    sys.path.insert(0, str(EXAMPLE))
    try:
        module = importlib.import_module("tunerkit_ssf")
    finally:
        sys.path.remove(str(EXAMPLE))
    register("ssf", module)
    yield module
    unregister("ssf")


class Ssf:
    def config(self):
        return sys.modules["tunerkit_ssf"].SSFConfig(target_modules=["first", "second"])


@pytest.mark.filterwarnings("ignore::tunerkit.errors.QuantisationWarning")
class TestOnFourBits(Ssf, OnFourBits): ...


@pytest.mark.filterwarnings("ignore::tunerkit.errors.QuantisationWarning")
class TestOnEightBits(Ssf, OnEightBits): ...


@pytest.fixture
def plain():
    return Mlp()


@pytest.fixture
def x():
    return torch.randn(16, 64)


def adapted(plain, form):
    """A model whose adapter has been trained."""
    model = get_peft_model(quantised(copy.deepcopy(plain), form), Ssf().config())
    x, labels = torch.randn(64, 64), torch.randn(64, 8)
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=5e-2)
    losses = []
    for _ in range(25):
        loss = (model(x) - labels).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    return model.eval()


def exact_weights(model):
    layers = {name: getattr(model.base_model.model, name) for name in ("first", "second")}
    return {name: layer.adapters["default"].merged(layer.bare_site)[0].detach() for name, layer in layers.items()}


@pytest.mark.parametrize("form", FORMATS)
class TestMerging:
    def test_says_how_far_it_rounds_and_unmerges(self, form, plain):
        model = adapted(plain, form)
        layer, exact = model.base_model.model.first, exact_weights(model)["first"]
        weight = layer.base_layer.weight
        bits = weight.data.clone()
        with pytest.warns(QuantisationWarning, match="into 2 quantised layers") as caught:
            model.merge_adapter()
        error = float((make_site(layer.base_layer).weight - exact).norm() / exact.norm())
        assert caught[0].message.errors["first"] == pytest.approx(error, rel=1e-4)
        assert error < 0.2
        model.unmerge_adapter()
        assert layer.base_layer.weight is weight
        assert torch.equal(weight.data, bits)

    def test_dequantised_is_exact(self, form, plain):
        model = adapted(plain, form)
        exact = exact_weights(model)
        merged = model.merge_and_unload(dequantize=True)
        for name, weight in exact.items():
            module = getattr(merged, name)
            assert not isinstance(module, (Linear4bit, Linear8bitLt))
            torch.testing.assert_close(module.weight.detach(), weight)


@pytest.mark.parametrize("form", FORMATS)
def test_saves_and_loads(form, plain, x, tmp_path):
    model = adapted(plain, form)
    model.save_pretrained(tmp_path)
    base = quantised(copy.deepcopy(plain), form).eval()
    untouched = copy.deepcopy(base)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    expected = model(x)
    assert torch.allclose(loaded(x), expected, atol=1e-6)
    assert (expected - untouched(x)).abs().max() > 1e-2
