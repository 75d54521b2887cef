"""Modules that an adapter trains and saves as a whole, on models of plain torch."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import pickle
import threading
import warnings
import weakref

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import tunerkit
from tunerkit import ModulesToSaveWrapper, PeftModel, get_peft_model, inject_adapter_in_model, plan
from tunerkit.errors import (
    AdapterStateError,
    AdapterWarning,
    CheckpointError,
    ConfigError,
    MergeError,
    MergeWarning,
    NoMatchingPeftModuleError,
    RouteError,
    TargetError,
    TargetWarning,
    UnsupportedSiteError,
)
from tunerkit.names import RESERVED_NAMES
from tunerkit.testing.bench import Snapshot, move
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoraConfig, LoraLayer

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("scratch", torch.ones(1), persistent=False)

    def forward(self, x):
        return self.out(self.dense(x).tanh()) * self.scratch

    def classes(self):
        return self.out.out_features


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = Head()

    def forward(self, x):
        return self.head(self.norm(self.lin(x)))


def make_base():
    torch.manual_seed(0)
    return Base().eval()


def lora(*saved, **settings):
    return LoraConfig(**{"target_modules": ["lin"], "r": 2, "modules_to_save": list(saved or ("head",)), **settings})


def run(model, x=X):
    with torch.no_grad():
        return model(x)


def make(*names, saved=("head",), base=None):
    """Return a model with adapters whose copies differ; the first is active."""
    model = get_peft_model(make_base() if base is None else base, lora(*saved), names[0] if names else "default")
    for name in names[1:]:
        model.add_adapter(name, lora(*saved))
    for seed, name in enumerate(names or ("default",)):
        move(model, name, seed)
    return model.eval()


def head_of(model):
    return model.get_base_model().head


def trained(model):
    return [name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad]


class TestTree:
    def test_names_are_those_of_peft(self):
        model = make("default", "b", saved=["norm"])
        names = [name for name, _ in model.named_parameters() if ".norm." in name]
        assert names == [
            "base_model.model.norm.original_module.weight",
            "base_model.model.norm.original_module.bias",
            "base_model.model.norm.modules_to_save.default.weight",
            "base_model.model.norm.modules_to_save.default.bias",
            "base_model.model.norm.modules_to_save.b.weight",
            "base_model.model.norm.modules_to_save.b.bias",
        ]

    def test_wrapper_is_no_layer_of_the_method(self):
        model = make()
        wrapper = head_of(model)
        assert type(wrapper) is ModulesToSaveWrapper
        assert not isinstance(wrapper, LoraLayer)
        assert model.base_model.targeted_module_names == ["lin"]
        assert model.supports_lora_conversion("default")
        assert not hasattr(wrapper, "base_layer")

    def test_attributes_are_those_of_the_copy_that_runs(self):
        model = make("a", "b")
        wrapper = head_of(model)
        assert wrapper.classes() == 3
        assert wrapper.out is wrapper.modules_to_save["a"].out
        model.set_adapter("b")
        assert wrapper.out is wrapper.modules_to_save["b"].out
        with model.use_adapter("a"):
            assert wrapper.out is wrapper.modules_to_save["a"].out
        with model.disable_adapter():
            assert wrapper.out is wrapper.original_module.out
        with pytest.raises(AttributeError, match="'Head' object has no attribute 'weight'"):
            _ = wrapper.weight
        with pytest.raises(AttributeError, match="'Head' object has no attribute 'colour'"):
            _ = wrapper.colour
        with pytest.raises(AttributeError, match="_secret"):
            _ = wrapper._secret

    def test_weight_and_bias_are_those_of_the_copy(self):
        model = make("a", "b", saved=["head.out"])
        wrapper = head_of(model).out
        assert wrapper.weight is wrapper.modules_to_save.a.weight
        assert wrapper.bias is wrapper.modules_to_save.a.bias
        assert wrapper.out_features == 3

    def test_modules_to_save_of_the_model(self):
        model = get_peft_model(make_base(), LoraConfig(target_modules=["lin"]))
        assert model.modules_to_save is None
        model.add_adapter("b", lora("head", "norm"))
        assert model.modules_to_save == {"head", "norm"}


class TestActive:
    def test_each_adapter_has_a_copy_of_its_own(self):
        model, base = make("a", "b"), make_base()
        a = run(model)
        model.set_adapter("b")
        b = run(model)
        assert min((a - b).abs().max(), (a - run(base)).abs().max(), (b - run(base)).abs().max()) > 1e-3
        wrapper = head_of(model)
        hidden = torch.randn(2, 4)
        assert torch.equal(wrapper(hidden), wrapper.modules_to_save["b"](hidden))
        model.set_adapter("a")
        assert torch.equal(run(model), a)

    def test_new_copy_starts_as_the_original(self):
        model = make("a")
        model.add_adapter("new", lora("head"))
        wrapper = head_of(model)
        for key, tensor in wrapper.original_module.state_dict().items():
            assert torch.equal(wrapper.modules_to_save["new"].state_dict()[key], tensor)

    def test_original_runs_where_the_active_adapter_has_no_copy(self):
        model = make("a")
        model.add_adapter("b", LoraConfig(target_modules=["lin"], init_lora_weights=True))
        model.set_adapter("b")
        assert torch.equal(run(model), run(make_base()))  # B of LoRA is zero
        assert trained(model) == ["lin.lora_A.b.weight", "lin.lora_B.b.weight"]

    def test_disabled_is_the_base_bit_for_bit(self):
        model = make("a", "b")
        expected = run(model)
        with model.disable_adapter():
            assert torch.equal(run(model), run(make_base()))
            assert trained(model) == []
            model.set_adapter("b")
            assert torch.equal(run(model), run(make_base()))
            model.set_adapter("a")
        assert torch.equal(run(model), expected)
        assert len(trained(model)) == 2 + 4

    def test_only_the_active_copy_trains(self):
        model = make("a", "b")
        assert [name for name in trained(model) if "head" in name] == [
            f"head.modules_to_save.a.{name}" for name in ("dense.weight", "dense.bias", "out.weight", "out.bias")
        ]
        model.set_adapter("b", inference_mode=True)
        assert trained(model) == []
        model.set_requires_grad("a")
        assert {name.split(".")[2] for name in trained(model)} == {"a"}

    def test_two_copies_of_one_module_cannot_be_active(self):
        model = make("a", "b")
        model.add_adapter("other", LoraConfig(target_modules=["lin"]))
        before = Snapshot.of(model)
        message = (
            "'a', 'b' cannot be active together: each has a copy of its own of the module 'head', and only one can "
            "take its place. Choose one of them."
        )
        for call in (model.set_adapter, lambda names: model.use_adapter(names).__enter__(), head_of(model).set_adapter):
            with pytest.raises(AdapterStateError) as caught:
                call(["a", "b"])
            assert str(caught.value) == message
        assert before.differences(model) == []
        model.set_adapter(["other", "b"])
        assert head_of(model).out is head_of(model).modules_to_save["b"].out

    def test_copies_of_different_modules_can_be_active_together(self):
        model = get_peft_model(make_base(), lora("head"), "a")
        model.add_adapter("b", lora("norm"))
        move(model, "a")
        move(model, "b", 1)
        model.set_adapter(["a", "b"])
        base = model.get_base_model()
        assert base.head.out is base.head.modules_to_save["a"].out
        assert base.norm.weight is base.norm.modules_to_save["b"].weight

    def test_mode_follows_the_model(self):
        model = make()
        copied = head_of(model).modules_to_save["default"]
        assert not copied.training
        model.train()
        assert copied.training
        model.eval()
        model.add_adapter("b", lora())
        assert not any(module.training for module in head_of(model).modules())


class TestRoutes:
    def test_a_call_is_routed(self):
        model = make("a", "b")
        a = run(model)
        model.set_adapter("b")
        b = run(model)
        with model.use_adapter("a"):
            assert torch.equal(run(model), a)
            with model.use_adapter([]):
                assert torch.equal(run(model), run(make_base()))
        assert torch.equal(run(model), b)

    def test_a_thread_has_its_own_route(self):
        model = make("a", "b")
        expected = {}
        for name in ("b", "a"):
            model.set_adapter(name)
            expected[name] = run(model)
        results, barrier = {}, threading.Barrier(2)

        def work(name):
            with model.use_adapter(name):
                barrier.wait()
                results[name] = [run(model) for _ in range(50)]

        threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(result, expected[name]) for name in expected for result in results[name])

    def test_route_is_held_in_the_backward(self):
        class Checkpointed(Base):
            def forward(self, x):
                hidden = self.norm(self.lin(x))
                return torch.utils.checkpoint.checkpoint(self.head, hidden, use_reentrant=False)

        torch.manual_seed(0)
        model = make("a", "b", base=Checkpointed().eval())
        copied = head_of(model).modules_to_save["b"]
        model.set_requires_grad("b")
        gradients = []
        for again in (False, True):
            model.zero_grad()
            if again:
                with model.use_adapter("b"):
                    output = model(X)  # the backward runs the head again, after the block
            else:
                model.set_adapter("b")
                output = model(X)
            output.square().sum().backward()
            gradients.append(copied.out.weight.grad.clone())
            model.set_adapter("a")
            model.set_requires_grad("b")
        assert gradients[0].abs().max() > 1e-3
        assert torch.equal(*gradients)

    def test_part_called_by_itself_with_checkpointing_is_refused(self):
        model = make("a", "b")
        hidden = torch.randn(2, 4, requires_grad=True)
        with model.use_adapter("b"), pytest.raises(RouteError, match="A part of the model was called"):
            torch.utils.checkpoint.checkpoint(head_of(model), hidden, use_reentrant=False)


class TestRows:
    NAMES = ("b", "__base__", "a", "b", "plain")

    def rows_model(self, base=None):
        model = make("a", "b", base=base)
        model.add_adapter("plain", LoraConfig(target_modules=["lin"], r=2))
        move(model, "plain", 5)
        return model.eval()

    def expected(self, model):
        outputs = []
        for row, name in enumerate(self.NAMES):
            with model.use_adapter([] if name == "__base__" else name):
                outputs.append(run(model, X[row : row + 1]))
        return torch.cat(outputs)

    def test_each_row_has_the_copy_of_its_adapter(self):
        model = self.rows_model()
        with torch.no_grad():
            found = model(X, adapter_names=list(self.NAMES))
        torch.testing.assert_close(found, self.expected(model), atol=1e-6, rtol=1e-6)

    def test_original_where_no_adapter_has_a_copy(self):
        model = self.rows_model()
        with torch.no_grad():
            found = model(X[:2], adapter_names=["__base__", "plain"])
        torch.testing.assert_close(found[0], run(make_base(), X[:1])[0], atol=1e-6, rtol=1e-6)

    def test_gradients_go_to_each_copy(self):
        model = self.rows_model()
        for name in ("a", "b"):
            model.set_requires_grad(name)
        model(X, adapter_names=list(self.NAMES)).square().sum().backward()
        copies = head_of(model).modules_to_save
        assert copies["a"].out.weight.grad.abs().max() > 1e-3
        assert not torch.equal(copies["a"].out.weight.grad, copies["b"].out.weight.grad)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_rows_are_held_in_the_backward(self, reentrant):
        class Checkpointed(Base):
            def forward(self, x):
                hidden = self.norm(self.lin(x))
                return torch.utils.checkpoint.checkpoint(self.head, hidden, use_reentrant=reentrant)

        gradients = []
        for base in (Base, Checkpointed):
            torch.manual_seed(0)
            model = self.rows_model(base().eval())
            model.set_requires_grad(["a", "b"])
            with model.use_rows(self.NAMES):
                output = model(X)
            output.square().sum().backward()  # it runs the head again, after the block
            copies = head_of(model).modules_to_save
            gradients.append([copies[name].out.weight.grad for name in ("a", "b")])
        for plain, again in zip(*gradients, strict=True):
            assert plain.abs().max() > 1e-3
            torch.testing.assert_close(again, plain)

    def test_other_tensors_beside_the_input_are_refused(self):
        model = make("a", "b", saved=["norm"])
        with (
            model.base_model.use_rows(["a", "b"]),
            pytest.raises(RouteError, match="the layer 'norm' takes other tensors beside its input"),
        ):
            model.get_base_model().norm(X[:2], X[:2])

    def test_input_whose_first_dimension_is_not_the_rows_is_refused(self):
        model = self.rows_model()
        with model.base_model.use_rows(["a", "b"]), pytest.raises(RouteError, match="the layer 'head' got an input of"):
            head_of(model)(X[:3])

    def test_reading_what_differs_is_refused(self):
        model = self.rows_model()
        head = head_of(model)
        with model.base_model.use_rows(["a", "b"]), pytest.raises(RouteError) as caught:
            _ = head.out
        assert str(caught.value) == (
            "Each row of the batch has an adapter of its own, and the parameters of the layer 'head' are read for the "
            "whole batch, with 'a' among the adapters. Call the model once for each adapter, within use_adapter(name)."
        )
        with model.base_model.use_rows(["plain", "__base__"]):
            assert head.out is head.original_module.out


class TestDeleting:
    def test_original_object_comes_back_with_the_last_copy(self):
        base = make_base()
        head = base.head
        model = get_peft_model(base, lora(), "a")
        model.add_adapter("b", lora())
        model.delete_adapter("b")
        assert isinstance(base.head, ModulesToSaveWrapper)
        assert base.head.available_adapters == ["a"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AdapterWarning)
            model.delete_adapter("a")
        assert base.head is head

    def test_another_becomes_active(self):
        model = make("a", "b")
        model.set_adapter("b")
        b = run(model)
        model.set_adapter("a")
        with pytest.warns(AdapterWarning, match="'a' was deleted; 'b' of 'b' is now"):
            model.delete_adapter("a")
        assert torch.equal(run(model), b)
        assert all(".b." in name for name in trained(model))

    def test_copy_goes_with_its_adapter_whatever_the_module_is_called(self):
        # PEFT passes over layers whose path contains what its method's entries begin with.
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.lora_head = nn.Linear(4, 4)
                self.lora_lin = nn.Linear(4, 4)

            def forward(self, x):
                return self.lora_head(self.lora_lin(x))

        model = get_peft_model(Model(), lora("lora_head", target_modules=["lora_lin"]))
        model.add_adapter("b", lora("lora_head", target_modules=["lora_lin"]))
        model.delete_adapter("b")
        assert [name for name, _ in model.named_parameters() if ".b." in name] == []

    def test_layer_by_itself(self):
        model = make("a", "b")
        wrapper = head_of(model)
        with pytest.warns(AdapterWarning, match="The active adapter 'a' was deleted; 'b' of 'b' is active now"):
            wrapper.delete_adapter("a")
        assert wrapper.out is wrapper.modules_to_save["b"].out
        wrapper.delete_adapter("nobody")
        assert wrapper.available_adapters == ["b"]


class TestUnloading:
    def test_unload_gives_the_objects_back(self):
        base = make_base()
        base.norm.weight.requires_grad_(requires_grad=False)
        before = Snapshot.of(base)
        model = get_peft_model(base, lora("head", "norm"), "a")
        model.add_adapter("b", lora("head"))
        move(model, "a")
        assert model.unload() is base
        assert before.differences(base) == []

    def test_merged_model_keeps_the_copy(self):
        base = make_base()
        base.head.dense.weight.requires_grad_(requires_grad=False)
        model = make("a", "b", base=base)
        expected = run(model)
        merged = model.merge_and_unload()
        torch.testing.assert_close(run(merged), expected, atol=1e-6, rtol=1e-6)
        assert type(merged.head) is Head
        flags = {name: p.requires_grad for name, p in merged.named_parameters()}
        assert flags.pop("head.dense.weight") is False
        assert all(flags.values())

    def test_copies_that_are_not_merged_go(self):
        base = make_base()
        head = base.head
        model = make("a", base=base)
        model.add_adapter("b", LoraConfig(target_modules=["lin"]))
        move(model, "b", 3)
        model.set_adapter("b")
        expected = run(model)
        merged = model.merge_and_unload()
        assert merged.head is head
        torch.testing.assert_close(run(merged), expected, atol=1e-6, rtol=1e-6)

    def test_named_adapter_need_not_be_active(self):
        model = make("a", "b")
        model.set_adapter("b")
        expected = run(model)
        model.set_adapter("a")
        torch.testing.assert_close(run(model.merge_and_unload(adapter_names=["b"])), expected, atol=1e-6, rtol=1e-6)

    def test_nothing_of_the_original_is_kept(self):
        model = make()
        original = weakref.ref(head_of(model).original_module)
        model.merge_and_unload()
        gc.collect()
        assert original() is None

    @pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
    def test_two_copies_of_one_module_cannot_be_merged(self, call):
        model = make("a", "b")
        before = Snapshot.of(model)
        with pytest.raises(MergeError) as caught:
            getattr(model, call)(adapter_names=["a", "b"])
        assert str(caught.value) == (
            "'a', 'b' cannot be merged together: each has a copy of its own of the module 'head', and only one can "
            "take its place. Choose one of them."
        )
        assert before.differences(model) == []

    def test_merging_in_place_leaves_the_copy_beside_the_original(self):
        model = make("a", "b")
        expected = run(model)
        model.merge_adapter()
        torch.testing.assert_close(run(model), expected, atol=1e-6, rtol=1e-6)
        assert head_of(model).original_module.out.weight is not head_of(model).out.weight
        with model.disable_adapter():
            assert torch.equal(run(model), run(make_base()))
        torch.testing.assert_close(run(model), expected, atol=1e-6, rtol=1e-6)
        model.unmerge_adapter()
        assert torch.equal(run(model), expected)
        model.merge_adapter()
        with pytest.warns(MergeWarning, match="unmerged before others become active"):
            model.set_adapter("b")
        assert not model.base_model.model.lin.merged
        head_of(model).unmerge()


class TestFiles:
    def test_keys_have_no_infix(self, tmp_path):
        model = make("default", "b", saved=["head.out"])
        model.save_pretrained(tmp_path)
        for folder in (tmp_path, tmp_path / "b"):
            assert sorted(load_file(folder / "adapter_model.safetensors")) == [
                "base_model.model.head.out.bias",
                "base_model.model.head.out.weight",
                "base_model.model.lin.lora_A.weight",
                "base_model.model.lin.lora_B.weight",
            ]
        assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["head.out"]

    def test_persistent_buffers_are_saved_too(self):
        keys = [key.rpartition(".")[2] for key in tunerkit.get_peft_model_state_dict(make())]
        assert "calls" in keys
        assert "scratch" not in keys

    @pytest.mark.parametrize("low", [False, True])
    @pytest.mark.parametrize("strict", [False, True])
    def test_loaded_adapters_compute_the_same(self, tmp_path, low, strict):
        model = make("default", "b")
        model.save_pretrained(tmp_path)
        options = {"low_cpu_mem_usage": low, "strict": strict}
        loaded = PeftModel.from_pretrained(make_base(), tmp_path, **options)
        report = loaded.load_adapter(tmp_path / "b", "again", **options)
        assert report.complete
        assert trained(loaded) == []
        assert not any(tensor.is_meta for tensor in loaded.parameters())
        for ours, theirs in (("default", "default"), ("b", "again")):
            model.set_adapter(ours)
            loaded.set_adapter(theirs)
            assert torch.equal(run(loaded), run(model))

    def test_missing_copy_is_refused(self, tmp_path):
        get_peft_model(make_base(), LoraConfig(target_modules=["lin"], r=2)).save_pretrained(tmp_path)
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "modules_to_save": ["norm"]}))
        base = make_base()
        before = Snapshot.of(base)
        with pytest.raises(CheckpointError, match=r"that it lacks: 'base_model.model.norm.weight'"):
            PeftModel.from_pretrained(base, tmp_path)
        assert before.differences(base) == []

    def test_gathered_state(self):
        model = make("default", "b")
        gathered = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        expected = tunerkit.get_peft_model_state_dict(model, adapter_name="b")
        found = tunerkit.get_peft_model_state_dict(model, gathered, adapter_name="b")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)

    def test_model_whose_original_is_on_meta(self, tmp_path):
        make().save_pretrained(tmp_path)
        base = make_base()
        base.head.to("meta")
        loaded = PeftModel.from_pretrained(base, tmp_path)
        assert not any(tensor.is_meta for tensor in head_of(loaded).modules_to_save.parameters())

    def test_injected(self):
        base = make_base()
        inject_adapter_in_model(lora("norm"), base)
        assert sorted(tunerkit.get_peft_model_state_dict(base)) == [
            "lin.lora_A.weight",
            "lin.lora_B.weight",
            "norm.bias",
            "norm.weight",
        ]
        state = tunerkit.get_peft_model_state_dict(base)
        other = make_base()
        inject_adapter_in_model(lora("norm", target_modules=["head.out"]), other, state_dict=state)
        assert isinstance(other.norm, ModulesToSaveWrapper)
        assert isinstance(other.lin, LoraLayer)
        assert not isinstance(other.head.out, LoraLayer)


class TestCopies:
    @pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301 - our own bytes
    def test_a_copy_of_the_model_has_copies_of_its_own(self, way):
        model = make("a", "b")
        other = way(model)
        assert torch.equal(run(other), run(model))
        other.set_adapter("b")
        model.set_adapter("b")
        assert torch.equal(run(other), run(model))
        with other.use_adapter("a"), model.use_adapter("a"):
            assert torch.equal(run(other), run(model))
        move(other, "b")
        assert (run(other) - run(model)).abs().max() > 1e-3

    def test_state_dict_and_dtype(self):
        model, other = make("a"), get_peft_model(make_base(), lora(), "a").eval()
        other.load_state_dict(model.state_dict())
        assert torch.equal(run(other), run(model))
        assert run(other.double(), X.double()).dtype == torch.float64

    def test_precision_is_that_of_the_module(self):
        # As in PEFT, which casts the adapter's tensors only.
        model = get_peft_model(make_base().bfloat16(), lora())
        copied = head_of(model).modules_to_save["default"]
        assert {tensor.dtype for tensor in copied.parameters()} == {torch.bfloat16}
        assert model.get_base_model().lin.lora_A["default"].weight.dtype == torch.float32
        assert run(model, X.bfloat16()).dtype == torch.bfloat16

    def test_all_parameters_train_and_numbers_that_cannot_stay(self):
        base = make_base()
        base.head.dense.weight.requires_grad_(requires_grad=False)
        base.head.table = nn.Parameter(torch.ones(2, dtype=torch.int32), requires_grad=False)
        base.head.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        model = get_peft_model(base, lora())
        names = {name.removeprefix("head.modules_to_save.default.") for name in trained(model) if "head" in name}
        assert names == {"dense.weight", "dense.bias", "out.weight", "out.bias", "phase"}

    def test_module_that_cannot_be_copied(self):
        base = make_base()
        base.head.out.cache = base.head.out.weight * 2
        before = Snapshot.of(base)
        with pytest.raises(
            UnsupportedSiteError, match=r"'head' \(Head\), whose attribute 'out.cache' is a tensor that was computed"
        ):
            get_peft_model(base, lora())
        assert before.differences(base) == []


class TestMatching:
    def test_entry_is_a_whole_path_or_its_end_after_a_dot(self):
        base = make_base()
        base.lora_head = nn.Linear(1, 1)  # PEFT takes it for `head`
        get_peft_model(base, lora("head"))
        assert isinstance(base.head, ModulesToSaveWrapper)
        assert type(base.lora_head) is nn.Linear

    @pytest.mark.parametrize("saved", [["head", "out"], ["head.out", "head"], ["head", "head.out"]])
    def test_module_inside_another_is_part_of_it(self, saved):
        model = get_peft_model(make_base(), lora(*saved))
        assert isinstance(head_of(model), ModulesToSaveWrapper)
        assert [path for path, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)] == [
            "base_model.model.head"
        ]

    def test_module_at_several_places_has_one_copy_at_those_that_are_meant(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.lin = nn.Linear(4, 4)
                self.a = nn.Linear(4, 4)
                self.b = self.c = self.a

            def forward(self, x):
                return self.c(self.b(self.a(self.lin(x))))

        base = Model()
        shared = base.a
        model = get_peft_model(base, lora("a", "b"))
        assert base.a is base.b
        assert base.c is shared
        assert [key for key in tunerkit.get_peft_model_state_dict(model) if "lora" not in key] == [
            "base_model.model.a.weight",
            "base_model.model.a.bias",
        ]
        move(model, "default")
        expected = run(model)
        merged = model.merge_and_unload()
        assert merged.a is merged.b
        assert merged.c is shared
        torch.testing.assert_close(run(merged), expected, atol=1e-6, rtol=1e-6)

    def test_what_is_inside_is_not_adapted(self):
        model = get_peft_model(make_base(), lora("head", target_modules=["lin", "out", "head.dense"]))
        assert model.base_model.targeted_module_names == ["lin"]

    def test_all_linear_leaves_copies_alone(self):
        model = get_peft_model(make_base(), lora("head", target_modules="all-linear"))
        assert model.base_model.targeted_module_names == ["lin"]
        model.add_adapter("b", LoraConfig(target_modules="all-linear"))
        assert model.peft_config["b"].target_modules == {"lin"}

    def test_entry_that_matches_nothing_warns(self):
        with pytest.warns(TargetWarning) as caught:
            get_peft_model(make_base(), lora("heads", "norm"))
        [warning] = caught
        assert str(warning.message) == (
            "'heads' in modules_to_save matches nothing; closest: 'head', 'head.dense', 'head.out'. The other entries "
            "were matched."
        )

    def test_warning_made_an_error_leaves_the_model(self):
        base = make_base()
        before = Snapshot.of(base)
        with pytest.raises(TargetWarning):
            get_peft_model(base, lora("heads", "norm"))
        assert before.differences(base) == []

    def test_one_name_of_a_head_is_enough(self):
        base = make_base()
        base.score = nn.Linear(1, 1)
        get_peft_model(base, lora("classifier", "score"))
        with pytest.warns(TargetWarning) as caught:
            get_peft_model(make_base(), lora("classifier", "score"))
        assert len(caught) == 2

    def test_only_modules_to_save_are_targeted(self):
        with pytest.raises(NoMatchingPeftModuleError) as caught:
            get_peft_model(make_base(), lora("head", target_modules=["head"], exclude_modules=["norm"]))
        assert str(caught.value) == (
            "target_modules=['head'] matches 1 modules, and all of them are excluded by exclude_modules=['norm'] and "
            "modules_to_save=['head']. Exclude fewer, or target others."
        )

    def test_a_name_that_is_not_in_a_list_is_refused(self):
        with pytest.raises(ConfigError, match="modules_to_save must be a list of text or None; it is 'head'"):
            LoraConfig(modules_to_save="head")

    def test_plan_says_what_is_copied(self):
        made = plan(make_base(), lora("head", "nose", target_modules=["lin", "out"]))
        assert str(made).splitlines() == [
            "module    type    decision  why                         count",
            "lin       Linear  adapted   'lin'                       1",
            "head      Head    copied    modules_to_save             1",
            "head.out  Linear  excluded  in 'head', which is copied  1",
            "1 of 5 modules adapted, 1 copied, 2 not matched",
            "'nose' in modules_to_save matches nothing; closest: 'dense', 'norm'",
        ]


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.many = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.named = nn.ModuleDict({"one": nn.Linear(4, 4)})
        self.loose = nn.ParameterList([torch.ones(1)])
        self.called = nn.ParameterDict({"one": torch.ones(1)})

    def forward(self, x):
        return self.many[0](self.lin(x))


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "kind", "inside"),
        [
            ("many", "ModuleList", "'0', '1'"),
            ("named", "ModuleDict", "'one'"),
            ("loose", "ParameterList", "none"),
            ("called", "ParameterDict", "none"),
        ],
    )
    def test_containers(self, name, kind, inside):
        base = Parts()
        before = Snapshot.of(base)
        with pytest.raises(TypeError) as caught:
            get_peft_model(base, lora(name))
        assert str(caught.value) == (
            f"modules_to_save means {name!r}, a {kind}, which is never called as a whole, so a copy of it would never "
            f"be run. Name the modules in it: {inside}."
        )
        assert before.differences(base) == []
        get_peft_model(base, lora("many.0"))

    @pytest.mark.parametrize(
        ("target", "saved", "where"),
        [("lin", "lin", "lin"), ("head.out", "head", "head.out"), ("dense", "head", "head.dense")],
    )
    def test_adapted_layers(self, target, saved, where):
        model = get_peft_model(make_base(), LoraConfig(target_modules=[target]))
        before = Snapshot.of(model)
        kind = "Linear" if saved == "lin" else "Head"
        with pytest.raises(UnsupportedSiteError) as caught:
            model.add_adapter("b", lora(saved, target_modules=["norm" if saved == "lin" else "lin"]))
        assert str(caught.value).startswith(f"modules_to_save means {saved!r} ({kind}), and {where!r} has adapters")
        assert str(caught.value).endswith(
            "already ('default'), which a copy would take along. Name another module, or take those adapters out first "
            "with delete_adapter()."
        )
        assert before.differences(model) == []
        assert list(model.peft_config) == ["default"]

    @pytest.mark.parametrize(("first", "second"), [("head", "head.out"), ("head.out", "head")])
    def test_modules_inside_those_of_other_adapters(self, first, second):
        model = get_peft_model(make_base(), lora(first))
        with pytest.raises(UnsupportedSiteError, match=rf"means '{second}' \(.*\), and '{first}' has adapters already"):
            model.add_adapter("b", lora(second))
        model.add_adapter("c", lora(first))

    @pytest.mark.parametrize("target", ["head.out", "head.dense"])
    def test_targets_inside_those_of_other_adapters(self, target):
        model = get_peft_model(make_base(), lora("head"))
        before = Snapshot.of(model)
        with pytest.raises(TargetError) as caught:
            model.add_adapter("b", IA3Config(target_modules=[target], feedforward_modules=[]))
        assert str(caught.value) == (
            f"The module {target!r} cannot be adapted: 'default' trains a copy of 'head' as a whole (modules_to_save), "
            "and a copy has no adapters in it. Exclude the module, or put it into modules_to_save of this adapter too."
        )
        assert before.differences(model) == []

    def test_module_inside_an_adapted_layer(self):
        from toys.layer_by_hand import GatedLayer

        base = make_base()
        inner = nn.Sequential(nn.Linear(4, 4))
        base.lin = GatedLayer(inner)
        base.lin.rank["other"] = 1
        with pytest.raises(UnsupportedSiteError, match=r"means 'lin.0' \(Linear\), and 'lin' has adapters already"):
            get_peft_model_around(base)


def get_peft_model_around(base):
    return inject_adapter_in_model(lora("lin.0", target_modules=["norm", "head.out"]), base)


NAMES = st.sampled_from(
    ["lin", "head", "0", "weight", "bias", "default", "lora_A", "modules_to_save", "original_module", "base_layer"]
) | st.text("ab_0-é", min_size=1, max_size=4)


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_whatever_things_are_called_they_come_back(tmp_path_factory, data):
    taken = frozenset(dir(nn.Module())) | {"x"}
    outer, target, saved = (data.draw(NAMES) for _ in range(3))
    adapters = data.draw(st.lists(NAMES, min_size=2, max_size=3, unique=True))
    assume(target != saved)
    assume(not {outer, target, saved} & taken)
    assume(not set(adapters) & RESERVED_NAMES)

    class Inner(nn.Module):
        def forward(self, x):
            return self._modules[saved](self._modules[target](x))

    class Outer(nn.Module):
        def forward(self, x):
            return self._modules[outer](x)

    def build():
        torch.manual_seed(0)
        model, inner = Outer(), Inner()
        inner.add_module(target, nn.Linear(4, 4))
        inner.add_module(saved, nn.Linear(4, 4))
        model.add_module(outer, inner)
        return model.eval()

    config = lora(f"{outer}.{saved}", target_modules=[f"{outer}.{target}"])
    model = get_peft_model(build(), config, adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, config)
    for seed, name in enumerate(adapters):
        move(model, name, seed)
    model.eval()
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    loaded = None
    for name in adapters:
        place = folder if name == "default" else folder / name
        assert len(load_file(place / "adapter_model.safetensors")) == 4
        if loaded is None:
            loaded = PeftModel.from_pretrained(build(), place, name)
        else:
            loaded.load_adapter(place, name)
    outputs = []
    for name in adapters:
        model.set_adapter(name)
        loaded.set_adapter(name)
        outputs.append(run(model))
        assert torch.equal(run(loaded), outputs[-1])
    assert all((one - other).abs().max() > 1e-3 for one, other in itertools.pairwise(outputs))
