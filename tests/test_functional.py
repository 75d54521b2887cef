from __future__ import annotations

import inspect
import types
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from toys import registered, shared

import tunerkit
from tunerkit import (
    Method,
    PeftConfig,
    functional,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    plugins,
    register,
    set_peft_model_state_dict,
    use_adapter,
)
from tunerkit.adapter import Adapter, Part
from tunerkit.errors import AdapterWarning, CheckpointError, ConfigError, TargetError, UnknownAdapterError
from tunerkit.layer import tuner_layers
from tunerkit.testing.bench import Snapshot, difference, same_bits
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoraConfig

X = torch.linspace(-1, 1, 15).reshape(5, 3)


def make_base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def lora(*targets, **others):
    return LoraConfig(target_modules=list(targets or ("0", "2")), r=2, **others)


def run(model):
    with torch.no_grad():
        return model(X)


def move_all(model):
    with torch.no_grad():
        for _, layer in tuner_layers(model):
            for name in layer.available_adapters:
                for tensor in layer.adapter_tensors(name).values():
                    tensor.add_(0.3 * torch.randn(tensor.shape))


class TestInject:
    def test_returns_the_model_itself(self):
        base, config = make_base(), lora()
        assert inject_adapter_in_model(config, base) is base
        assert config == lora()
        assert same_bits(run(base), run(make_base()))
        assert {name for name, p in base.named_parameters() if p.requires_grad} == {
            f"{place}.lora_{letter}.default.weight" for place in (0, 2) for letter in "AB"
        }
        move_all(base)
        assert difference(run(base), run(make_base())) > 1e-3

    def test_several(self):
        base = inject_adapter_in_model(lora(), make_base(), "a")
        inject_adapter_in_model(IA3Config(target_modules=["0"], feedforward_modules=[]), base, "b")
        assert base[0].available_adapters == ["a", "b"]
        assert list(base.peft_config) == ["a", "b"]
        assert base[0].active_adapters == base[2].active_adapters == ["b"]

    def test_on_meta_from_keys_alone(self):
        source = inject_adapter_in_model(lora("2"), make_base())
        move_all(source)
        state = get_peft_model_state_dict(source)
        assert list(state) == ["2.lora_A.weight", "2.lora_B.weight"]
        base = inject_adapter_in_model(lora("0"), make_base(), low_cpu_mem_usage=True, state_dict=state)
        assert base[2].lora_A["default"].weight.is_meta
        set_peft_model_state_dict(base, state, low_cpu_mem_usage=True)
        assert type(base[0]) is nn.Linear
        assert same_bits(run(base), run(source))

    def test_method_with_a_part_says_what_it_needs(self):
        @dataclass
        class Config(PeftConfig):
            peft_type: str | None = "INJECT_TOY"
            target_modules: list[str] | None = None

        register("inject-toy", types.SimpleNamespace(method=Method(Config, Adapter, Part)))
        try:
            with pytest.raises(TargetError) as caught:
                inject_adapter_in_model(Config(target_modules=["0"]), make_base())
        finally:
            plugins.unregister("inject-toy")
        assert str(caught.value) == (
            "'inject-toy' shares tensors between all its layers, which need a home beside the model. Use "
            "get_peft_model(model, config)."
        )

    def test_what_is_no_config(self):
        model = get_peft_model(make_base(), lora())
        for call in (
            lambda config: inject_adapter_in_model(config, make_base()),
            lambda config: get_peft_model(make_base(), config),
            lambda config: tunerkit.PeftModel(make_base(), config),
            lambda config: tunerkit.plan(make_base(), config),
            lambda config: model.add_adapter("b", config),
        ):
            with pytest.raises(
                ConfigError, match=r"peft_config must be the config of a method, a PeftConfig; it is a dict. Make"
            ):
                call({"peft_type": "LORA"})
        assert list(model.peft_config) == ["default"]


class TestStateDict:
    @pytest.fixture
    def model(self):
        model = get_peft_model(make_base(), lora(), "a")
        model.add_adapter("b", IA3Config(target_modules=["0"], feedforward_modules=[]))
        move_all(model.get_base_model())
        return model

    def test_round_trip(self, model):
        for name in ("a", "b"):
            state = get_peft_model_state_dict(model, adapter_name=name)
            given = {key: torch.randn_like(tensor) for key, tensor in state.items()}
            report = set_peft_model_state_dict(model, given, name)
            assert report.complete
            assert report.missing_keys == report.unexpected_keys == []
            again = get_peft_model_state_dict(model, adapter_name=name)
            assert all(torch.equal(again[key], given[key]) for key in given)

    def test_of_a_gathered_state(self, model):
        state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
        found = get_peft_model_state_dict(model, state, "a")
        own = get_peft_model_state_dict(model, adapter_name="a")
        assert all(torch.equal(found[key], own[key] + 1) for key in own)
        with pytest.raises(
            CheckpointError, match=r"The given state_dict lacks 'base_model.model.0.lora_A.a.weight' of"
        ):
            get_peft_model_state_dict(model, {}, "a")
        base = model.get_base_model()
        found = get_peft_model_state_dict(base, base.state_dict(), "a")
        assert torch.equal(found["0.lora_A.weight"], base[0].lora_A["a"].weight)
        layer = base[0]
        assert list(get_peft_model_state_dict(layer, layer.state_dict(), "a")) == ["lora_A.weight", "lora_B.weight"]

    def test_only_reports_what_is_missing_or_left(self, model):
        report = set_peft_model_state_dict(model, {"base_model.model.0.lora_A.weight": torch.ones(2, 3), "x": X}, "a")
        assert report.unexpected_keys == ["x"]
        assert report.missing_keys[0] == "base_model.model.0.lora_B.weight"
        assert report.loaded_keys == ["base_model.model.0.lora_A.weight"]
        assert not report.complete
        assert torch.equal(model.get_base_model()[0].lora_A["a"].weight, torch.ones(2, 3))

    def test_wrong_shapes(self, model):
        state = {
            key: torch.ones(tensor.shape) for key, tensor in get_peft_model_state_dict(model, adapter_name="a").items()
        }
        state["base_model.model.2.lora_A.weight"] = torch.ones(9, 9)
        before = Snapshot.of(model)
        with pytest.raises(CheckpointError, match=r"model.2.lora_A.weight is \(9, 9\), the adapter's \(2, 4\)"):
            set_peft_model_state_dict(model, state, "a")
        assert before.differences(model) == []
        report = set_peft_model_state_dict(model, state, "a", ignore_mismatched_sizes=True)
        assert len(report.mismatched_keys) == 1
        assert torch.equal(model.get_base_model()[0].lora_A["a"].weight, torch.ones(2, 3))

    def test_given_dict_is_not_changed(self):
        """With modules to save PEFT used to rename keys of the dict itself."""
        peft = pytest.importorskip("peft", reason="comparing with PEFT needs it")
        config = lora("0", modules_to_save=["2"])
        for library, same in ((tunerkit, config), (peft, peft.get_peft_config(config.to_dict()))):
            model = library.get_peft_model(make_base(), same, "one")
            state = library.get_peft_model_state_dict(model, adapter_name="one")
            assert "base_model.model.2.weight" in state
            given = {key: torch.randn_like(tensor) for key, tensor in state.items()}
            before = dict(given)
            library.set_peft_model_state_dict(model, given, "one")
            assert list(given) == list(before)
            assert all(given[key] is tensor for key, tensor in before.items())
            assert torch.equal(
                model.get_base_model()[2].modules_to_save["one"].weight, given["base_model.model.2.weight"]
            )

    def test_unknown_adapter(self, model):
        for call in (get_peft_model_state_dict, lambda m, adapter_name: set_peft_model_state_dict(m, {}, adapter_name)):
            with pytest.raises(UnknownAdapterError, match=r"The model has no adapter 'c'; it has 'a', 'b'."):
                call(model, adapter_name="c")
            with pytest.raises(UnknownAdapterError, match=r"The model has no adapter 'c'; it has 'a', 'b'."):
                call(model.get_base_model(), adapter_name="c")
            with pytest.raises(UnknownAdapterError, match=r"The model has no adapter 'c'; it has none."):
                call(make_base(), adapter_name="c")

    @pytest.mark.parametrize("value", ["yes", None])
    def test_embeddings_are_saved_or_not(self, model, value):
        with pytest.raises(
            ConfigError, match=f"^save_embedding_layers must be 'auto', True or False; it is {value!r}.$"
        ):
            get_peft_model_state_dict(model, adapter_name="a", save_embedding_layers=value)
        assert get_peft_model_state_dict(model, adapter_name="a", save_embedding_layers=False)


class TestLoadWeights:
    def test_reads_the_file(self, tmp_path):
        model = get_peft_model(make_base(), lora())
        model.save_pretrained(tmp_path)
        expected = load_file(tmp_path / "adapter_model.safetensors")
        for tensors in (load_peft_weights(tmp_path), load_peft_weights(str(tmp_path), device="cpu")):
            assert {key: tensor.tolist() for key, tensor in tensors.items()} == {
                k: t.tolist() for k, t in expected.items()
            }
        assert load_peft_weights(tmp_path, torch.device("meta"))["base_model.model.0.lora_A.weight"].is_meta

    def test_keys_may_be_mapped(self, tmp_path):
        get_peft_model(make_base(), lora("0")).save_pretrained(tmp_path)
        mapping = {r"^0\.": "first.", r"^0": "never", "lora_B": "nor this where the first matched"}
        assert list(load_peft_weights(tmp_path, key_mapping=mapping)) == [
            "base_model.model.first.lora_A.weight",
            "base_model.model.first.lora_B.weight",
        ]
        assert list(load_peft_weights(tmp_path, key_mapping={"^base_model": "x", "zzz": "y"})) == list(
            load_peft_weights(tmp_path)
        )

    def test_keys_without_wrapper_are_mapped_too(self, tmp_path):
        state = {"0.lora_A.weight": X}
        assert list(tunerkit.functional.renamed(state, {"^0": "1"})) == ["1.lora_A.weight"]
        assert list(tunerkit.functional.renamed(state, None)) == ["0.lora_A.weight"]

    def test_nowhere(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"There is no 'adapter_model.safetensors' in"):
            load_peft_weights(tmp_path)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = make_base()

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False)


class TestUseAdapter:
    def test_on_a_model_with_a_wrapper(self):
        model = get_peft_model(make_base(), lora())
        move_all(model)
        with use_adapter(model, []):
            assert same_bits(run(model), run(make_base()))
        assert difference(run(model), run(make_base())) > 1e-3

    def test_on_an_injected_model(self):
        base = inject_adapter_in_model(lora(), make_base(), "a")
        inject_adapter_in_model(lora(), base, "b")
        move_all(base)
        active = run(base)
        before = Snapshot.of(base)
        with use_adapter(base, "a"):
            routed = run(base)
        assert before.differences(base) == []
        assert difference(routed, active) > 1e-3
        with use_adapter(base, "b"):
            assert same_bits(run(base), active)
        with (
            pytest.raises(UnknownAdapterError, match="The model has no adapter 'c'; it has 'a', 'b'"),
            use_adapter(base, "c"),
        ):
            pytest.fail("the block must not be entered")
        assert before.differences(base) == []

    def test_holds_in_the_backward_of_an_injected_model(self):
        model = inject_adapter_in_model(lora("body.0"), Checkpointed(), "a")
        inject_adapter_in_model(lora("body.0"), model, "b")
        move_all(model)
        for _, layer in tuner_layers(model):
            layer.set_requires_grad(["a", "b"])
        with use_adapter(model, "a"):
            output = model(X)
        output.sum().backward()
        layer = model.body[0]
        assert layer.lora_A["a"].weight.grad.abs().sum() > 0
        assert layer.lora_A["b"].weight.grad is None

    def test_on_a_model_without_adapters(self):
        with pytest.raises(
            UnknownAdapterError, match=r"The model \(Sequential\) has no adapters. Attach one with get_peft_model"
        ):
            use_adapter(make_base(), "a").__enter__()


@pytest.mark.parametrize(
    "name",
    [
        "get_peft_model",
        "inject_adapter_in_model",
        "get_peft_model_state_dict",
        "set_peft_model_state_dict",
        "load_peft_weights",
    ],
)
def test_signatures_are_pefts(name):
    peft = pytest.importorskip("peft", reason="comparing with PEFT needs it")
    mine, theirs = (
        [
            (p.name, p.default)
            for p in inspect.signature(getattr(place, name)).parameters.values()
            if p.kind is not p.VAR_KEYWORD
        ]
        for place in (tunerkit, peft)
    )
    assert mine == theirs


class TestOnInjectedModels:
    """PEFT's `peft.functional`, for models without a `PeftModel` around them."""

    @pytest.fixture
    def base(self):
        base = inject_adapter_in_model(lora(), make_base(), "a")
        inject_adapter_in_model(lora("0"), base, "b")
        inject_adapter_in_model(IA3Config(target_modules=["2"], feedforward_modules=[]), base, "c")
        move_all(base)
        return base

    @staticmethod
    def trains(base):
        return {part for name, p in base.named_parameters() if p.requires_grad for part in name.split(".")} & set("abc")

    def test_set_adapter(self, base):
        functional.set_adapter(base, "a")
        assert (base[0].active_adapters, base[2].active_adapters) == (["a"], ["a"])
        assert self.trains(base) == {"a"}
        with_a = run(base)
        functional.set_adapter(base, ["a", "c"])
        assert self.trains(base) == {"a", "c"}
        assert difference(run(base), with_a) > 1e-3
        functional.set_adapter(base, "a", inference_mode=True)
        assert self.trains(base) == set()
        assert same_bits(run(base), with_a)
        with pytest.raises(UnknownAdapterError, match="The model has no adapter 'd'; it has 'a', 'b', 'c'"):
            functional.set_adapter(base, "d")

    def test_set_requires_grad(self, base):
        functional.set_requires_grad(base, ["a", "b"])
        assert self.trains(base) == {"a", "b", "c"}
        functional.set_requires_grad(base, "c", requires_grad=False)
        assert self.trains(base) == {"a", "b"}

    def test_delete_adapter(self, base):
        plain = make_base()
        assert functional.delete_adapter(base, "a", prefix="lora_") == ["c"]
        assert (base[0].available_adapters, base[2].available_adapters) == (["b"], ["c"])
        assert list(base.peft_config) == ["b", "c"]
        with pytest.warns(AdapterWarning, match="The active adapter 'c' was deleted; 'b'"):
            assert functional.delete_adapter(base, "c") == ["b"]
        assert type(base[2]) is nn.Linear
        assert functional.delete_adapter(base, "b") is None
        assert same_bits(run(base), run(plain))
        assert not hasattr(base, "peft_config")

    def test_delete_finds_layers_whatever_they_are_called(self):
        """PEFT passes over every module whose path holds the method's prefix and leaves the adapter there."""
        peft = pytest.importorskip("peft", reason="comparing with PEFT needs it")

        def make():
            return nn.ModuleDict({"lora_head": nn.Linear(3, 3), "other": nn.Linear(3, 3)})

        targets = {"target_modules": ["lora_head", "other"], "r": 2}
        mine = inject_adapter_in_model(LoraConfig(**targets), make())
        functional.delete_adapter(mine, "default", prefix="lora_")
        assert [type(module) for module in mine.values()] == [nn.Linear, nn.Linear]
        theirs = peft.inject_adapter_in_model(peft.LoraConfig(**targets), make())
        pytest.importorskip("peft.functional").delete_adapter(theirs, "default", prefix="lora_")
        assert list(theirs["lora_head"].lora_A) == ["default"]
        assert list(theirs["other"].lora_A) == []

    def test_on_a_peft_model(self):
        model = get_peft_model(make_base(), lora())
        model.add_adapter("b", lora("0"))
        functional.set_adapter(model, "b")
        assert model.active_adapters == ["b"]
        functional.delete_adapter(model, "default")
        assert list(model.peft_config) == ["b"]

    def test_without_adapters(self):
        calls = (functional.set_adapter, functional.delete_adapter, functional.set_requires_grad)
        for call in calls:
            with pytest.raises(UnknownAdapterError, match=r"The model \(Sequential\) has no adapters."):
                call(make_base(), "a")

    def test_names_are_pefts(self):
        theirs = pytest.importorskip("peft.functional", reason="comparing with PEFT needs it")
        assert [name for name in theirs.__all__ if not hasattr(functional, name)] == []


class TestCastAdapterDtype:
    def test_reaches_layers_and_parts(self):
        with registered(shared):
            model = get_peft_model(
                nn.Sequential(nn.Linear(4, 4)).bfloat16(),
                shared.Config(target_modules=["0"]),
                autocast_adapter_dtype=False,
            )
            adapted = [p for name, p in model.named_parameters() if "toy_" in name]
            assert {p.dtype for p in (*adapted, *model.base_model.parts["default"].parameters())} == {torch.bfloat16}
            tunerkit.cast_adapter_dtype(model, "default", autocast_adapter_dtype=False)
            assert adapted[0].dtype is torch.bfloat16
            tunerkit.cast_adapter_dtype(model, "default")
            assert {p.dtype for p in (*adapted, *model.base_model.parts["default"].parameters())} == {torch.float32}
            assert model.get_base_model()[0].base_layer.weight.dtype is torch.bfloat16
