from __future__ import annotations

import types
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from tunerkit import Method, PeftConfig, get_peft_model, plugins, register
from tunerkit.adapter import Adapter, Part
from tunerkit.checkpoint.state import Loading, collect, pieces
from tunerkit.errors import CheckpointError
from tunerkit.layer import tuner_layers
from tunerkit.naming import PREFIX
from tunerkit.testing.bench import Snapshot
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoraConfig


def make_base():
    return nn.ModuleDict({"a": nn.Linear(3, 4), "lora_A": nn.Sequential(nn.Linear(4, 2)), "0": nn.Linear(2, 2)})


def make_model(*targets, name="default", **others):
    return get_peft_model(make_base(), LoraConfig(target_modules=list(targets or ("a",)), r=2, **others), name)


def found_in(model, name="default"):
    tuner = model.base_model
    return pieces(dict(tuner_layers(tuner.model)), name, PREFIX, tuner.parts, tuner)


@dataclass
class StateConfig(PeftConfig):
    peft_type: str | None = "STATE_TOY"
    target_modules: list[str] | set[str] | str | None = None


class ToyAdapter(Adapter):
    """Keeps its tensor turned, in a file as one and a note of its size, and shares another with its like."""

    entries = ("toy_turned", "toy_hidden")

    def __init__(self, site, config):
        super().__init__(site, config)
        self.toy_turned = nn.Parameter(site.normal(site.in_features, site.out_features))
        self.register_buffer("toy_hidden", site.zeros(1), persistent=False)

    def merged(self, below):
        return below.weight + self.toy_turned.T * self.part.toy_shared, below.bias

    def to_checkpoint(self, tensors):
        turned = tensors["toy_turned"]
        return {"toy_turned": turned.T, "toy_size": torch.tensor(turned.shape)}

    def from_checkpoint(self, tensors):
        assert tensors["toy_size"].tolist() == list(tensors["toy_turned"].T.shape)
        return {"toy_turned": tensors["toy_turned"].T}


class ToyPart(Part):
    entries = ("toy_shared", "toy_steps")

    def __init__(self, sites, config):
        super().__init__(sites, config)
        self.toy_shared = nn.Parameter(sites[0].ones(1))
        self.register_buffer("toy_steps", torch.zeros(1, dtype=torch.int64))


@pytest.fixture
def toy():
    register("state-toy", types.SimpleNamespace(method=Method(StateConfig, ToyAdapter, ToyPart)))
    yield get_peft_model(make_base(), StateConfig(target_modules=["a"]), "t")
    plugins.unregister("state-toy")


class TestKeys:
    def test_are_pefts(self):
        model = make_model("a", "lora_A.0", "0")
        assert list(collect(found_in(model))) == [
            "base_model.model.a.lora_A.weight",
            "base_model.model.a.lora_B.weight",
            "base_model.model.lora_A.0.lora_A.weight",
            "base_model.model.lora_A.0.lora_B.weight",
            "base_model.model.0.lora_A.weight",
            "base_model.model.0.lora_B.weight",
        ]

    @pytest.mark.parametrize("name", ["0", "a", "lora_A", "weight", "default", "ab"])
    def test_do_not_depend_on_what_adapters_are_called(self, name):
        model = make_model("a", "lora_A.0", name=name)
        expected = list(collect(found_in(make_model("a", "lora_A.0"))))
        model.add_adapter("b", LoraConfig(target_modules=["0", "a"], r=3))
        assert list(collect(found_in(model, name))) == expected
        assert collect(found_in(model, "b"))["base_model.model.a.lora_A.weight"].shape == (3, 3)

    def test_of_nobody(self):
        assert found_in(make_model(), "other") == []

    def test_without_wrapper(self):
        model = make_model().get_base_model()
        assert list(collect(pieces(dict(tuner_layers(model)), "default", "", {}, None))) == [
            "a.lora_A.weight",
            "a.lora_B.weight",
        ]
        layer = model["a"]
        assert list(collect(pieces(dict(tuner_layers(layer)), "default", "", {}, None))) == [
            "lora_A.weight",
            "lora_B.weight",
        ]

    def test_compiled_parts_are_called_as_before(self):
        base = nn.ModuleDict(
            {"x": nn.ModuleDict({"_orig_mod": nn.Linear(2, 2)}), "_orig_mod": nn.ModuleDict({"y": nn.Linear(2, 2)})}
        )
        model = get_peft_model(base, LoraConfig(target_modules=["x._orig_mod", "y"]))
        assert [piece.path for piece in found_in(model)] == ["base_model.model.x", "base_model.model.y"]

    def test_parts_stand_beside_the_model(self, toy):
        tensors = collect(found_in(toy, "t"))
        assert list(tensors) == [
            "base_model.model.a.toy_turned",
            "base_model.model.a.toy_size",
            "base_model.toy_shared",
            "base_model.toy_steps",
        ]
        assert tensors["base_model.model.a.toy_turned"].shape == (4, 3)


class TestCollect:
    def test_values_are_detached_and_the_models_own(self):
        model = make_model()
        tensors = collect(found_in(model))
        weight = model.get_base_model()["a"].lora_A["default"].weight
        assert tensors["base_model.model.a.lora_A.weight"].data_ptr() == weight.data_ptr()
        assert not any(tensor.requires_grad for tensor in tensors.values())

    def test_values_from_a_state_that_was_gathered_elsewhere(self, toy):
        state = {name: tensor + 1 for name, tensor in toy.state_dict().items()}
        names = {id(module): name for name, module in toy.named_modules()}
        tensors = collect(found_in(toy, "t"), state, lambda piece: f"{names[id(piece.holder)]}.")
        assert torch.equal(tensors["base_model.toy_shared"], torch.tensor([2.0]))
        assert tensors["base_model.model.a.toy_size"].tolist() == [3, 4]

    def test_state_of_another_model(self):
        model = make_model()
        with pytest.raises(CheckpointError) as caught:
            collect(found_in(model), {}, lambda piece: "m.")
        assert str(caught.value) == (
            "The given state_dict lacks 'm.lora_A.default.weight' of the adapter 'default'. Pass the state of "
            "this very model."
        )


class TestLoading:
    @pytest.mark.parametrize("form", ["{}", "{}_", "injected", "compiled"])
    def test_forms_of_keys(self, form):
        source, target = make_model("a", "lora_A.0"), make_model("a", "lora_A.0")
        tensors = {key: torch.randn_like(tensor) for key, tensor in collect(found_in(source)).items()}
        rename = {
            "{}": lambda key: key,
            "{}_": lambda key: f"{key}_",
            "injected": lambda key: key.removeprefix(PREFIX),
            "compiled": lambda key: key.replace("model.model.", "model.model._orig_mod."),
        }[form]
        loading = Loading(found_in(target), {rename(key): tensor for key, tensor in tensors.items()})
        assert loading.report.complete == (form != "{}_")
        if form == "{}_":
            assert loading.report.missing_keys == list(tensors)
            assert loading.report.unexpected_keys == [f"{key}_" for key in tensors]
            return
        assert loading.report.loaded_keys == list(tensors)
        loading.write()
        assert all(torch.equal(tensor, tensors[key]) for key, tensor in collect(found_in(target)).items())

    def test_two_keys_for_one_tensor(self):
        model = make_model()
        tensors = collect(found_in(model))
        key = next(iter(tensors))
        loading = Loading(found_in(model), {**tensors, key.removeprefix(PREFIX): tensors[key]})
        assert len(loading.report.unexpected_keys) == 1
        assert loading.report.missing_keys == []

    def test_nothing_is_written_before_it_is_said(self):
        model = make_model()
        before = Snapshot.of(model)
        Loading(found_in(model), {key: tensor + 1 for key, tensor in collect(found_in(model)).items()})
        assert before.differences(model) == []

    def test_shapes(self):
        model = make_model()
        tensors = {key: torch.zeros(5, 7) for key in collect(found_in(model))}
        report = Loading(found_in(model), tensors).report
        assert report.mismatched_keys[0] == "base_model.model.a.lora_A.weight is (5, 7), the adapter's (2, 3)"
        assert report.missing_keys == report.unexpected_keys == report.loaded_keys == []

    def test_given_tensors_are_not_changed_or_shared(self):
        model = make_model()
        tensors = {key: torch.randn_like(tensor) for key, tensor in collect(found_in(model)).items()}
        copies = {key: tensor.clone() for key, tensor in tensors.items()}
        Loading(found_in(model), tensors).write()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        assert all(torch.equal(tensors[key], copies[key]) for key in copies)

    def test_own_form_in_files(self, toy):
        tensors = {key: tensor.clone() + 1 for key, tensor in collect(found_in(toy, "t")).items()}
        tensors["base_model.model.a.toy_size"] -= 1
        loading = Loading(found_in(toy, "t"), tensors)
        assert loading.report.complete
        loading.write()
        again = collect(found_in(toy, "t"))
        assert all(torch.equal(again[key], tensors[key]) for key in tensors)

    def test_own_form_needs_all_of_its_tensors(self, toy):
        tensors = collect(found_in(toy, "t"))
        del tensors["base_model.model.a.toy_size"]
        report = Loading(found_in(toy, "t"), tensors).report
        assert report.missing_keys == ["base_model.model.a.toy_size"]
        assert report.loaded_keys == ["base_model.toy_shared", "base_model.toy_steps"]

    def test_own_form_that_gives_too_much(self, toy, monkeypatch):
        tensors = collect(found_in(toy, "t"))
        monkeypatch.setattr(ToyAdapter, "from_checkpoint", lambda self, given: given)
        report = Loading(found_in(toy, "t"), tensors).report
        assert report.unexpected_keys == ["base_model.model.a.toy_size"]
        assert report.mismatched_keys == ["base_model.model.a.toy_turned is (4, 3), the adapter's (3, 4)"]

    def test_keeps_the_dtype_of_the_adapter(self):
        model = make_model()
        Loading(
            found_in(model),
            {key: torch.ones_like(t, dtype=torch.float64) for key, t in collect(found_in(model)).items()},
        ).write()
        weight = model.get_base_model()["a"].lora_A["default"].weight
        assert weight.dtype == torch.float32
        assert torch.equal(weight, torch.ones(2, 3))


class TestMeta:
    def test_tensors_on_meta_are_replaced(self, toy):
        base = make_base()
        model = get_peft_model(base, LoraConfig(target_modules=["a"], r=2), low_cpu_mem_usage=True)
        model.add_adapter("scale", IA3Config(target_modules=["a"], feedforward_modules=[]), low_cpu_mem_usage=True)
        assert base["a"].lora_A["default"].weight.is_meta
        assert base["a"].ia3_l["scale"].is_meta
        for name in ("default", "scale"):
            given = {
                key: torch.randn(t.shape, dtype=torch.float64) for key, t in collect(found_in(model, name)).items()
            }
            Loading(found_in(model, name), given).write()
            loaded = collect(found_in(model, name))
            assert all(torch.equal(loaded[key], given[key].float()) for key in given)
        layer = base["a"]
        assert isinstance(layer.lora_A["default"].weight, nn.Parameter)
        assert layer.lora_A["default"].weight.requires_grad
        assert not layer.ia3_l["scale"].requires_grad
        assert layer.adapters["scale"].ia3_l is layer.ia3_l["scale"]

    def test_parts_and_buffers(self, toy):
        source = collect(found_in(toy, "t"))
        with torch.device("meta"):
            model = get_peft_model(make_base(), StateConfig(target_modules=["a"]), "t")
        assert model.base_model.parts["t"].toy_steps.is_meta
        Loading(found_in(model, "t"), source).write()
        part = model.base_model.parts["t"]
        assert isinstance(part.toy_shared, nn.Parameter)
        assert not isinstance(part.toy_steps, nn.Parameter)
        assert (part.toy_steps.device.type, part.toy_steps.dtype) == ("cpu", torch.int64)

    @pytest.mark.parametrize("meta", [True, False])
    def test_failing_half_way_leaves_what_was(self, meta):
        model = get_peft_model(make_base(), LoraConfig(target_modules=["a", "0"], r=2), low_cpu_mem_usage=meta)
        names = [name for name, parameter in model.named_parameters() if "lora" in name]
        before = {name: (p, p.clone()) for name, p in model.named_parameters() if not p.is_meta}
        given = {key: torch.ones(tensor.shape) for key, tensor in collect(found_in(model)).items()}
        last = list(given)[-1]
        # The last one cannot be copied.
        given[last] = given[last].to("meta") if not meta else Uncopyable(given[last])
        loading = Loading(found_in(model), given)
        with pytest.raises((NotImplementedError, RuntimeError)):
            loading.write()
        for name, parameter in model.named_parameters():
            if name in before:
                assert parameter is before[name][0]
                assert torch.equal(parameter, before[name][1])
            else:
                assert parameter.is_meta
        assert [name for name, _ in model.named_parameters() if "lora" in name] == names


class Uncopyable:
    """Looks like a tensor until it is to be copied."""

    def __init__(self, tensor):
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device

    def clone(self, **_):
        raise RuntimeError("on purpose")

    to = clone


def test_complex_numbers_are_refused():
    model = make_model()
    before = Snapshot.of(model)
    tensors = {key: tensor.to(torch.complex64) for key, tensor in collect(found_in(model)).items()}
    message = r"lora_A\.weight holds complex numbers, and the adapter's are torch\.float32: half of each would be lost"
    with pytest.raises(CheckpointError, match=message):
        Loading(found_in(model), tensors)
    assert before.differences(model) == []
