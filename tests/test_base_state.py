from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import tunerkit
from tunerkit import (
    get_base_model_state_dict,
    get_peft_model,
    inject_adapter_in_model,
    set_base_model_state_dict,
)
from tunerkit.errors import AdapterStateError, CheckpointError
from tunerkit.testing.bench import move, same_bits
from tunerkit_lora import LoraConfig

X = torch.linspace(-1, 1, 15).reshape(5, 3)


class Base(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(3, 4)
        # Names that look like those of adapters and wrappers.
        self.base_layer = nn.Linear(4, 4)
        self.lora_A = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def forward(self, x):
        return self.lora_A(self.base_layer(self.first(x)))


def lora(**others):
    return LoraConfig(target_modules=["first", "base_layer", "lora_A.0"], r=2, **others)


@pytest.fixture
def model():
    model = get_peft_model(Base(), lora())
    model.add_adapter("lora_A", lora())
    for name in model.peft_config:
        move(model, name)
    return model.eval()


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_keys_are_those_of_the_base(model):
    assert equal(get_base_model_state_dict(model), Base().state_dict())
    assert equal(get_base_model_state_dict(inject_adapter_in_model(lora(), Base())), Base().state_dict())
    assert equal(get_base_model_state_dict(Base()), Base().state_dict())


def test_is_pefts():
    peft = pytest.importorskip("peft", reason="comparing with PEFT needs it")
    config = {"target_modules": ["first", "lora_A.0"], "r": 2}
    theirs = peft.get_peft_model(Base(), peft.LoraConfig(**config))
    mine = get_peft_model(Base(), LoraConfig(**config))
    assert equal(get_base_model_state_dict(mine), peft.get_base_model_state_dict(theirs))
    other = Base(seed=1).state_dict()
    own, their = set_base_model_state_dict(mine, other), peft.set_base_model_state_dict(theirs, other)
    assert (own.missing_keys, own.unexpected_keys) == (their.missing_keys, their.unexpected_keys) == ([], [])
    assert equal(get_base_model_state_dict(mine), other)
    assert equal(peft.get_base_model_state_dict(theirs), other)


def test_setting_leaves_the_adapters(model):
    before = tunerkit.get_peft_model_state_dict(model)
    report = set_base_model_state_dict(model, Base(seed=1).state_dict())
    assert report.complete
    assert sorted(report.loaded_keys) == sorted(Base().state_dict())
    assert equal(tunerkit.get_peft_model_state_dict(model), before)
    with model.disable_adapter(), torch.no_grad():
        assert same_bits(model(X), Base(seed=1).eval()(X))


def test_parametrized_and_extra_state():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"step": 7}

        def set_extra_state(self, state):
            self.seen = state

    def make():
        torch.manual_seed(0)
        return nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), Extra(3, 3), nn.Linear(3, 3))

    model = get_peft_model(make(), LoraConfig(target_modules=["1", "2"], r=2))
    state = get_base_model_state_dict(model)
    assert state.keys() == make().state_dict().keys()
    assert set_base_model_state_dict(model, state).complete
    assert model.base_model.model[1].base_layer.seen == {"step": 7}


def test_what_is_merged_is_in_it(model):
    model.merge_adapter()
    state = get_base_model_state_dict(model)
    assert (state["first.weight"] - Base().first.weight).abs().max() > 1e-3
    loaded = Base().eval()
    loaded.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(loaded(X), model(X))
    with pytest.raises(
        AdapterStateError, match=r"unmerging would put the old weights back. Call unmerge_adapter\(\) first."
    ):
        set_base_model_state_dict(model, state)


class TestBiasesThatAreTrained:
    """The base model's state holds its own biases, whatever is in place; where the adapter is merged, the trained."""

    @pytest.fixture(params=["active", "disabled", "unmerged"])
    def biased(self, request):
        model = get_peft_model(Base(), LoraConfig(target_modules=["first"], r=2, bias="all")).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.ones_like(parameter))
        if request.param == "disabled":
            model.base_model.disable_adapter_layers()
        if request.param == "unmerged":
            model.merge_adapter()
            model.unmerge_adapter()
        return model

    def test_are_not_in_it(self, biased):
        assert equal(get_base_model_state_dict(biased), Base().state_dict())

    def test_stay_when_it_is_set(self, biased):
        before = {key: value.clone() for key, value in tunerkit.get_peft_model_state_dict(biased).items()}
        other = Base(seed=1).state_dict()
        assert set_base_model_state_dict(biased, other).complete
        assert equal(get_base_model_state_dict(biased), other)
        assert equal(tunerkit.get_peft_model_state_dict(biased), before)
        with biased.disable_adapter(), torch.no_grad():
            assert same_bits(biased(X), Base(seed=1).eval()(X))
        assert equal(biased.unload().state_dict(), other)

    def test_are_in_it_when_merged(self, biased):
        biased.base_model.enable_adapter_layers()
        biased.merge_adapter()
        loaded = Base().eval()
        loaded.load_state_dict(get_base_model_state_dict(biased))
        with torch.no_grad():
            torch.testing.assert_close(loaded(X), biased(X))


class TestWhatDoesNotFit:
    def state(self):
        state = Base(seed=1).state_dict()
        state["more"] = state.pop("first.bias")
        return state

    def test_is_refused(self, model):
        before = get_base_model_state_dict(model)
        with pytest.raises(
            CheckpointError,
            match=r"missing: 'first.bias'; unexpected: 'more'. Pass that of this very model, or pass strict=False",
        ):
            set_base_model_state_dict(model, self.state())
        assert equal(get_base_model_state_dict(model), before)
        with pytest.raises(RuntimeError):
            set_base_model_state_dict(model, self.state())

    def test_is_reported(self, model):
        report = set_base_model_state_dict(model, self.state(), strict=False)
        assert (report.missing_keys, report.unexpected_keys) == (["first.bias"], ["more"])
        assert torch.equal(get_base_model_state_dict(model)["first.weight"], Base(seed=1).first.weight)

    def test_peft_loads_a_part(self):
        peft = pytest.importorskip("peft", reason="comparing with PEFT needs it")
        theirs = peft.get_peft_model(Base(), peft.LoraConfig(target_modules=["first"], r=2))
        with pytest.raises(RuntimeError, match="size mismatch"):
            peft.set_base_model_state_dict(theirs, {**Base(seed=1).state_dict(), "first.weight": torch.zeros(2, 2)})
        assert torch.equal(theirs.base_model.model.base_layer.weight, Base(seed=1).base_layer.weight)

    @pytest.mark.parametrize("value", [torch.zeros(2, 2), {"a": 1}])
    def test_shapes_are_always_refused(self, model, value):
        before = {key: tensor.clone() for key, tensor in get_base_model_state_dict(model).items()}
        size = r"\(2, 2\)" if isinstance(value, torch.Tensor) else "no tensor"
        with pytest.raises(CheckpointError, match=rf"of another shape: .*first.weight is {size}, the model's \(4, 3\)"):
            set_base_model_state_dict(model, {**Base(seed=1).state_dict(), "first.weight": value}, strict=False)
        assert equal(get_base_model_state_dict(model), before)
