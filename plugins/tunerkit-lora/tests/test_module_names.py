"""LoRA on models whose modules are called as the parts of layers with adapters are, or of compiled modules."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import tunerkit
from tunerkit import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from tunerkit.layer import tuner_layers
from tunerkit_lora import LoraConfig


class Fused(nn.Module):
    """Holds bare parameters, and layers beside them."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 4))
        self.down = nn.Parameter(torch.randn(4, 4))
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x @ self.up) @ self.down


class Holder(Fused):
    """Has a child that is called `base_layer` and holds parameters of the same names."""

    def __init__(self):
        super().__init__()
        self.base_layer = Fused()

    def forward(self, x):
        return super().forward(x) + self.base_layer(x)


class Wrapper(nn.Module):
    """Has a layer that is called `base_layer`."""

    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.base_layer(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.base_layer = nn.Embedding(10, 4)
        self.my_base_layer = nn.Linear(4, 4)
        self.base_layer_norm = nn.Linear(4, 4)
        self.wrapper = Wrapper()
        self.holder = Holder()
        self.my_orig_mod = Wrapper()
        self.my_orig_mod.add_module("_orig_mod_", nn.Linear(4, 4))

    def get_input_embeddings(self):
        return self.base_layer

    def forward(self, x):
        x = self.base_layer(x)
        for layer in (self.my_base_layer, self.base_layer_norm, self.wrapper, self.holder, self.my_orig_mod):
            x = x + torch.tanh(layer(x))
        return self.my_orig_mod._orig_mod_(x)


MODULES = [
    "base_layer",
    "my_base_layer",
    "base_layer_norm",
    "wrapper.base_layer",
    "holder.inner",
    "holder.base_layer.inner",
    "my_orig_mod.base_layer",
    "my_orig_mod._orig_mod_",
]
PARAMETERS = ["holder.up", "holder.down", "holder.base_layer.up", "holder.base_layer.down"]
TOKENS = torch.arange(10).reshape(2, 5)
# Text means the whole path, a name in a list its end.
MEANT = "|".join(map(re.escape, MODULES))
CONFIGS = {
    "modules": {"target_modules": MEANT},
    "parameters": {"target_modules": [], "target_parameters": PARAMETERS},
    "lower parameters": {"target_modules": [], "target_parameters": PARAMETERS[2:]},
    "both": {"target_modules": MEANT, "target_parameters": PARAMETERS},
}


def make():
    torch.manual_seed(0)
    return Net()


def config(kind="modules", **kwargs):
    return LoraConfig(r=2, **CONFIGS[kind], **kwargs)


def moved(model, name="default"):
    """Move an adapter's tensors at random."""
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for _, layer in tuner_layers(model):
            for tensor in layer.adapter_tensors(name).values():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


@pytest.mark.filterwarnings("ignore::tunerkit.errors.SaveWarning")
@pytest.mark.parametrize("kind", CONFIGS)
class TestOneAdapter:
    def test_what_is_adapted(self, kind):
        tuner = get_peft_model(make(), config(kind)).base_model
        assert sorted(tuner.targeted_parameter_names) == sorted(CONFIGS[kind].get("target_parameters", []))
        assert len(list(tuner.layers())) == len(MODULES) * (kind in ("modules", "both")) + len(
            CONFIGS[kind].get("target_parameters", ())
        )

    def test_each_site_holds_its_own_parameter(self, kind):
        base = make()
        own = {id(parameter): name for name, parameter in base.named_parameters()}
        tuner = get_peft_model(base, config(kind)).base_model
        held = {own[id(layer.site.stored)] for layer in tuner.layers() if layer.parameter_name is not None}
        assert held == set(tuner.targeted_parameter_names)

    def test_saved_and_loaded(self, kind, tmp_path):
        model = moved(get_peft_model(make(), config(kind)))
        assert (model(TOKENS) - make()(TOKENS)).abs().max() > 1e-3
        model.save_pretrained(tmp_path)
        other = PeftModel.from_pretrained(make(), tmp_path)
        assert torch.equal(other(TOKENS), model(TOKENS))

    def test_merged_and_unmerged(self, kind):
        model = moved(get_peft_model(make(), config(kind)))
        before = model(TOKENS)
        model.merge_adapter()
        torch.testing.assert_close(model(TOKENS), before)
        model.unmerge_adapter()
        assert torch.equal(model(TOKENS), before)
        torch.testing.assert_close(model.merge_and_unload()(TOKENS), before)

    def test_unloaded(self, kind):
        base, plain = make(), make()
        modules = {name: type(module) for name, module in base.named_modules()}
        model = moved(get_peft_model(base, config(kind)))
        assert model.unload() is base
        assert {name: type(module) for name, module in base.named_modules()} == modules
        assert torch.equal(base(TOKENS), plain(TOKENS))

    def test_swapped(self, kind, tmp_path):
        source = moved(get_peft_model(make(), config(kind)))
        source.save_pretrained(tmp_path)
        model = get_peft_model(make(), config(kind))
        tunerkit.hotswap_adapter(model, tmp_path, "default")
        assert torch.equal(model(TOKENS), source(TOKENS))

    def test_the_base_model_s_state(self, kind):
        model = get_peft_model(make(), config(kind))
        assert set(tunerkit.get_base_model_state_dict(model)) == set(make().state_dict())


@pytest.mark.filterwarnings("ignore::tunerkit.errors.SaveWarning")
class TestKeys:
    def test_they_are_those_of_the_modules(self):
        keys = get_peft_model_state_dict(get_peft_model(make(), config()))
        paths = {key.rpartition(".lora_")[0].removeprefix("base_model.model.") for key in keys}
        assert paths == set(MODULES)

    @pytest.mark.parametrize("target", MODULES)
    def test_they_say_where_the_adapter_goes(self, target):
        model = moved(get_peft_model(make(), LoraConfig(r=2, target_modules=re.escape(target))))
        state = get_peft_model_state_dict(model)
        other = inject_adapter_in_model(config(), make(), state_dict=state)
        assert [path for path, _ in tuner_layers(other)] == [target]

    def test_embeddings_saved_beside_the_adapter(self, tmp_path):
        model = moved(get_peft_model(make(), LoraConfig(r=2, target_modules=["base_layer_norm"])))
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(2)
        model.save_pretrained(tmp_path, save_embedding_layers=True)
        other = PeftModel.from_pretrained(make(), tmp_path)
        assert torch.equal(other(TOKENS), model(TOKENS))

    def test_adapted_embeddings_saved_beside_the_adapter(self, tmp_path):
        model = moved(get_peft_model(make(), config()))
        with torch.no_grad():
            model.get_input_embeddings().base_layer.weight.mul_(2)
        model.save_pretrained(tmp_path, save_embedding_layers=True)
        other = PeftModel.from_pretrained(make(), tmp_path)
        assert torch.equal(other(TOKENS), model(TOKENS))


class TestSeveralAdapters:
    @pytest.mark.parametrize("beside", [None, {"target_modules": [], "target_parameters": ["holder.up"]}])
    def test_combined(self, beside):
        base = make()
        model = get_peft_model(base, LoraConfig(r=2, target_modules=MEANT), "one")
        # The targets are given in two ways, so those of the new adapter follow from the layers.
        model.add_adapter("two", LoraConfig(r=2, target_modules=["my_base_layer", "base_layer_norm"]))
        if beside is not None:
            model.add_adapter("beside", LoraConfig(r=2, **beside))
        for name in ("one", "two"):
            moved(model, name)
        model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "both", combination_type="cat")
        names = [set(layer.available_adapters) for layer in model.base_model.layers()]
        assert [found for found in names if ("both" in found) != ("one" in found)] == []

    @pytest.mark.parametrize("first", [PARAMETERS[:1], PARAMETERS[2:3]])
    def test_parameters_of_one_module(self, first):
        model = get_peft_model(make(), LoraConfig(r=2, target_modules=[], target_parameters=first), "one")
        model.add_adapter("two", LoraConfig(r=2, target_modules=[], target_parameters=PARAMETERS))
        assert sorted(model.base_model.targeted_parameter_names) == sorted(PARAMETERS)
        model.set_adapter("two")
        model.delete_adapter("one")
        moved(model, "two")
        keys = get_peft_model_state_dict(model, adapter_name="two").keys()
        alone = get_peft_model(make(), config("parameters"), "two")
        assert keys == get_peft_model_state_dict(alone, adapter_name="two").keys()


@pytest.fixture(params=["wrapped", "in place", "a part"])
def compiled(request):
    """Compile a model, or a part of it."""

    def compile_it(model):
        if request.param == "wrapped":
            return torch.compile(model, backend="eager")
        if request.param == "in place":
            model.compile(backend="eager")
            return model
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        inner.holder = torch.compile(inner.holder, backend="eager")
        return model

    return compile_it


class TestCompiled:
    @pytest.mark.parametrize("kind", CONFIGS)
    @pytest.mark.parametrize("injected", [False, True])
    def test_keys_are_as_before(self, compiled, kind, injected):
        model = inject_adapter_in_model(config(kind), make()) if injected else get_peft_model(make(), config(kind))
        moved(model)
        before = get_peft_model_state_dict(model, save_embedding_layers=False)
        now = get_peft_model_state_dict(compiled(model), save_embedding_layers=False)
        assert before.keys() == now.keys()
        assert all(torch.equal(now[key], tensor) for key, tensor in before.items())

    @pytest.mark.parametrize("injected", [False, True])
    def test_acts_on_the_same_layers(self, compiled, injected):
        plain = inject_adapter_in_model(config(), make()) if injected else get_peft_model(make(), config())
        model = compiled(plain)
        tunerkit.set_requires_grad(model, "default", requires_grad=False)
        assert not any(key for key, tensor in plain.named_parameters() if "lora_" in key and tensor.requires_grad)
        status = tunerkit.get_model_status(model)
        assert status.adapter_model_type == ("None" if injected else "LoraModel")
        assert status.base_model_type == "Net"
        assert status.num_adapter_layers == len(MODULES)
        tunerkit.delete_adapter(model, "default")
        assert not list(tuner_layers(plain))
