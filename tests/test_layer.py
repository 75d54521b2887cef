from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tunerkit.adapted_layer import AdaptedLayer
from tunerkit.adapter import Adapter
from tunerkit.errors import AdapterStateError, AdapterWarning, MergeError
from tunerkit.layer import BaseTunerLayer, original, stack_at, tuner_layers
from tunerkit.route import Owner
from tunerkit.sites import make_site


class ToyLayer(BaseTunerLayer, method="toy"):
    """A layer is one exactly while it holds a toy adapter."""


class OtherLayer(BaseTunerLayer, method="other-toy"):
    pass


class Toy(Adapter):
    entries = ("toy_scale", "toy_fixed")

    def __init__(self, site, config):
        super().__init__(site, config)
        self.toy_scale = nn.Parameter(site.normal(site.out_features))
        self.toy_fixed = nn.Parameter(site.ones(1), requires_grad=False)

    def merged(self, below):
        return below.weight * self.toy_scale[:, None], below.bias


class Written(nn.Module, BaseTunerLayer):
    """A layer written by hand in the way of PEFT's, with containers of every kind."""

    adapter_layer_names = ("hand_A", "hand_vector")
    other_param_names = ("hand_alpha", "hand_seen", "hand_never_made")

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.hand_A = nn.ModuleDict({})
        self.hand_vector = nn.ParameterDict({})
        self.hand_alpha = {}
        self.hand_seen = nn.ParameterDict({})
        self._active_adapter = "default"
        self.merged_adapters = []

    def update_layer(self, name):
        self.hand_A[name] = nn.Sequential(
            nn.Linear(self.base_layer.in_features, 2), nn.BatchNorm1d(2), nn.Linear(2, self.base_layer.out_features)
        )
        self.hand_vector[name] = nn.Parameter(torch.ones(self.base_layer.out_features))
        self.hand_alpha[name] = 2.0
        self.hand_seen[name] = nn.Parameter(torch.zeros(1, dtype=torch.int64), requires_grad=False)
        self.set_adapter(self.active_adapters)

    def forward(self, x):
        y = self.base_layer(x)
        for name in () if self.disable_adapters else self.active_adapters:
            if name in self.hand_A:
                y = y + self.hand_alpha[name] * self.hand_A[name](x) * self.hand_vector[name]
        return y


class Renamed(nn.Module, BaseTunerLayer):
    """A layer whose base layer has another name."""

    base_name = "inner"

    def __init__(self, inner):
        super().__init__()
        self.inner = inner


class Refusing(Written):
    """A layer that has something against what it is asked for."""

    def check_together(self, names):
        if len(names) > 1:
            raise AdapterStateError("one at a time")

    def check_merge(self, names):
        raise MergeError("never")


class WrittenToy(Written, ToyLayer):
    pass


class WrittenWithMethod(Written, method="third-toy"):
    pass


def adapted(*names, method="toy"):
    layer = AdaptedLayer(make_site(nn.Linear(4, 3), "fc"), Owner())
    for name in names:
        layer.add_adapter(name, Toy(layer.bare_site, None), method)
        layer.set_requires_grad(name, requires_grad=False)
    return layer


def written(*names, kind=Written):
    layer = kind(nn.Linear(4, 3))
    for name in names:
        layer.update_layer(name)
        layer.set_requires_grad(name, requires_grad=False)
    return layer


@pytest.fixture(params=[adapted, written])
def layer(request):
    """A layer with three adapters, none of which trains, and the first of which is active."""
    layer = request.param("a", "b", "c")
    layer._activate(["a"])
    return layer


def trained(layer):
    return [name for name in layer.available_adapters if any(t.requires_grad for t in layer.trainable_tensors(name))]


class TestThreeStates:
    def test_what_is_there(self, layer):
        assert layer.available_adapters == ["a", "b", "c"]
        assert layer.active_adapters == ["a"]
        assert layer.active_adapter == ["a"]
        assert not layer.disable_adapters
        assert not layer.merged
        assert list(layer.merged_adapters) == []
        assert layer.is_pluggable

    def test_what_it_holds(self, layer):
        assert layer.holds("b")
        assert not layer.holds("missing")

    def test_set_adapter(self, layer):
        layer.set_adapter("b")
        assert (layer.active_adapters, trained(layer)) == (["b"], ["b"])
        layer.set_adapter(["c", "a"])
        assert (layer.active_adapters, trained(layer)) == (["c", "a"], ["a", "c"])
        layer.set_adapter("b", inference_mode=True)
        assert (layer.active_adapters, trained(layer)) == (["b"], [])
        layer.set_adapter(["missing", "a"])
        assert (layer.active_adapters, trained(layer)) == (["missing", "a"], ["a"])

    def test_set_adapter_keeps_a_list_of_its_own(self, layer):
        names = ["a", "b"]
        layer.set_adapter(names)
        names.append("c")
        layer.active_adapters.append("c")
        assert layer.active_adapters == ["a", "b"]

    def test_set_requires_grad(self, layer):
        layer.set_requires_grad("b")
        assert (layer.active_adapters, trained(layer)) == (["a"], ["b"])
        layer.set_requires_grad(["a", "c", "missing"])
        assert trained(layer) == ["a", "b", "c"]
        layer.set_requires_grad(["a", "b"], requires_grad=False)
        assert trained(layer) == ["c"]

    def test_switching_off_and_on(self, layer):
        layer.set_adapter("a")
        layer.set_requires_grad("c")
        layer.enable_adapters(enabled=False)
        assert layer.disable_adapters
        assert trained(layer) == []
        layer.enable_adapters(enabled=False)
        layer.enable_adapters(enabled=True)
        assert not layer.disable_adapters
        assert trained(layer) == ["a", "c"]
        layer.enable_adapters(enabled=True)
        assert trained(layer) == ["a", "c"]

    def test_what_did_not_train_does_not_train_after_a_pause(self, layer):
        layer.set_adapter("a", inference_mode=True)
        layer.enable_adapters(enabled=False)
        layer.enable_adapters(enabled=True)
        assert trained(layer) == []
        assert layer.active_adapters == ["a"]

    def test_set_adapter_during_a_pause(self, layer):
        layer.set_adapter("a")
        layer.enable_adapters(enabled=False)
        layer.set_adapter("b")
        assert (layer.active_adapters, trained(layer)) == (["b"], [])
        layer.enable_adapters(enabled=True)
        assert (layer.active_adapters, trained(layer)) == (["b"], ["b"])
        layer.enable_adapters(enabled=False)
        layer.set_adapter("c", inference_mode=True)
        layer.enable_adapters(enabled=True)
        assert trained(layer) == []

    def test_deleted_during_a_pause(self, layer):
        layer.set_adapter("a")
        layer.set_requires_grad("b")
        layer.enable_adapters(enabled=False)
        layer.delete_adapter("b")
        layer.enable_adapters(enabled=True)
        assert trained(layer) == ["a"]

    def test_off_is_the_base_layer(self, layer):
        x = torch.randn(5, 4)
        on = layer(x)
        layer.enable_adapters(enabled=False)
        assert torch.equal(layer(x), layer.base_layer(x))
        layer.enable_adapters(enabled=True)
        assert torch.equal(layer(x), on)
        assert not torch.equal(on, layer.base_layer(x))


class TestDeleting:
    def test_one_that_is_not_active(self, layer):
        layer.set_adapter("a")
        layer.delete_adapter("c")
        assert layer.available_adapters == ["a", "b"]
        assert (layer.active_adapters, trained(layer)) == (["a"], ["a"])
        assert layer.adapter_tensors("c") == {}
        assert list(layer.trainable_tensors("c")) == []

    def test_one_of_several_active(self, layer):
        layer.set_adapter(["c", "a"], inference_mode=True)
        layer.delete_adapter("c")
        assert (layer.active_adapters, trained(layer)) == (["a"], [])

    def test_the_only_active_one(self, layer):
        layer.set_adapter("b")
        with pytest.warns(AdapterWarning, match="The active adapter 'b' was deleted; 'a' of 'a', 'c' is active now."):
            layer.delete_adapter("b")
        assert (layer.active_adapters, trained(layer)) == (["a"], ["a"])

    def test_the_last(self, layer):
        layer.delete_adapter("b")
        layer.delete_adapter("c")
        layer.delete_adapter("a")
        assert layer.available_adapters == layer.active_adapters == []
        x = torch.randn(5, 4)
        assert torch.equal(layer(x), layer.base_layer(x))

    def test_one_that_is_not_there(self, layer):
        layer.delete_adapter("missing")
        assert layer.available_adapters == ["a", "b", "c"]


class TestWrittenByHand:
    def test_tensors(self):
        layer = written("a", "b")
        assert set(layer.adapter_tensors("a")) == {
            *(f"hand_A.{key}" for key in layer.hand_A["a"].state_dict()),
            "hand_vector",
            "hand_seen",
        }
        assert layer.adapter_tensors("a")["hand_vector"] is layer.hand_vector["a"]
        assert layer.adapter_tensors("missing") == {}

    def test_names_of_tensors(self):
        layer = written("a")
        names = {name for name, _ in layer.named_parameters() if "base_layer" not in name}
        names |= {name for name, _ in layer.named_buffers()}
        assert {layer.tensor_name(key, "a") for key in layer.adapter_tensors("a")} == names

    def test_tensors_of_low_precision_become_float32(self):
        layer = written("a", "b").bfloat16()
        vector = layer.hand_vector["a"]
        layer.cast_up("a")
        assert layer.hand_vector["a"] is vector
        assert {tensor.dtype for tensor in layer.adapter_tensors("a").values()} == {torch.float32, torch.int64}
        assert layer.hand_vector["b"].dtype is torch.bfloat16

    def test_it_may_refuse_adapters_together(self):
        layer = written("a", "b", kind=Refusing)
        with pytest.raises(AdapterStateError, match="one at a time"):
            layer.set_adapter(["a", "b"])
        assert layer.active_adapters == ["default"]
        written("a", "b").check_together(["a", "b"])

    def test_only_parameters_of_its_own_train(self):
        layer = written("a", "b")
        layer.set_adapter("a")
        trains = {name for name, tensor in layer.named_parameters() if tensor.requires_grad and "base" not in name}
        assert trains == {"hand_vector.a", *(f"hand_A.a.{i}.{end}" for i in range(3) for end in ("weight", "bias"))}
        assert not any(buffer.requires_grad for buffer in layer.buffers())

    def test_frozen_containers(self):
        layer = written("a", "b")
        layer.frozen_peft_weight_names = {"a": ("hand_A",)}
        layer.set_adapter(["a", "b"])
        assert layer.hand_vector["a"].requires_grad
        assert not any(p.requires_grad for p in layer.hand_A["a"].parameters())
        assert all(p.requires_grad for p in layer.hand_A["b"].parameters())

    def test_delete_from_all_containers(self):
        layer = written("a", "b")
        layer.delete_adapter("b")
        for container in (layer.hand_A, layer.hand_vector, layer.hand_alpha, layer.hand_seen):
            assert list(container) == ["a"]

    def test_what_it_must_define_itself(self):
        layer = written("a")
        with pytest.raises(
            NotImplementedError, match="Written does not define merge, so its adapters cannot be merged"
        ):
            layer.merge()
        with pytest.raises(NotImplementedError, match="Written does not define unmerge"):
            layer.unmerge()
        assert layer.supports_lora_conversion() is False

    def test_the_base_layer(self):
        inner = written("a")
        outer = Written(inner)
        assert outer.get_base_layer() is inner.base_layer
        assert outer.weight is inner.base_layer.weight
        assert outer.bias is inner.base_layer.bias

    def test_deepcopy(self):
        layer = written("a", "b")
        other = copy.deepcopy(layer)
        other.set_adapter("b")
        assert trained(layer) == []
        assert trained(other) == ["b"]

    def test_its_kind_is_not_known(self):
        assert written("a").site_kind is None
        assert adapted("a").site_kind == "linear"

    def test_one_active_name_as_text(self):
        layer = Written(nn.Linear(4, 3))
        assert layer.active_adapter == "default"
        assert layer.active_adapters == ["default"]


class TestMethods:
    def test_while_it_holds_one(self):
        layer = adapted()
        assert not isinstance(layer, ToyLayer)
        layer.add_adapter("a", Toy(layer.bare_site, None), "toy")
        layer.add_adapter("b", Toy(layer.bare_site, None), "other-toy")
        assert isinstance(layer, ToyLayer)
        assert isinstance(layer, OtherLayer)
        assert layer.methods == {"toy", "other-toy"}
        layer.delete_adapter("a")
        assert not isinstance(layer, ToyLayer)
        assert isinstance(layer, OtherLayer)
        assert isinstance(layer, BaseTunerLayer)

    def test_subclasses_written_by_hand(self):
        layer = WrittenToy(nn.Linear(4, 3))
        assert not isinstance(layer, ToyLayer)
        layer.update_layer("default")
        assert isinstance(layer, ToyLayer)
        assert isinstance(layer, WrittenToy)
        assert not isinstance(layer, OtherLayer)
        layer.delete_adapter("default")
        assert not isinstance(layer, ToyLayer)
        assert isinstance(layer, WrittenToy)

    def test_a_class_written_by_hand_with_a_method(self):
        layer = written("a", kind=WrittenWithMethod)
        assert layer.methods == {"third-toy"}
        assert not isinstance(layer, ToyLayer)
        assert not isinstance(adapted("a"), WrittenWithMethod)

    def test_without_a_method(self):
        layer = written("a")
        assert layer.methods == frozenset()
        assert isinstance(layer, BaseTunerLayer)
        assert not isinstance(layer, ToyLayer)
        assert not isinstance(adapted("a"), Written)

    def test_other_things(self):
        for thing in (nn.Linear(2, 2), None, 3, ToyLayer):
            assert not isinstance(thing, ToyLayer)
            assert not isinstance(thing, BaseTunerLayer)


class TestWalk:
    def test_paths(self):
        first, second = adapted("a"), written("a")
        model = nn.Sequential(first, nn.Sequential(nn.ReLU(), second), nn.Linear(2, 2))
        assert list(tuner_layers(model)) == [("0", first), ("1.1", second)]
        assert list(tuner_layers(model, "model")) == [("model.0", first), ("model.1.1", second)]
        assert list(tuner_layers(first)) == [("", first)]
        assert list(tuner_layers(nn.Linear(2, 2))) == []

    def test_nested(self):
        inner = adapted("a")
        outer = AdaptedLayer(make_site(inner, "fc", "weight"), Owner())
        assert list(tuner_layers(nn.Sequential(outer))) == [("0", outer), ("0.base_layer", inner)]
        assert list(tuner_layers(outer)) == [("", outer), ("base_layer", inner)]

    def test_layers_within_a_base_layer(self):
        inner = adapted("a")
        layer = Written(nn.Sequential(inner))
        assert list(tuner_layers(layer)) == [("", layer), ("base_layer.0", inner)]

    def test_its_own_containers_are_not_looked_into(self):
        layer = written("a")
        layer.hand_A["b"] = written("x")
        assert list(tuner_layers(layer)) == [("", layer)]

    def test_shared_modules_come_once(self):
        layer = adapted("a")
        block = nn.Sequential(layer)
        model = nn.ModuleDict({"first": block, "second": block, "third": layer})
        assert list(tuner_layers(model)) == [("first.0", layer)]

    def test_missing_children(self):
        model = nn.Sequential(adapted("a"))
        model.register_module("nothing", None)
        assert [path for path, _ in tuner_layers(model)] == ["0"]

    def test_base_layers_of_another_name(self):
        below = adapted("a")
        upper = Renamed(below)
        assert list(tuner_layers(upper)) == [("", upper), ("inner", below)]
        model = nn.Sequential(Renamed(nn.Sequential(nn.Tanh(), below)))
        assert [path for path, _ in tuner_layers(model)] == ["0", "0.inner.1"]

    def test_children_that_are_called_as_base_layers_are(self):
        layer = written("a")
        layer.base_layer.base_layer = adapted("b")
        model = nn.ModuleDict({"base_layer": layer, "my_base_layer": adapted("c")})
        paths = ["base_layer", "base_layer.base_layer.base_layer", "my_base_layer"]
        assert [path for path, _ in tuner_layers(model)] == paths

    def test_a_stack(self):
        below = adapted("a")
        upper = Renamed(below)
        assert list(stack_at(upper)) == [upper, below]
        assert list(stack_at(below.base_layer)) == []

    def test_compiled(self):
        layer = adapted("a")
        model = torch.compile(nn.Sequential(layer), backend="eager")
        assert [found for _, found in tuner_layers(model)] == [layer]
        model = nn.Sequential(torch.compile(layer, backend="eager"))
        assert [found for _, found in tuner_layers(model)] == [layer]

    def test_a_deep_copy(self):
        model = nn.Sequential(adapted("a"))
        other = copy.deepcopy(model)
        assert [found for _, found in tuner_layers(other)] == [other[0]]


def test_the_original_of_a_compiled_model():
    model = nn.Sequential()
    assert original(model) is original(torch.compile(model, backend="eager")) is model
