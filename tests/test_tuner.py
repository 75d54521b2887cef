from __future__ import annotations

import copy
import pickle
import types
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import tunerkit
from tunerkit import BaseTuner, Method, PeftConfig, get_peft_model, plugins, register
from tunerkit.adapted_layer import AdaptedLayer
from tunerkit.adapter import Adapter, Part
from tunerkit.errors import (
    AdapterNameError,
    AdapterStateError,
    AdapterWarning,
    ConfigError,
    MergeWarning,
    RouteError,
    UnknownAdapterError,
    UnknownMethodError,
)
from tunerkit.testing.bench import Snapshot, difference, move, same_bits
from tunerkit.tuner import find_tuner, tuner_of
from tunerkit_ia3 import IA3Config, IA3Layer, IA3Model
from tunerkit_lora import LoraConfig, LoraLayer, LoraModel


def make_base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.Linear(4, 2))


def lora(*targets, **others):
    return LoraConfig(target_modules=list(targets or ("0", "2")), r=2, **others)


def ia3(*targets, **others):
    return IA3Config(target_modules=list(targets or ("0", "3")), feedforward_modules=[], **others)


def trains(model):
    """Return the names of the adapters with tensors that train."""
    return {
        name.split(".")[-2] if "lora" in name else name.split(".")[-1]
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def apart(one, other):
    return difference(one.detach(), other.detach()) > 1e-3


X = torch.linspace(-1, 1, 15).reshape(5, 3)


class TestConstructor:
    def test_a_config_becomes_adapter(self):
        base = make_base()
        tuner = LoraModel(base, lora())
        assert tuner.model is base
        assert tuner.active_adapters == ["adapter"]
        assert list(tuner.peft_config) == ["adapter"]
        assert tuner.targeted_module_names == ["0", "2"]
        assert tuner.targeted_parameter_names == []
        assert tuner.prefix == "lora_"
        assert tuner.tuner_layer_cls is LoraLayer
        assert tuner.config == {"model_type": "custom"}
        assert base.peft_config is tuner.peft_config
        assert same_bits(tuner(X), make_base()(X))

    def test_a_config_with_a_name(self):
        assert list(LoraModel(make_base(), lora(), "x").peft_config) == ["x"]

    def test_a_dict_gives_the_entry_of_the_name(self):
        tuner = BaseTuner(make_base(), {"a": lora(), "b": ia3()}, "b")
        assert list(tuner.peft_config) == ["b"]
        assert isinstance(tuner.model[3], IA3Layer)

    def test_a_dict_without_the_name_gives_its_only_entry(self):
        tuner = LoraModel(make_base(), {"a": lora()})
        assert tuner.active_adapters == ["a"]
        assert list(LoraModel(make_base(), {"adapter": lora(), "b": lora()}).peft_config) == ["adapter"]

    @pytest.mark.parametrize(("names", "name"), [("ab", "adapter"), ("a", "c"), ("", "adapter")])
    def test_a_dict_that_leaves_it_open(self, names, name):
        base = make_base()
        before = Snapshot.of(base)
        with pytest.raises(ConfigError) as caught:
            BaseTuner(base, dict.fromkeys(names, lora()), name)
        assert str(caught.value).startswith(f"peft_config has no entry {name!r}; it has ")
        assert "adapter_name" in str(caught.value)
        assert before.differences(base) == []

    @pytest.mark.parametrize("config", [None, "LORA", {"peft_type": "LORA"}, [lora()]])
    def test_what_is_no_config(self, config):
        with pytest.raises(
            ConfigError, match="peft_config must be a PeftConfig or a dict of them by adapter name; it is"
        ):
            BaseTuner(make_base(), config)

    def test_plain_class_takes_any_method(self):
        tuner = BaseTuner(make_base(), ia3())
        assert isinstance(tuner, IA3Model)
        assert not isinstance(tuner, LoraModel)
        with pytest.raises(UnknownMethodError, match="tunerkit-nothing"):
            BaseTuner(make_base(), PeftConfig(peft_type="NOTHING"))

    def test_low_cpu_mem_usage_and_state_dict(self):
        state = {"2.lora_A.weight": torch.ones(2, 4), "2.lora_B.weight": torch.ones(4, 2)}
        tuner = LoraModel(make_base(), lora("0"), low_cpu_mem_usage=True, state_dict=state)
        assert tuner.targeted_module_names == ["2"]
        assert tuner.model[2].lora_A["adapter"].weight.is_meta
        tunerkit.set_peft_model_state_dict(tuner, state, "adapter")
        assert torch.equal(tuner.model[2].lora_A["adapter"].weight, torch.ones(2, 4))

    def test_freezes_the_base(self):
        tuner = LoraModel(make_base(), lora())
        assert {name for name, p in tuner.named_parameters() if p.requires_grad} == {
            f"model.{place}.lora_{letter}.adapter.weight" for place in (0, 2) for letter in "AB"
        }

    def test_config_of_the_caller_is_not_changed(self):
        base = make_base()
        base.config = {"model_type": "llama"}
        base.add_module("q_proj", nn.Linear(2, 2))
        base.add_module("v_proj", nn.Linear(2, 2))
        config = LoraConfig()
        configs = {"a": config}
        tuner = LoraModel(base, configs, "a")
        assert configs == {"a": LoraConfig()}
        assert configs["a"] is config
        assert tuner.peft_config["a"].target_modules == {"q_proj", "v_proj"}

    @pytest.mark.parametrize("name", ["", "a.b", "a/b", "keys", "x" * 101, None, 3, ["a"]])
    def test_illegal_name(self, name):
        base = make_base()
        before = Snapshot.of(base)
        with pytest.raises(AdapterNameError):
            LoraModel(base, lora(), name)
        with pytest.raises(AdapterNameError):
            get_peft_model(base, lora(), name)
        assert before.differences(base) == []


class TestModelConfig:
    @dataclass
    class Shape:
        model_type: str = "shape"

    def given(self, config):
        model = nn.Linear(1, 1)
        model.config = config
        return model

    def test_forms(self):
        get = BaseTuner.get_model_config
        assert get(self.given({"model_type": "a", "x": 1})) == {"model_type": "a", "x": 1}
        assert get(self.given(types.SimpleNamespace(to_dict=lambda: {"model_type": "b"}))) == {"model_type": "b"}
        assert get(self.given(self.Shape())) == {"model_type": "shape"}

    @pytest.mark.parametrize("config", [None, 3, "llama", Shape])
    def test_without(self, config):
        model = self.given(config)
        assert BaseTuner.get_model_config(model) == {"model_type": "custom"}
        assert BaseTuner.get_model_config(model, {"model_type": "x"}) == {"model_type": "x"}
        assert BaseTuner.get_model_config(nn.Linear(1, 1), default={}) == {}

    def test_is_a_copy(self):
        model = self.given({"model_type": "a"})
        BaseTuner.get_model_config(model)["model_type"] = "b"
        BaseTuner.get_model_config(nn.Linear(1, 1))["model_type"] = "b"
        assert model.config == {"model_type": "a"}
        assert BaseTuner.get_model_config(nn.Linear(1, 1)) == {"model_type": "custom"}


class TestInject:
    def test_second_adapter_is_there_and_not_active(self):
        tuner = LoraModel(make_base(), lora())
        tuner.peft_config["b"] = ia3()
        tuner.inject_adapter(tuner.model, "b")
        assert tuner.active_adapters == ["adapter"]
        assert tuner.targeted_module_names == ["0", "2", "3"]
        assert tuner.model[0].available_adapters == ["adapter", "b"]
        assert trains(tuner) == {"adapter"}

    def test_autocast(self):
        tuner = LoraModel(make_base().bfloat16(), lora())
        assert tuner.model[0].lora_A["adapter"].weight.dtype == torch.bfloat16
        tuner.peft_config.update(b=lora(), c=lora())
        tuner.inject_adapter(tuner.model, "b")
        tuner.inject_adapter(tuner.model, "c", autocast_adapter_dtype=False)
        assert tuner.model[0].lora_A["b"].weight.dtype == torch.float32
        assert tuner.model[0].lora_A["c"].weight.dtype == torch.bfloat16

    def test_second_tuner_on_the_same_model(self):
        base = make_base()
        first = LoraModel(base, lora(), "a")
        move(types.SimpleNamespace(get_base_model=lambda: base, base_model=first), "a")
        second = IA3Model(base, ia3(), "b")
        assert second.peft_config is first.peft_config
        assert list(first.peft_config) == ["a", "b"]
        assert second.active_adapters == ["b"]
        assert second.owner is first.owner
        first.unload()
        assert all(type(module) is not AdaptedLayer for module in base.modules())
        assert all(parameter.requires_grad for parameter in base.parameters())

    def test_second_tuner_with_a_taken_name(self):
        base = make_base()
        LoraModel(base, lora(), "a")
        before = Snapshot.of(base)
        with pytest.raises(
            AdapterNameError, match=r"The model already has an adapter 'a' beside 'a'. Choose another name"
        ):
            IA3Model(base, ia3(), "a")
        assert before.differences(base) == []
        assert base.peft_config["a"].peft_type == "LORA"

    def test_without_a_config(self):
        tuner = LoraModel(make_base(), lora(), "german")
        with pytest.raises(
            UnknownAdapterError, match=r"peft_config has no entry 'b'; it has 'german'. Put the adapter's config"
        ):
            tuner.inject_adapter(tuner.model, "b")

    def test_while_disabled(self):
        model = get_peft_model(make_base(), lora("0"))
        model.base_model.disable_adapter_layers()
        model.add_adapter("b", ia3("3"))
        move(model, "b")
        model.set_adapter(["default", "b"])
        assert same_bits(model(X), make_base()(X))
        model.base_model.enable_adapter_layers()
        assert apart(model(X), make_base()(X))
        assert trains(model) == {"default", "b"}


class Call:
    """What a method's own tuner class offers."""

    def ping(self):
        return sorted(self.peft_config)


class CallA(BaseTuner, Call, method="call-a"):
    pass


class CallB(BaseTuner, Call, method="call-b"):
    def pong(self):
        return "pong"


@dataclass
class ConfigA(PeftConfig):
    peft_type: str | None = "CALL_A"
    target_modules: list[str] | set[str] | str | None = None


@dataclass
class ConfigB(ConfigA):
    peft_type: str | None = "CALL_B"


class Scale(Adapter):
    entries = ("call_scale",)

    def __init__(self, site, config):
        super().__init__(site, config)
        self.call_scale = nn.Parameter(site.ones(1))

    def merged(self, below):
        return below.weight * self.call_scale, below.bias


class PingPart(Part):
    exposes = ("pang",)

    def pang(self):
        return "pang"


@pytest.fixture
def callers():
    register("call-a", types.SimpleNamespace(method=Method(ConfigA, Scale, PingPart, CallA)))
    register("call-b", types.SimpleNamespace(method=Method(ConfigB, Scale, None, CallB)))
    yield
    plugins.unregister("call-a")
    plugins.unregister("call-b")


class TestCallsOfMethods:
    def test_are_found_through_the_adapters(self, callers):
        model = get_peft_model(make_base(), lora(), "l")
        assert not hasattr(model, "ping")
        model.add_adapter("b", ConfigB(target_modules=["0"]))
        assert model.ping() == ["b", "l"]
        assert model.base_model.pong() == model.pong() == "pong"
        model.delete_adapter("b")
        assert not hasattr(model, "ping")

    def test_parts_offer_calls(self, callers):
        model = get_peft_model(make_base(), ConfigA(target_modules=["0"]))
        assert model.pang() == "pang"
        assert model.ping() == ["default"]

    @pytest.mark.parametrize("order", ["ab", "ba", "lab"])
    def test_clash(self, callers, order):
        configs = {"a": ConfigA(target_modules=["0"]), "b": ConfigB(target_modules=["2"]), "l": lora()}
        model = get_peft_model(make_base(), configs[order[0]], order[0])
        for name in order[1:]:
            model.add_adapter(name, configs[name])
        with pytest.raises(
            AdapterStateError, match="'ping' is offered by adapters of several methods, 'CALL_A', 'CALL_B'"
        ):
            model.ping()
        assert model.pong() == "pong"
        model.set_adapter("a")
        model.delete_adapter("b")
        assert "a" in model.ping()

    def test_everything_else_is_the_models(self, callers):
        tuner = LoraModel(make_base(), lora())
        tuner.model.extra = 5
        assert tuner.extra == 5
        with pytest.raises(AttributeError, match="'Sequential' object has no attribute 'nothing'"):
            tuner.nothing  # noqa: B018 - the look-up is what fails

    def test_copies_and_pickles(self):
        model = get_peft_model(make_base(), lora())
        move(model, "default")
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - our own bytes
            assert same_bits(other(X), model(X))
            other.delete_adapter("default")
        assert apart(model(X), make_base()(X))


class TestMethods:
    def test_are_those_of_the_adapters(self):
        tuner = BaseTuner(make_base(), lora())
        assert tuner.methods == {"lora"}
        tuner.peft_config["b"] = ia3()
        tuner.inject_adapter(tuner.model, "b")
        assert tuner.methods == {"lora", "ia3"}
        tuner.set_adapter("b")
        tuner.delete_adapter("adapter")
        assert tuner.methods == {"ia3"}

    def test_a_class_may_have_targets_by_the_models_type(self):
        class Targeting(BaseTuner):
            target_module_mapping = {"small": ["0"]}  # noqa: RUF012 - as PEFT's classes have it

        base = make_base()
        base.config = {"model_type": "small"}
        register("call-a", types.SimpleNamespace(method=Method(ConfigA, Scale, tuner=Targeting)))
        try:
            assert Targeting(base, ConfigA()).targeted_module_names == ["0"]
        finally:
            plugins.unregister("call-a")


def test_a_plan_changes_nothing():
    tuner = LoraModel(make_base(), lora("0"))
    before = Snapshot.of(tuner)
    assert tuner.plan(ia3("3")).adapted == ["3"]
    assert tuner.plan(lora("2"), {"3.lora_A.weight": torch.ones(2, 4)}).adapted == ["3"]
    assert before.differences(tuner) == []


class TestDelete:
    def test_last_one_gives_the_original_layers_back(self):
        base = make_base()
        layers = list(base)
        model = get_peft_model(base, lora())
        model.delete_adapter("default")
        assert all(one is other for one, other in zip(base, layers, strict=True))
        assert model.peft_config == {}
        assert model.active_adapters == []
        assert not hasattr(base, "peft_config")
        assert not isinstance(model.base_model, LoraModel)
        assert same_bits(model(X), make_base()(X))
        model.add_adapter("new", ia3())
        model.set_adapter("new")
        assert trains(model) == {"new"}

    def test_next_active_one_is_the_same_on_all_layers(self):
        model = get_peft_model(make_base(), lora("0", "2", "3"), "x")
        model.add_adapter("c", lora("0"))
        model.add_adapter("b", ia3("2", "3"))
        with pytest.warns(AdapterWarning, match="The active adapter 'x' was deleted; 'b' of 'b', 'c' is"):
            model.delete_adapter("x")
        assert model.active_adapters == ["b"]
        assert [layer.active_adapters for layer in model.base_model.layers()] == [["b"]] * 3
        assert trains(model) == {"b"}

    def test_one_of_several_active(self):
        model = get_peft_model(make_base(), lora(), "a")
        model.add_adapter("b", ia3())
        model.set_adapter(["a", "b"])
        model.set_requires_grad("b", requires_grad=False)
        model.delete_adapter("a")
        assert model.active_adapters == ["b"]
        assert trains(model) == set()
        assert not isinstance(model.base_model, LoraModel)
        assert isinstance(model.base_model, IA3Model)

    def test_inactive_one_changes_nothing_else(self):
        model = get_peft_model(make_base(), lora("0"), "a")
        model.add_adapter("b", ia3("3"))
        layer = model.get_base_model()[0]
        model.set_requires_grad("a", requires_grad=False)
        model.delete_adapter("b")
        assert model.get_base_model()[0] is layer
        assert type(model.get_base_model()[3]) is nn.Linear
        assert trains(model) == set()

    def test_module_whose_path_holds_an_entrys_name(self):
        model = get_peft_model(nn.ModuleDict({"lora_head": nn.Sequential(nn.Linear(2, 2))}), lora("lora_head.0"))
        model.delete_adapter("default")
        assert type(model.get_base_model()["lora_head"][0]) is nn.Linear

    def test_unknown(self):
        model = get_peft_model(make_base(), lora(), "german")
        with pytest.raises(
            UnknownAdapterError, match=r"The model has no adapter 'germen'; it has 'german'. Closest: 'german'."
        ):
            model.delete_adapter("germen")

    def test_merged(self):
        model = get_peft_model(make_base(), lora())
        model.merge_adapter()
        before = Snapshot.of(model)
        with pytest.raises(
            AdapterStateError, match=r"The adapter 'default' is merged.* Call unmerge_adapter\(\) before"
        ):
            model.delete_adapter("default")
        assert before.differences(model) == []


class TestWhatIsActive:
    @pytest.fixture
    def model(self):
        model = get_peft_model(make_base(), lora(), "a")
        model.add_adapter("b", ia3())
        model.add_adapter("c", lora("2", "3"))
        for name in "abc":
            move(model, name)
        return model

    def test_adding_changes_no_flag_and_nothing_active(self, model):
        assert trains(model) == {"a"}
        assert model.active_adapters == ["a"]

    def test_adding_frozen_ones_leaves_the_others(self, model):
        model.add_adapter("d", lora(inference_mode=True))
        model.add_adapter("e", ia3(inference_mode=True))
        assert trains(model) == {"a"}
        assert model.active_adapters == ["a"]

    def test_first_one_frozen(self):
        model = get_peft_model(make_base(), lora(inference_mode=True))
        assert trains(model) == set()
        assert model.active_adapters == ["default"]
        with model.disable_adapter():
            pass
        assert trains(model) == set()

    def test_set(self, model):
        model.set_adapter("b")
        assert (trains(model), model.active_adapters) == ({"b"}, ["b"])
        model.set_adapter(["c", "a", "c"])
        assert (trains(model), model.active_adapters) == ({"a", "c"}, ["c", "a"])
        model.set_adapter("b", inference_mode=True)
        assert (trains(model), model.active_adapters) == (set(), ["b"])

    def test_order_matters(self, model):
        model.set_adapter(["a", "b"])
        one = model(X)
        model.set_adapter(["b", "a"])
        assert apart(model(X), one)

    def test_set_unknown(self, model):
        before = Snapshot.of(model)
        with pytest.raises(UnknownAdapterError, match=r"The model has no adapter 'z'; it has 'a', 'b', 'c'."):
            model.set_adapter(["a", "z"])
        assert before.differences(model) == []

    def test_set_while_merged(self, model):
        base = make_base()
        model.merge_adapter()
        with pytest.warns(MergeWarning, match="Adapters were merged; they are unmerged before others become active."):
            model.set_adapter("b")
        assert same_bits(model.get_base_model()[2].base_layer.weight, base[2].weight)

    def test_set_requires_grad(self, model):
        model.set_requires_grad(["b", "unknown"])
        assert trains(model) == {"a", "b"}
        model.base_model.set_requires_grad("a", requires_grad=False)
        assert trains(model) == {"b"}
        assert model.active_adapters == ["a"]

    def test_disable_is_exact_and_leaves_no_trace(self, model):
        model.set_adapter(["a", "c"])
        model.set_requires_grad("c", requires_grad=False)
        with model.disable_adapter():  # what is set on the layers now is set there from now on
            pass
        before, output = Snapshot.of(model), model(X)
        model.base_model.disable_adapter_layers()
        assert same_bits(model(X), make_base()(X))
        assert trains(model) == set()
        model.base_model.disable_adapter_layers()
        model.base_model.enable_adapter_layers()
        model.base_model.enable_adapter_layers()
        assert before.differences(model) == []
        assert same_bits(model(X), output)

    def test_merging_changes_no_flag(self, model):
        model.merge_adapter(["a"])
        assert trains(model) == {"a"}
        model.unmerge_adapter()
        assert trains(model) == {"a"}

    def test_per_call(self, model):
        model.set_adapter(["a", "b"])
        both = model(X)
        model.set_adapter("c")
        before = Snapshot.of(model)
        with model.base_model.use_adapter(["a", "b", "a"]):
            assert same_bits(model(X), both)
        with model.use_adapter([]):
            assert same_bits(model(X), make_base()(X))
        assert before.differences(model) == []
        with pytest.raises(UnknownAdapterError), model.use_adapter("z"):
            pass
        model.merge_adapter()
        with pytest.raises(RouteError, match=r"'c' is merged into the model, so calls cannot be routed. Call unmerge"):
            model.use_adapter("a").__enter__()


class Alone(Scale):
    def together(self, others):
        return "it wants to be alone" if others else None


def test_adapters_that_cannot_stand_together():
    register("call-a", types.SimpleNamespace(method=Method(ConfigA, Alone)))
    try:
        model = get_peft_model(make_base(), ConfigA(target_modules=["0"]), "a")
        model.add_adapter("b", lora())
        before = Snapshot.of(model)
        for attempt in (model.set_adapter, lambda names: model.use_adapter(names).__enter__()):
            with pytest.raises(
                AdapterStateError, match="'a', 'b' cannot be active together on '0': it wants to be alone"
            ):
                attempt(["a", "b"])
        assert before.differences(model) == []
    finally:
        plugins.unregister("call-a")


class TestUnload:
    def test_gives_the_base_back(self):
        base = make_base()
        base[0].bias.requires_grad_(requires_grad=False)
        before = Snapshot.of(base)
        model = get_peft_model(base, lora())
        model.add_adapter("b", ia3())
        model.set_adapter(["default", "b"])
        move(model, "b")
        model.merge_adapter()
        assert model.unload() is base
        assert before.differences(base) == []

    def test_layer_that_is_the_whole_model(self):
        with pytest.raises(tunerkit.NoMatchingPeftModuleError, match="The model has none"):
            get_peft_model(nn.Linear(2, 2), lora("0"))


def test_supports_lora_conversion():
    model = get_peft_model(make_base(), lora(), "a")
    model.add_adapter("b", ia3())
    assert model.supports_lora_conversion("a")
    assert not model.base_model.supports_lora_conversion("b")
    assert not model.supports_lora_conversion()


def test_find_tuner():
    model = get_peft_model(make_base(), lora())
    assert find_tuner(model) is find_tuner(model.base_model) is model.base_model
    assert find_tuner(model.get_base_model()) is None
    assert find_tuner(nn.Sequential(make_base())) is None
    assert find_tuner(torch.compile(model, backend="eager")) is model.base_model
    assert find_tuner(torch.compile(model.base_model, backend="eager")) is model.base_model


class TestTunerOf:
    def test_the_tuner_itself(self):
        model = get_peft_model(make_base(), lora())
        for given in (model, model.base_model, torch.compile(model, backend="eager")):
            assert tuner_of(given) is tuner_of(given, adapted=True) is model.base_model

    def test_one_around_injected_adapters(self):
        model = tunerkit.inject_adapter_in_model(lora(), make_base())
        for given in (model, torch.compile(model, backend="eager")):
            assert tuner_of(given, adapted=True).model is model
            assert list(tuner_of(given).peft_config) == ["default"]

    def test_of_an_empty_model(self):
        empty = nn.Sequential()
        assert tuner_of(torch.compile(empty, backend="eager")).model is empty

    def test_no_adapters(self):
        base = make_base()
        assert tuner_of(base).model is base
        with pytest.raises(UnknownAdapterError, match=r"model \(Sequential\) has no adapters. Attach one with"):
            tuner_of(base, adapted=True)


def test_a_delete_that_fails_leaves_what_is_saved_as_it_was(monkeypatch):
    """The entries of buffers that are not saved are told by adapter, and a deleted one is no longer named there."""
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa")
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config, "one")
    model.add_adapter("two", config)
    keys = list(model.state_dict())

    def fail(*_, **__):
        raise RuntimeError

    monkeypatch.setattr("tunerkit.tuner.set_fast_paths", fail)
    with pytest.raises(RuntimeError):
        model.delete_adapter("two")
    assert list(model.state_dict()) == keys


def test_a_subclass_may_cast_in_its_own_way():
    calls = []

    class Own(LoraModel):
        def _cast_adapter_dtype(self, adapter_name, autocast_adapter_dtype=True):
            calls.append((adapter_name, autocast_adapter_dtype))

    config = LoraConfig(r=2, target_modules=["0"])
    tuner = Own(nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16)), config, "one")
    tuner.peft_config["two"] = config
    tuner.inject_adapter(tuner.model, "two", autocast_adapter_dtype=True)
    assert calls == [("one", False), ("two", True)]
    assert {parameter.dtype for parameter in tuner.model.parameters()} == {torch.bfloat16}
