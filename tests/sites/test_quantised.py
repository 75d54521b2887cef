"""Layers whose weight is stored with few digits: what the core does with them, shown on a toy."""

import copy
import pickle

import pytest
import torch
from torch import nn

from tunerkit import get_peft_model, sites
from tunerkit.errors import MergeError, MergeWarning, QuantisationWarning
from tunerkit.sites import LinearSite, make_site, register_site
from tunerkit.testing.bench import move
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoraConfig

STEP = 1 / 32


class Stepped(nn.Parameter):
    """Whole numbers, which stand for multiples of `step`; moving them moves what else belongs to them."""

    def __new__(cls, data, step=STEP):
        made = torch.Tensor._make_subclass(cls, data, require_grad=False)
        made.step = step
        return made

    def to(self, *args, **kwargs):
        return Stepped(self.data.to(*args, **kwargs), self.step)

    def __deepcopy__(self, memo):
        return Stepped(self.data.clone(), self.step)


class SteppedLinear(nn.Linear):
    """A linear layer whose weight is stored as whole numbers."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features)
        self.bias = layer.bias
        self.weight = Stepped((layer.weight.detach() / STEP).round().to(torch.int16))

    def forward(self, x):
        return nn.functional.linear(x, self.weight.data * self.weight.step, self.bias)


class SteppedSite(LinearSite):
    quantised = True
    __slots__ = ()

    @classmethod
    def takes(cls, module):
        return None

    @property
    def stored(self):
        held = self.module._parameters["weight"]
        return held.data * held.step if isinstance(held, Stepped) else held

    def to_stored(self, weight, bias):
        held = Stepped((weight / STEP).round().to(torch.int16) if weight.isfinite().all() else weight)
        return {"weight": held, "bias": bias}

    def run(self, x, weight, bias):
        return nn.functional.linear(x, weight, bias)

    def dequantised(self):
        plain = nn.Linear(self.in_features, self.out_features)
        plain.weight, plain.bias = nn.Parameter(self.weight.clone(), requires_grad=False), self.module.bias
        return plain


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(sites, "_SITES", dict(sites._SITES))
    register_site(SteppedLinear, SteppedSite)
    yield
    sites._FOUND.clear()


def adapted(config=None):
    torch.manual_seed(0)
    base = nn.Sequential(SteppedLinear(nn.Linear(6, 8)), nn.Tanh(), SteppedLinear(nn.Linear(8, 4)), nn.Linear(4, 2))
    model = get_peft_model(base, config or LoraConfig(r=2, target_modules=["0", "2", "3"]))
    move(model, "default")
    return model.eval()


def held(model, name="0"):
    return model.base_model.model.get_submodule(name).base_layer


X = torch.linspace(-1, 1, 18).reshape(3, 6)


class TestMerging:
    def test_says_how_far_it_rounds(self):
        model = adapted()
        layer = model.base_model.model[0]
        exact = layer.adapters["default"].merged(layer.site)[0].detach()
        with pytest.warns(QuantisationWarning, match=r"into 2 quantised layers, which rounds their weights: by"):
            model.merge_adapter()
        weight = held(model).weight
        assert type(weight) is Stepped
        error = float((weight.data * STEP - exact).norm() / exact.norm())
        assert error > 1e-3
        assert layer.rounding == pytest.approx(error, rel=1e-4)
        assert model.base_model.model[3].rounding == 0
        model.unmerge_adapter()
        assert layer.rounding == 0

    def test_says_so_once_for_each_call(self):
        for merge in (
            lambda model: model.merge_adapter(),
            lambda model: model.merge_adapter(keep_base="cpu"),
            lambda model: model.merge_adapter(keep_base="none"),
            lambda model: model.merge_and_unload(),
        ):
            with pytest.warns(QuantisationWarning) as caught:
                merge(adapted())
            assert [sorted(warning.message.errors) for warning in caught] == [["0", "2"]]
            assert caught[0].filename == __file__

    def test_warning_can_be_pickled(self):
        with pytest.warns(QuantisationWarning, match=r"rounds their weights: by up to .*% of the norm") as caught:
            adapted().merge_adapter()
        warning = pickle.loads(pickle.dumps(caught[0].message))  # noqa: S301 - our own bytes
        assert warning.errors == caught[0].message.errors
        assert str(warning) == str(caught[0].message)

    def test_says_nothing_where_nothing_is_rounded(self):
        model = adapted(LoraConfig(r=2, target_modules=["3"]))
        model.merge_adapter()
        adapted(IA3Config(target_modules=["3"], feedforward_modules=[])).merge_and_unload()

    @pytest.mark.filterwarnings("ignore::tunerkit.errors.QuantisationWarning")
    @pytest.mark.parametrize("keep_base", ["device", "cpu"])
    def test_unmerged_exactly(self, keep_base):
        model = adapted()
        weight, before = held(model).weight, model(X)
        model.merge_adapter(keep_base=keep_base)
        assert held(model).weight is not weight
        model.unmerge_adapter()
        assert held(model).weight is weight
        assert torch.equal(model(X), before)

    @pytest.mark.filterwarnings("ignore::tunerkit.errors.QuantisationWarning")
    def test_what_is_rounded_is_not_rounded_again(self):
        model = adapted()
        model.add_adapter("other", IA3Config(target_modules=["0"], feedforward_modules=[]))
        model.set_adapter("other")
        move(model, "other")
        model.set_adapter(["default", "other"])
        at_once = copy.deepcopy(model)
        at_once.merge_adapter()
        model.merge_adapter(["default"])
        model.merge_adapter(["other"])
        assert torch.equal(held(model).weight.data, held(at_once).weight.data)
        model.unmerge_adapter()
        assert model.base_model.model[0].merged_adapters == []

    @pytest.mark.filterwarnings("ignore::tunerkit.errors.QuantisationWarning")
    def test_original_of_a_class_of_its_own_moves_with_the_model(self):
        model = adapted()
        held(model).weight.step = 1 / 16
        before = model(X)
        model.merge_adapter()
        model.to(torch.float64).to(torch.float32)
        original = model.base_model.model[0].originals["weight"]
        assert (type(original), original.step) == (Stepped, 1 / 16)
        model.unmerge_adapter()
        assert torch.allclose(model(X), before)

    def test_not_finite(self):
        model = adapted()
        model.base_model.model[2].lora_A["default"].weight.data[0, 0] = torch.inf
        with pytest.raises(MergeError, match="NaN or infinities into its weight"):
            model.merge_adapter(safe_merge=True)

    def test_delta_is_not_rounded(self):
        layer = adapted().base_model.model[0]
        low = layer.adapters["default"]
        delta = low.scaling * low.lora_B.weight @ low.lora_A.weight
        assert torch.allclose(layer.get_delta_weight("default"), delta, atol=1e-7)


class TestDequantising:
    def test_is_exact(self):
        model = adapted()
        before = model(X)
        merged = model.merge_and_unload(dequantize=True)
        assert [type(merged[at]) for at in (0, 2, 3)] == [nn.Linear] * 3
        assert torch.allclose(merged(X), before, atol=1e-6)

    @pytest.mark.filterwarnings("ignore::tunerkit.errors.QuantisationWarning")
    def test_is_exact_after_a_rounded_merge(self):
        model = adapted()
        before = model(X)
        model.merge_adapter()
        with pytest.warns(MergeWarning, match="merged already"):
            merged = model.merge_and_unload(dequantize=True)
        assert torch.allclose(merged(X), before, atol=1e-6)

    @pytest.mark.filterwarnings("ignore::tunerkit.errors.QuantisationWarning")
    def test_without_the_originals_stays_rounded(self):
        model = adapted()
        model.merge_adapter(keep_base="none")
        merged = model(X)
        with pytest.warns(MergeWarning, match="merged already"):
            plain = model.merge_and_unload(dequantize=True)
        assert type(plain[0]) is nn.Linear
        assert torch.allclose(plain(X), merged, atol=1e-6)

    def test_others_stay(self):
        model = adapted(LoraConfig(r=2, target_modules=["0"]))
        merged = model.merge_and_unload(dequantize=True)
        assert [type(merged[at]) for at in (0, 2)] == [nn.Linear, SteppedLinear]

    def test_a_layer_that_is_not_quantised_is_itself(self):
        layer = nn.Linear(3, 2)
        assert make_site(layer).dequantised() is layer
