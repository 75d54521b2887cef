"""What is done to all layers of a model at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tunerkit
from tunerkit.errors import AdapterNameError, AdapterStateError, MergeError, RouteError, UnknownAdapterError
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoraConfig


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)

    def forward(self, x, *, again):
        for layer in (self.a, self.b):
            if again:
                x = checkpoint(lambda z, layer=layer: torch.tanh(layer(z)), x, use_reentrant=False)
            else:
                x = torch.tanh(layer(x))
        return x


def moved(base, **configs):
    """Return a model with adapters whose tensors were moved at random."""
    (first, config), *others = configs.items()
    model = tunerkit.get_peft_model(base, config, first)
    for name, other in others:
        model.add_adapter(name, other)
    with torch.no_grad():
        for layer in model.base_model.layers():
            for name in layer.available_adapters:
                for tensor in layer.trainable_tensors(name):
                    tensor.normal_()
    return model


class TestRoutesAndCheckpointing:
    @pytest.mark.parametrize("call", ["model", "base model"])
    def test_a_routed_call_and_one_that_is_not_in_one_backward(self, call):
        found = []
        for again in (True, False):
            torch.manual_seed(1)
            model = moved(Net(), one=LoraConfig(target_modules=["a", "b"]), two=LoraConfig(target_modules=["a", "b"]))
            model.set_requires_grad(["one", "two"])
            x = torch.randn(2, 4, requires_grad=True)
            with model.use_adapter("two"):
                y = (model if call == "model" else model.get_base_model())(x, again=again)
            (y.sum() + model(x, again=again).sum()).backward()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            found.append({**gradients, "x": x.grad})
        assert found[0].keys() == found[1].keys()
        assert len(found[0]) == 9
        for name, gradient in found[0].items():
            torch.testing.assert_close(gradient, found[1][name])

    def test_a_backward_within_another_route(self):
        found = []
        for again in (True, False):
            torch.manual_seed(2)
            model = moved(Net(), one=LoraConfig(target_modules=["a"]), two=LoraConfig(target_modules=["a"]))
            x = torch.randn(2, 4, requires_grad=True)
            y = model(x, again=again)
            with model.use_adapter("two"):
                y.sum().backward()
            found.append(x.grad)
        torch.testing.assert_close(*found)

    def test_layers_that_differ_from_the_model(self):
        found = []
        for again in (True, False):
            torch.manual_seed(3)
            model = moved(Net(), one=LoraConfig(target_modules=["a"]), two=LoraConfig(target_modules=["a"]))
            for layer in model.base_model.layers():
                layer.set_adapter("two")
            x = torch.randn(2, 4, requires_grad=True)
            model(x, again=again).sum().backward()
            found.append(x.grad)
        torch.testing.assert_close(*found)

    def test_a_part_called_by_itself(self):
        class Scored(Net):
            def score(self, x, *, again):
                return Net.forward(self, x, again=again)

        model = moved(Scored(), one=LoraConfig(target_modules=["a"]), two=LoraConfig(target_modules=["a"]))
        x = torch.randn(2, 4, requires_grad=True)
        with model.use_adapter("two"):
            two = model.score(x, again=False)
            message = r"A part of the model was called by itself with the adapters \['two'\] and with gradient check"
            with pytest.raises(RouteError, match=message):
                model.score(x, again=True)
            with torch.no_grad():
                assert torch.equal(model.score(x, again=True), two)
        model.set_adapter("two")
        assert torch.equal(model.score(x, again=True), two)

    def test_no_hook_is_left(self):
        model = moved(Net(), one=LoraConfig(target_modules=["a"]))
        with pytest.raises(ZeroDivisionError), model.use_adapter([]):
            raise ZeroDivisionError
        assert not model.get_base_model()._forward_hooks


class TestState:
    def test_what_a_user_froze_stays_frozen(self):
        model = moved(Net(), one=LoraConfig(target_modules=["a"]))
        frozen = model.get_base_model().a.lora_A["one"].weight
        frozen.requires_grad = False
        with model.disable_adapter():
            assert not any(p.requires_grad for p in model.parameters())
        assert [name for name, p in model.named_parameters() if p.requires_grad] == [
            "base_model.model.a.lora_B.one.weight"
        ]

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            ([], "set_adapter got no name; the model has 'one'. To run the base model use disable_adapter()."),
            (
                None,
                "The adapter is given by its name, or by a list of names; it is None of type NoneType. The model has",
            ),
            (3, "The adapter is given by its name, or by a list of names; it is 3 of type int. The model has 'one'."),
        ],
    )
    def test_no_name(self, names, message):
        model = moved(Net(), one=LoraConfig(target_modules=["a"]))
        with pytest.raises(AdapterNameError) as error:
            model.set_adapter(names)
        assert str(error.value).startswith(message)
        assert model.active_adapters == ["one"]

    def test_targeted_names_are_those_of_now(self):
        model = moved(
            Net(), one=LoraConfig(target_modules=["a"]), two=IA3Config(target_modules=["b"], feedforward_modules=[])
        )
        assert model.targeted_module_names == ["a", "b"]
        model.delete_adapter("two")
        assert model.targeted_module_names == ["a"]

    def test_nothing_is_left_after_unload(self, tmp_path):
        model = moved(Net(), one=LoraConfig(target_modules=["a"]))
        model.unload()
        assert model.peft_config == {}
        assert model.active_adapters == []
        with pytest.raises(UnknownAdapterError, match="The model has no adapter to save"):
            model.save_pretrained(tmp_path)

    def test_a_second_model_on_one_base(self):
        model = moved(Net(), one=LoraConfig(target_modules=["a"]))
        with pytest.raises(
            AdapterStateError, match="has the adapters 'one' already, of which a second PeftModel would"
        ):
            tunerkit.get_peft_model(model.get_base_model(), LoraConfig(target_modules=["a"]), "two")
        with pytest.raises(AdapterStateError, match=r"Call add_adapter\('two', config\) on it"):
            tunerkit.inject_adapter_in_model(LoraConfig(target_modules=["a"]), model, "two")
        assert model.active_adapters == ["one"]

    def test_a_layer_that_was_copied_by_itself_follows_the_route(self):
        import copy

        model = moved(nn.Sequential(nn.Linear(4, 4)), one=LoraConfig(target_modules=["0"]))
        base = model.get_base_model()
        base.append(copy.deepcopy(base[0]))
        x = torch.randn(2, 4)
        with model.use_adapter([]):
            assert torch.equal(model(x), base[1].base_layer(base[0].base_layer(x)))


class TestSharedModules:
    def test_merging_into_one_of_two_places_is_refused(self):
        shared = nn.Linear(4, 4)
        model = moved(nn.Sequential(shared, nn.ReLU(), shared), one=LoraConfig(target_modules=["0"]))
        weight = shared.weight
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(
                MergeError, match="The module at '0' also stands at '2', where other adapters apply or none"
            ):
                merge()
        assert shared.weight is weight

    def test_merging_into_both_places(self):
        shared = nn.Linear(4, 4)
        model = moved(nn.Sequential(shared, nn.ReLU(), shared), one=LoraConfig(target_modules=["0", "2"]))
        x, weight = torch.randn(2, 4), shared.weight
        y = model(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), y)
        model.unmerge_adapter()
        assert shared.weight is weight
        assert torch.equal(model(x), y)
