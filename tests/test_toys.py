"""What is particular to each toy method, beyond what every method has to pass."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from toys import bare, bias, hooks_by_hand, parameters, registered, rotation, rows, shared, tuner_by_hand
from toys.layer_by_hand import GatedLayer

import tunerkit
from tunerkit.adapted_layer import AdaptedLayer
from tunerkit.errors import AdapterStateError, RouteError, TargetError, TunerkitError, UnknownAdapterError
from tunerkit.layer import tuner_layers
from tunerkit.testing.bench import MOVED, Snapshot, difference, loss_of, move, same_bits
from tunerkit.testing.models import Embeddings, Linears, Parameters

ALL = (bare, bias, hooks_by_hand, parameters, rotation, rows, shared, tuner_by_hand)


@pytest.fixture(autouse=True)
def known():
    with registered(*ALL):
        yield


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Linears()


def weight_of(model, path):
    return model.get_submodule(path).weight.detach().clone()


class TestRotation:
    def test_weight_stays_as_long_as_it_was(self, model):
        before = weight_of(model, "wide")
        peft_model = tunerkit.get_peft_model(model, rotation.Config(target_modules=["wide"]))
        move(peft_model, "default")
        after = weight_of(peft_model.merge_and_unload(), "wide")
        assert difference(after, before) > MOVED
        assert torch.allclose(after.norm(dim=0), before.norm(dim=0), atol=1e-6)


class TestShared:
    def test_tensors_are_named_and_saved_once(self, model, tmp_path):
        peft_model = tunerkit.get_peft_model(model, shared.Config(target_modules=["wide", "square"]))
        names = {name for name, _ in peft_model.named_parameters() if "toy" in name}
        assert names == {
            "base_model.toy_down.default",
            "base_model.toy_up.default",
            *(
                f"base_model.model.{path}.{key}.default"
                for path in ("wide", "square")
                for key in ("toy_inner", "toy_outer")
            ),
        }
        assert "base_model.toy_down" in tunerkit.get_peft_model_state_dict(peft_model)
        peft_model.save_pretrained(tmp_path)
        assert "base_model.toy_down" in tunerkit.load_peft_weights(tmp_path)

    def test_layers_share_one_part_of_the_largest_size(self, model):
        peft_model = tunerkit.get_peft_model(model, shared.Config(target_modules=["wide", "narrow"], rank=3))
        parts = {id(layer.adapters["default"].part) for layer in peft_model.base_model.layers()}
        assert parts == {id(peft_model.base_model.parts["default"])}
        assert peft_model.base_model.parts["default"].toy_down.shape == (3, 8)

    def test_part_is_around_each_call_in_which_its_adapter_takes_part(self, model):
        peft_model = tunerkit.get_peft_model(model, shared.Config(target_modules=["wide"]))
        part = peft_model.base_model.parts["default"]
        x = torch.randn(2, 6)
        peft_model(x)
        assert part.calls == 1
        with peft_model.disable_adapter():
            peft_model(x)
        with peft_model.use_adapter([]):
            peft_model(x)
        assert part.calls == 1

    def test_exposed_methods_are_found_on_the_model(self, model):
        peft_model = tunerkit.get_peft_model(model, shared.Config(target_modules=["wide", "narrow"]))
        assert peft_model.count_sites() == 2

    def test_exposed_by_two_adapters_is_a_clash(self, model):
        peft_model = tunerkit.get_peft_model(model, shared.Config(target_modules=["wide"]))
        peft_model.add_adapter("other", shared.Config(target_modules=["wide"]))
        with pytest.raises(AdapterStateError, match="'count_sites' is offered by"):
            peft_model.count_sites()

    def test_injecting_without_a_model_around_says_what_to_do(self, model):
        before = Snapshot.of(model)
        with pytest.raises(TargetError, match=r"Use get_peft_model\(model, config\)"):
            tunerkit.inject_adapter_in_model(shared.Config(target_modules=["wide"]), model)
        assert before.differences(model) == []

    def test_part_that_trains_stops_and_starts_with_its_adapter(self, model):
        peft_model = tunerkit.get_peft_model(model, shared.Config(target_modules=["wide"], train_shared=True))
        down = peft_model.base_model.parts["default"].toy_down
        peft_model.disable_adapter_layers()
        peft_model.set_adapter("default")
        assert not down.requires_grad
        peft_model.enable_adapter_layers()
        assert down.requires_grad
        peft_model.set_adapter("default", inference_mode=True)
        assert not down.requires_grad


class TestBare:
    def test_looks_at_the_bare_layer_below_a_stack(self, model):
        peft_model = tunerkit.get_peft_model(model, rotation.Config(target_modules=["wide"]), "rotation")
        peft_model.add_adapter("bare", bare.Config(target_modules=["wide"]))
        for name in ("rotation", "bare"):
            move(peft_model, name)
        layer = peft_model.get_base_model().wide
        weight = layer.get_base_layer().weight.detach().clone()
        alone = {}
        for name in layer.adapters:
            peft_model.set_adapter(name)
            alone[name] = copy.deepcopy(peft_model).merge_and_unload()
        expected = weight_of(alone["rotation"], "wide") + weight_of(alone["bare"], "wide") - weight
        peft_model.set_adapter(["rotation", "bare"])
        both = weight_of(copy.deepcopy(peft_model).merge_and_unload(), "wide")
        assert torch.allclose(both, expected, atol=1e-6)
        # Merged first, the rotation is in the layer's weight, and the bare layer is still the one without it.
        peft_model.merge_adapter(["rotation"])
        peft_model.merge_adapter(["bare"])
        assert torch.allclose(layer.get_base_layer().weight, expected, atol=1e-6)


class TestRows:
    def test_starts_at_the_rows_of_the_table(self):
        torch.manual_seed(0)
        base = Embeddings()
        peft_model = tunerkit.get_peft_model(base, rows.Config(target_modules=["words"], rows=[3, 1]))
        layer = base.words
        assert same_bits(layer.toy_rows["default"], layer.get_base_layer().weight[[3, 1]])
        loss_of(peft_model(*Embeddings.inputs())).backward()
        assert (layer.toy_rows["default"].grad != 0).all()

    def test_the_same_rows_twice_are_refused(self):
        peft_model = tunerkit.get_peft_model(Embeddings(), rows.Config(target_modules=["words"], rows=[3]))
        peft_model.add_adapter("same", rows.Config(target_modules=["words"], rows=[3, 4]))
        peft_model.add_adapter("others", rows.Config(target_modules=["words"], rows=[5]))
        message = "'default', 'same' cannot be active together on 'words': both replace the same rows"
        with pytest.raises(AdapterStateError, match=message):
            peft_model.set_adapter(["default", "same"])
        with pytest.raises(AdapterStateError, match=message), peft_model.use_adapter(["default", "same"]):
            pass
        assert peft_model.active_adapters == ["default"]
        peft_model.set_adapter(["default", "others"])


class TestBias:
    def test_makes_a_bias_where_there_was_none(self, model):
        peft_model = tunerkit.get_peft_model(model, bias.Config(target_modules=["square"]))
        move(peft_model, "default")
        peft_model.merge_adapter()
        square = model.square.get_base_layer()
        assert same_bits(square.bias, model.square.toy_bias["default"])
        peft_model.unmerge_adapter()
        assert square.bias is None
        assert peft_model.merge_and_unload().square.bias is not None


class TestParameters:
    def test_a_module_at_two_places_gets_one_adapter(self):
        base = Parameters()
        base.again = base.experts
        config = parameters.Config(target_parameters=["experts.router", "again.router", "experts.up", "again.up"])
        peft_model = tunerkit.get_peft_model(base, config)
        assert isinstance(base.experts, AdaptedLayer)
        assert base.again is base.experts
        assert peft_model.base_model.targeted_parameter_names == ["experts.router", "experts.up"]
        peft_model.unload()
        assert base.again is base.experts
        assert type(base.experts).__name__ == "Mixture"

    def test_parameters_of_one_module_are_nested_layers(self):
        base = Parameters()
        config = parameters.Config(target_parameters=["experts.router", "experts.up"])
        peft_model = tunerkit.get_peft_model(base, config)
        outer = base.experts
        inner = outer.base_layer
        assert {outer.parameter_name, inner.parameter_name} == {"router", "up"}
        assert isinstance(inner, AdaptedLayer)
        assert type(outer.get_base_layer()).__name__ == "Mixture"
        shapes = {
            name: tuple(tensor.shape)
            for name, tensor in tunerkit.get_peft_model_state_dict(peft_model).items()
            if "left" in name
        }
        assert shapes == {
            "base_model.model.experts.toy_left": (3, 6, 2),
            "base_model.model.experts.base_layer.toy_left": (3, 2),
        }
        assert peft_model.base_model.targeted_parameter_names == ["experts.router", "experts.up"]

    def test_second_adapter_goes_to_the_layers_that_are_there(self):
        base = Parameters()
        peft_model = tunerkit.get_peft_model(base, parameters.Config(target_parameters=["experts.router"]))
        peft_model.add_adapter("more", parameters.Config(target_parameters=["experts.router", "experts.down"]))
        layers = [layer for _, layer in tuner_layers(base)]
        assert [(layer.parameter_name, layer.available_adapters) for layer in layers] == [
            ("down", ["more"]),
            ("router", ["default", "more"]),
        ]
        peft_model.delete_adapter("more")
        assert [layer.parameter_name for _, layer in tuner_layers(base)] == ["router"]


@pytest.mark.parametrize("toy", [hooks_by_hand, tuner_by_hand], ids=["hooks", "tuner"])
class TestLayersByHand:
    def test_layers_are_the_authors_own(self, model, toy):
        tunerkit.get_peft_model(model, toy.Config(target_modules=["wide", "square"]))
        layers = [layer for _, layer in tuner_layers(model)]
        assert len(layers) == 2
        assert all(isinstance(layer, GatedLayer) for layer in layers)

    def test_call_that_they_would_not_follow_is_refused(self, model, toy):
        peft_model = tunerkit.get_peft_model(model, toy.Config(target_modules=["wide"]), "one")
        peft_model.add_adapter("two", toy.Config(target_modules=["wide"]))
        message = r"cannot be routed to 'two': a \w+ was put in by its method's own code, .* runs 'one'"
        with pytest.raises(RouteError, match=message), peft_model.use_adapter("two"):
            pass
        with pytest.raises(RouteError, match="cannot be routed to none"), peft_model.use_adapter([]):
            pass
        x = torch.randn(2, 6)
        with peft_model.use_adapter("one"):
            routed = peft_model(x)
        assert same_bits(routed, peft_model(x))

    def test_unsafe_merge_is_refused_and_undone(self, model, toy):
        peft_model = tunerkit.get_peft_model(model, toy.Config(target_modules=["wide", "square"]))
        move(peft_model, "default")
        with torch.no_grad():
            model.square.toy_gate["default"].fill_(float("nan"))
        before = Snapshot.of(peft_model)
        with pytest.raises(ValueError, match="NaN or infinities"):
            peft_model.merge_adapter(safe_merge=True)
        assert before.differences(peft_model) == []


class TestTunerByHand:
    def test_works_without_a_model_around_it(self, model):
        x = torch.randn(2, 6)
        plain = model(x).detach()
        tuner = tuner_by_hand.HandModel(model, tuner_by_hand.Config(target_modules=["wide"]), "default")
        assert isinstance(model.wide, tuner_by_hand.HandLayer)
        assert same_bits(tuner(x), plain)
        loss_of(tuner(x)).backward()
        assert model.wide.toy_up["default"].weight.grad.abs().max() > 0
        with torch.no_grad():
            model.wide.toy_up["default"].weight += 1
        moved = tuner(x).detach()
        assert difference(moved, plain) > MOVED
        tuner.merge_adapter()
        assert torch.allclose(tuner(x), moved, atol=1e-5)
        assert tuner.unload() is model
        assert same_bits(model(x), plain)

    def test_works_without_being_registered(self, model):
        class Unregistered(tunerkit.BaseTuner):
            _prepare_adapter_config = tuner_by_hand.HandModel._prepare_adapter_config
            _check_target_module_exists = tuner_by_hand.HandModel._check_target_module_exists
            _create_and_replace = tuner_by_hand.HandModel._create_and_replace

        @dataclass
        class Elsewhere(tuner_by_hand.Config):
            peft_type: str | None = "NOWHERE_TO_BE_FOUND"

        config = Elsewhere(target_modules=["wide"])
        tuner = Unregistered(model, {"a": config, "b": config}, "a")
        assert model.wide.available_adapters == ["a"]
        with pytest.raises(UnknownAdapterError, match="peft_config has no entry 'b'; it has 'a'"):
            tuner.inject_adapter(model, "b")
        tuner.peft_config["b"] = config
        tuner.inject_adapter(model, "b")
        assert model.wide.available_adapters == ["a", "b"]

    def test_is_an_instance_while_its_adapter_is_there(self, model):
        peft_model = tunerkit.get_peft_model(model, tuner_by_hand.Config(target_modules=["wide"]))
        assert isinstance(peft_model.base_model, tuner_by_hand.HandModel)
        peft_model.add_adapter("other", bias.Config(target_modules=["square"]))
        assert isinstance(model.square, AdaptedLayer)
        assert not isinstance(model.square, tuner_by_hand.HandLayer)
        peft_model.set_adapter("other")
        peft_model.delete_adapter("default")
        assert not isinstance(peft_model.base_model, tuner_by_hand.HandModel)


class TestHooksByHand:
    def test_error_of_a_hook_reaches_the_caller_and_changes_nothing(self, model):
        before = Snapshot.of(model)
        with pytest.raises(ValueError, match="say what to target in a model of type custom"):
            tunerkit.get_peft_model(model, hooks_by_hand.Config())
        assert before.differences(model) == []

    def test_an_adapter_cannot_stand_on_a_layer_by_hand(self, model):
        peft_model = tunerkit.get_peft_model(model, hooks_by_hand.Config(target_modules=["wide"]))
        before = Snapshot.of(peft_model)
        with pytest.raises(TunerkitError, match="GatedLayer"):
            peft_model.add_adapter("other", bias.Config(target_modules=["wide"]))
        assert before.differences(peft_model) == []
        assert isinstance(model.wide.base_layer, nn.Linear)
