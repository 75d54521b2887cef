from __future__ import annotations

import types
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import tunerkit
from tunerkit import (
    BaseTuner,
    BaseTunerLayer,
    Method,
    PeftConfig,
    cast_adapter_dtype,
    get_peft_model,
    hookimpl,
    plugins,
    register,
)
from tunerkit.adapted_layer import AdaptedLayer
from tunerkit.adapter import Adapter, Part
from tunerkit.errors import PluginError, UnknownMethodError, UnsupportedSiteError
from tunerkit.testing.bench import Snapshot
from tunerkit_lora import LoraConfig


@dataclass
class AttachConfig(PeftConfig):
    peft_type: str | None = "ATTACH_TOY"
    target_modules: list[str] | set[str] | str | None = None


class Scale(Adapter):
    entries = ("toy_scale",)

    def __init__(self, site, config):
        super().__init__(site, config)
        self.toy_scale = nn.Parameter(site.ones(1))

    def merged(self, below):
        return below.weight * self.toy_scale, below.bias


class Hand(nn.Module, BaseTunerLayer):
    adapter_layer_names = ("toy_hand",)

    def __init__(self, base_layer, name):
        super().__init__()
        self.base_layer = base_layer
        self.toy_hand = nn.ParameterDict({name: nn.Parameter(torch.ones(1))})
        self._active_adapter = [name]

    def forward(self, x):
        y = self.base_layer(x)
        if self.disable_adapters:
            return y
        for name in self.active_adapters:
            y = y * self.toy_hand[name]
        return y


def replace(parent, target_name, target, adapter_name):
    layer = Hand(target, adapter_name)
    setattr(parent, target_name, layer)
    return layer


@pytest.fixture
def offer():
    def offer(hook=None, adapter=Scale, part=None, tuner=None):
        hooks = {} if hook is None else {"_create_and_replace": hookimpl(hook)}
        register("attach-toy", types.SimpleNamespace(method=Method(AttachConfig, adapter, part, tuner), **hooks))
        return AttachConfig(target_modules=["0", "2"])

    yield offer
    plugins.unregister("attach-toy")


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def refusal(model, config, error=PluginError):
    before = Snapshot.of(model)
    with pytest.raises(error) as caught:
        get_peft_model(model, config)
    assert before.differences(model) == []
    return str(caught.value)


class TestHooksMayReturn:
    def test_an_adapter(self, model, offer):
        def hook(peft_config, target, current_key):
            site = tunerkit.sites.make_site(target, current_key)
            return Scale(site, peft_config)

        get_peft_model(model, offer(hook))
        assert type(model[0]) is type(model[2]) is AdaptedLayer
        assert type(model[0].adapters["default"]) is Scale

    def test_the_new_module(self, model, offer):
        linear = model[0]

        def hook(parent, target_name, target, adapter_name):
            return replace(parent, target_name, target, adapter_name)

        peft = get_peft_model(model, offer(hook))
        assert type(model[0]) is Hand
        assert model[0].base_layer is linear
        assert [name for name, p in peft.named_parameters() if p.requires_grad] == [
            "base_model.model.0.toy_hand.default",
            "base_model.model.2.toy_hand.default",
        ]
        assert peft.unload()[0] is linear

    def test_the_layer_that_was_there_with_the_adapter_added(self, model, offer):
        def hook(parent, target_name, target, adapter_name):
            if isinstance(target, Hand):
                target.toy_hand[adapter_name] = nn.Parameter(torch.ones(1))
                return target
            return replace(parent, target_name, target, adapter_name)

        config = offer(hook)
        peft = get_peft_model(model, config)
        peft.add_adapter("b", config)
        assert model[0].available_adapters == ["b", "default"]
        assert not model[0].toy_hand["b"].requires_grad


class TestHooksMustNotReturn:
    def test_none_with_nothing_replaced(self, model, offer):
        assert refusal(model, offer(lambda target: None)) == (
            "_create_and_replace of 'attach-toy' returned None for the module '0' and replaced nothing. It must "
            "return an "
            "Adapter, or put a layer that is a BaseTunerLayer and holds the adapter in the module's place and "
            "return that."
        )

    def test_none_with_something_replaced(self, model, offer):
        def hook(parent, target_name, target, adapter_name):
            replace(parent, target_name, target, adapter_name)

        message = refusal(model, offer(hook))
        assert message == (
            "The hook _create_and_replace of 'attach-toy' replaced the module '0' and returned None. Return the "
            "new module, so "
            "that the core knows the replacing was meant."
        )

    def test_an_adapter_after_replacing(self, model, offer):
        def hook(parent, target_name, target, adapter_name, peft_config, current_key):
            replace(parent, target_name, target, adapter_name)
            return Scale(tunerkit.sites.make_site(target, current_key), peft_config)

        message = refusal(model, offer(hook))
        assert message.startswith(
            "The plugin of 'attach-toy' replaced the module '0' and also returned an Adapter for it, so"
        )
        assert message.endswith("Return the new module, or leave the replacing to the core.")

    @pytest.mark.parametrize("returned", [True, "yes", nn.Identity()])
    def test_anything_else(self, model, offer, returned):
        assert f"returned {returned!r} for the module '0' and replaced nothing" in refusal(
            model, offer(lambda target: returned)
        )

    def test_a_module_without_the_adapter(self, model, offer):
        def hook(parent, target_name):
            parent[int(target_name)] = nn.Identity()
            return parent[int(target_name)]

        assert "replaced it by a Identity without an adapter 'default'" in refusal(model, offer(hook))

    def test_an_error(self, model, offer):
        def hook(target, parent, target_name, adapter_name):
            target.weight = None
            target.extra = 1
            replace(parent, target_name, target, adapter_name)
            raise KeyError("lost")

        assert refusal(model, offer(hook), KeyError) == "'lost'"
        assert not hasattr(model[0], "extra")

    def test_adapter_on_a_module_without_site(self, model, offer):
        def hook(peft_config, target):
            return Scale(tunerkit.sites.make_site(model[0]), peft_config)

        config = offer(hook)
        config.target_modules = {"1"}
        message = refusal(model, config, UnsupportedSiteError)
        assert message.startswith(
            "The module '1' is a ReLU, for which there is no site, so an Adapter cannot stand on it."
        )

    def test_nothing_to_make_adapters_with(self, model):
        hooks = tunerkit.defaults.DefaultHooks("attach-toy", Method(AttachConfig))
        with pytest.raises(
            UnsupportedSiteError, match="The plugin of 'attach-toy' declares no adapter class and no _create"
        ):
            hooks._create_and_replace(AttachConfig(), model[0], "0", None)

    def test_entry_that_is_not_declared(self, model, offer):
        class Undeclared(Scale):
            def __init__(self, site, config):
                super().__init__(site, config)
                self.more = nn.Linear(2, 2)

        message = refusal(model, offer(adapter=Undeclared))
        assert message.startswith(
            "The adapter class Undeclared of 'attach-toy' holds tensors under 'more', which its `entries`"
        )

    @pytest.mark.parametrize(
        ("setting", "hint"), [("scael", "Did you mean 'scale'?"), ("speed", "Set it in `__init__`.")]
    )
    def test_setting_that_is_not_there(self, setting, hint, model, offer):
        class Misspelt(Scale):
            settings = (setting,)

            def __init__(self, site, config):
                super().__init__(site, config)
                self.scale = 2.0

        before = Snapshot.of(model)
        assert refusal(model, offer(adapter=Misspelt)) == (
            f"The adapter class Misspelt of 'attach-toy' names {setting!r} in its `settings`, and the adapter has no "
            f"such attribute. {hint}"
        )
        assert before.differences(model) == []


class TestOverriding:
    """Methods of a subclass of `BaseTuner`, as PEFT's documentation teaches; they need not return what they did."""

    @staticmethod
    def tuner(returned):
        class Tuner(BaseTuner, method="attach-toy"):
            def _prepare_adapter_config(self, peft_config, model_config):
                peft_config.target_modules = {"0"}
                return peft_config

            def _check_target_module_exists(self, peft_config, key):
                return key in peft_config.target_modules

            def _create_and_replace(
                self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
            ):
                if returned != "nothing done":
                    replace(parent, target_name, target, adapter_name)
                return None if returned == "nothing done" else returned

        return Tuner

    @pytest.mark.parametrize("returned", [None, True])
    def test_may_return_none_or_true(self, model, offer, returned):
        config = offer(tuner=self.tuner(returned))
        peft = get_peft_model(model, config)
        assert type(model[0]) is Hand
        assert type(model[2]) is nn.Linear
        assert config.target_modules == {"0", "2"}
        assert isinstance(peft.base_model, plugins.get_method("attach-toy").method.tuner)

    def test_without_a_registered_method(self, model):
        config = AttachConfig()
        tuner = self.tuner(None)(model, config)
        assert tuner.targeted_module_names == ["0"]
        assert tuner.active_adapters == ["adapter"]

    def test_class_that_says_no_method(self, model):
        class Plain(BaseTuner):
            _prepare_adapter_config = self.tuner(None)._prepare_adapter_config
            _check_target_module_exists = self.tuner(None)._check_target_module_exists
            _create_and_replace = self.tuner(None)._create_and_replace

        tuner = Plain(model, AttachConfig())
        assert type(model[0]) is Hand
        tuner.peft_config["b"] = LoraConfig(target_modules=["2"])
        tuner.inject_adapter(model, "b")
        assert type(model[2]) is AdaptedLayer
        tuner.delete_adapter("b")
        tuner.delete_adapter("adapter")
        assert type(model[0]) is type(model[2]) is nn.Linear

    def test_doing_nothing_is_seen(self, model, offer):
        message = refusal(model, offer(tuner=self.tuner("nothing done")))
        assert "returned None for the module '0' and replaced nothing" in message

    def test_unknown_method_without_overriding(self, model):
        with pytest.raises(UnknownMethodError, match="tunerkit-attach-toy"):
            BaseTuner(model, AttachConfig(target_modules=["0"]))

    def test_other_methods_beside_it(self, model, offer):
        peft = get_peft_model(model, offer(tuner=self.tuner(None)))
        peft.add_adapter("b", LoraConfig(target_modules=["2"]))
        assert type(model[2]) is AdaptedLayer


class Shared(Part):
    entries = ("toy_shared", "toy_fixed")

    def __init__(self, sites, config):
        super().__init__(sites, config)
        self.sites = [site.name for site in sites]
        self.toy_shared = nn.Parameter(sites[0].zeros(2))
        self.register_parameter("toy_fixed", nn.Parameter(sites[0].zeros(1), requires_grad=False))


class TestParts:
    def test_is_made_from_all_sites_before_the_adapters(self, model, offer):
        peft = get_peft_model(model, offer(part=Shared))
        part = peft.base_model.parts["default"]
        assert part.sites == ["0", "2"]
        assert model[0].adapters["default"].part is model[2].adapters["default"].part is part
        assert peft.base_model.toy_shared["default"] is part.toy_shared
        assert part.toy_shared.requires_grad
        assert not part.toy_fixed.requires_grad

    def test_second_adapter_has_its_own(self, model, offer):
        config = offer(part=Shared)
        peft = get_peft_model(model, config)
        peft.add_adapter("b", config)
        assert peft.base_model.parts["b"] is not peft.base_model.parts["default"]
        assert not peft.base_model.parts["b"].toy_shared.requires_grad
        peft.set_adapter("b")
        assert peft.base_model.parts["b"].toy_shared.requires_grad
        assert not peft.base_model.parts["b"].toy_fixed.requires_grad
        assert not peft.base_model.parts["default"].toy_shared.requires_grad
        peft.set_requires_grad("default")
        assert peft.base_model.parts["default"].toy_shared.requires_grad
        peft.set_adapter("default")
        peft.delete_adapter("b")
        assert list(peft.base_model.parts) == ["default"]
        assert list(peft.base_model.toy_shared.keys()) == ["default"]

    def test_on_the_meta_device(self, model, offer):
        peft = get_peft_model(model, offer(part=Shared), low_cpu_mem_usage=True)
        assert peft.base_model.parts["default"].toy_shared.is_meta

    def test_stands_around_the_call(self, model, offer, monkeypatch):
        peft = get_peft_model(model, offer(part=Shared))
        calls = []
        monkeypatch.setattr(
            Shared, "around", lambda self, call, *a, **k: (calls.append(a), call(*a, **k))[1], raising=False
        )
        x = torch.ones(1, 3)
        peft(x)
        assert calls == [(x,)]
        with peft.disable_adapter():
            peft(x)
        with peft.use_adapter([]):
            peft(x)
        assert len(calls) == 1

    def test_what_an_adapter_makes_as_it_joins_is_treated_as_the_rest(self, model, offer):
        class Joined(Scale):
            def join(self, part):
                super().join(part)
                self.toy_scale = nn.Parameter(part.toy_shared.detach()[:1].to(torch.bfloat16))

        config = offer(adapter=Joined, part=Shared)
        peft = get_peft_model(model, config)
        peft.add_adapter("b", config)
        assert [model[0].toy_scale[name].dtype for name in ("default", "b")] == [torch.float32, torch.float32]
        assert [model[0].toy_scale[name].requires_grad for name in ("default", "b")] == [True, False]

    def test_follows_the_mode(self, model, offer):
        peft = get_peft_model(model, offer(part=Shared))
        peft.eval()
        assert not peft.base_model.parts["default"].training
        assert not model[0].adapters["default"].training
        peft.train()
        assert peft.base_model.parts["default"].training


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_low_precision_becomes_float32(self, model, dtype):
        get_peft_model(model.to(dtype), LoraConfig(target_modules=["0"]))
        assert {tensor.dtype for tensor in model[0].adapter_tensors("default").values()} == {torch.float32}
        assert model[0].weight.dtype == dtype

    def test_can_be_left_out(self, model):
        peft = get_peft_model(model.bfloat16(), LoraConfig(target_modules=["0"]), autocast_adapter_dtype=False)
        peft.add_adapter("b", LoraConfig(target_modules=["0"]), autocast_adapter_dtype=False)
        peft.add_adapter("c", LoraConfig(target_modules=["0"]))
        dtypes = {n: {t.dtype for t in model[0].adapter_tensors(n).values()} for n in ("default", "b", "c")}
        assert dtypes == {"default": {torch.bfloat16}, "b": {torch.bfloat16}, "c": {torch.float32}}
        cast_adapter_dtype(model, "b", autocast_adapter_dtype=False)
        assert model[0].lora_A["b"].weight.dtype == torch.bfloat16
        cast_adapter_dtype(peft, "b")
        assert model[0].lora_A["b"].weight.dtype == torch.float32
        assert model[0].lora_A["default"].weight.dtype == torch.bfloat16

    def test_double_stays(self, model):
        get_peft_model(model.double(), LoraConfig(target_modules=["0"]))
        assert model[0].lora_A["default"].weight.dtype == torch.float64

    def test_a_tuner_made_as_in_peft(self, model, offer):
        class Tuner(BaseTuner, method="attach-toy"):
            def __init__(self, model, peft_config, adapter_name, low_cpu_mem_usage=False, state_dict=None):
                super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict)

        get_peft_model(model.bfloat16(), offer(tuner=Tuner))
        assert model[0].toy_scale["default"].dtype == torch.float32

    @pytest.mark.parametrize(
        ("asked", "dtype"), [({}, torch.bfloat16), ({"autocast_adapter_dtype": True}, torch.float32)]
    )
    def test_a_tuner_by_itself(self, model, asked, dtype):
        BaseTuner(model.bfloat16(), LoraConfig(target_modules=["0"]), **asked)
        assert model[0].lora_A["adapter"].weight.dtype == dtype
