from __future__ import annotations

import types
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from tunerkit import BaseTunerLayer, Method, PeftConfig, get_peft_model, hookimpl, plugins, register
from tunerkit.adapter import Adapter
from tunerkit.errors import ArgumentError, MergeError, MergeWarning, RouteError, UnknownAdapterError
from tunerkit.testing.bench import Snapshot, difference, move, same_bits
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoraConfig

X = torch.linspace(-1, 1, 15).reshape(5, 3)


def make_base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.Linear(4, 2))


def run(model):
    with torch.no_grad():
        return model(X)


@pytest.fixture
def model():
    """Two adapters that overlap on the first layer; the second stands on the first, with which it does not commute."""
    model = get_peft_model(make_base(), LoraConfig(target_modules=["0", "2"], r=2), "one")
    model.add_adapter("two", IA3Config(target_modules=["0", "3"], feedforward_modules=[]))
    for name in ("one", "two"):
        move(model, name)
    model.set_adapter(["one", "two"])
    assert difference(run(model), run(make_base())) > 1e-3
    return model


def spoil(model, name):
    with torch.no_grad():
        model.get_base_model()[2].lora_B[name].weight[0, 0] = torch.nan


class TestMerge:
    @pytest.mark.parametrize("safe", [True, False])
    def test_is_equal_and_is_undone_exactly(self, model, safe):
        output, before = run(model), Snapshot.of(model)
        model.merge_adapter(safe_merge=safe)
        assert [layer.merged_adapters for layer in model.base_model.layers()] == [["one", "two"], ["one"], ["two"]]
        torch.testing.assert_close(run(model), output)
        assert not same_bits(model.get_base_model()[0].base_layer.weight, make_base()[0].weight)
        model.unmerge_adapter()
        assert before.differences(model) == []
        assert same_bits(run(model), output)

    def test_one_after_the_other(self, model):
        output = run(model)
        model.merge_adapter(["one"])
        torch.testing.assert_close(run(model), output)
        model.merge_adapter(["two"])
        torch.testing.assert_close(run(model), output)
        model.unmerge_adapter()
        model.unmerge_adapter()
        assert same_bits(run(model), output)

    def test_again_is_warned_about(self, model):
        model.merge_adapter(["one"])
        with pytest.warns(MergeWarning, match="'one' is merged already and is not merged again."):
            model.merge_adapter()
        assert model.get_base_model()[0].merged_adapters == ["one", "two"]

    def test_order_that_cannot_be_kept_is_refused_everywhere(self, model):
        before = Snapshot.of(model)
        with pytest.raises(
            MergeError, match="On '0' the adapters stand in the order 'one', 'two', and 'two' does not commute"
        ):
            model.merge_adapter(["two"])
        assert before.differences(model) == []

    def test_adapters_that_commute_may_be_merged_in_any_order(self, model):
        model.set_adapter(["one"])
        model.add_adapter("three", LoraConfig(r=2, target_modules=["0"]))
        model.set_adapter(["one", "three"])
        move(model, "three")
        output = run(model)
        model.merge_adapter(["three"])
        torch.testing.assert_close(run(model), output)

    def test_safe_merge_refuses_nan_everywhere(self, model):
        spoil(model, "one")
        before = Snapshot.of(model)
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(MergeError, match="Merging into '2' would put NaN or infinities into its weight"):
                merge(safe_merge=True)
            assert before.differences(model) == []
        model.merge_adapter()
        assert torch.isnan(model.get_base_model()[2].base_layer.weight).any()

    def test_text_for_a_list(self, model):
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(
                ArgumentError, match=r"adapter_names is a list of names; it is the text 'one'. Pass \['one'\]."
            ):
                merge(adapter_names="one")

    def test_unknown(self, model):
        with pytest.raises(UnknownAdapterError, match=r"The model has no adapter 'three'; it has 'one', 'two'."):
            model.merge_adapter(["three"])

    def test_nothing_active(self, model):
        before = Snapshot.of(model)
        with pytest.warns(MergeWarning, match="No adapter is active, so nothing is merged."):
            model.merge_adapter([])
        assert before.differences(model) == []

    def test_while_disabled(self, model):
        model.base_model.disable_adapter_layers()
        with pytest.raises(MergeError, match=r"The adapters of '0' are disabled; enable them before merging."):
            model.merge_adapter()

    def test_disabling_takes_out_and_puts_back(self, model):
        model.merge_adapter()
        output = run(model)
        with model.disable_adapter():
            assert same_bits(run(model), run(make_base()))
            assert same_bits(model.get_base_model()[0].base_layer.weight, make_base()[0].weight)
        assert model.get_base_model()[0].merged_adapters == ["one", "two"]
        assert same_bits(run(model), output)


class TestMergeAndUnload:
    @pytest.mark.parametrize("options", [{}, {"safe_merge": True}, {"progressbar": True}])
    def test_plain_model_computes_the_same(self, model, options, capsys):
        output, base = run(model), model.get_base_model()
        assert model.merge_and_unload(**options) is base
        assert [type(layer) for layer in base] == [nn.Linear, nn.Tanh, nn.Linear, nn.Linear]
        torch.testing.assert_close(run(base), output)
        assert all(parameter.requires_grad for parameter in base.parameters())
        assert not hasattr(base, "peft_config")
        assert ("merging" in capsys.readouterr().err) == bool(options.get("progressbar"))

    def test_some_of_them(self, model):
        model.set_adapter("one")
        output = run(model)
        base = model.merge_and_unload(adapter_names=["one"])
        torch.testing.assert_close(run(base), output)

    def test_what_trained_before_trains_again(self):
        base = make_base()
        base[0].weight.requires_grad_(requires_grad=False)
        base[2].weight.requires_grad_(requires_grad=False)
        get_peft_model(base, LoraConfig(target_modules=["0", "3"])).merge_and_unload()
        assert [name for name, p in base.named_parameters() if p.requires_grad] == ["0.bias", "3.weight", "3.bias"]

    def test_keeps_no_original(self):
        base = make_base()
        weights = [weakref.ref(base[place].weight) for place in (0, 2, 3)]
        model = get_peft_model(base, LoraConfig(target_modules=["0", "2"]))
        gone_at_the_second = []
        second = base[2]
        merge = second.merge
        second.merge = lambda **options: (gone_at_the_second.append(weights[0]() is None), merge(**options))
        model.merge_and_unload()
        assert gone_at_the_second == [True]
        assert [alive() is None for alive in weights] == [True, True, False]

    def test_after_merging(self, model):
        output = run(model)
        model.merge_adapter(["one"])
        with pytest.warns(MergeWarning, match="'one' is merged already"):
            base = model.merge_and_unload()
        torch.testing.assert_close(run(base), output)

    def test_interrupted_half_way_computes_what_it_did(self, model, monkeypatch):
        output = run(model)
        second = model.get_base_model()[2]
        monkeypatch.setattr(type(second), "merge", interrupting(type(second).merge, second))
        with pytest.raises(KeyboardInterrupt):
            model.merge_and_unload()
        monkeypatch.undo()
        torch.testing.assert_close(run(model), output)
        base = model.merge_and_unload()
        torch.testing.assert_close(run(base), output)
        assert all(parameter.requires_grad for parameter in base.parameters())

    def test_adapter_that_cannot_be_merged_is_refused_before_anything_is_done(self, model, monkeypatch):
        adapter = model.get_base_model()[3].adapters["two"]
        adapter.unfoldable = "it is a toy"
        before = Snapshot.of(model)
        with pytest.raises(
            MergeError, match=r"The adapter 'two' on '3' cannot be merged: it is a toy. Keep it as an adapter."
        ):
            model.merge_and_unload()
        assert before.differences(model) == []


def interrupting(merge, victim):
    def interrupted(layer, *args, **kwargs):
        if layer is victim:
            raise KeyboardInterrupt
        return merge(layer, *args, **kwargs)

    return interrupted


@pytest.mark.filterwarnings("ignore::tunerkit.errors.TyingWarning")
class TestTiedEmbeddings:
    class Model(nn.Module):
        def __init__(self, *, tied=True) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight
            self.config = types.SimpleNamespace(tie_word_embeddings=tied, to_dict=dict)

        def get_input_embeddings(self):
            return self.embed

        def get_output_embeddings(self):
            return self.head

    def test_are_untied_in_the_models_config(self):
        model = self.Model()
        embedded = model.embed.weight.detach().clone()
        peft = get_peft_model(model, LoraConfig(target_modules=["head"]))
        move(peft, "default")
        with pytest.warns(
            MergeWarning, match="Merging into one of two tied embeddings made them differ, so the model's"
        ):
            peft.merge_and_unload()
        assert not model.config.tie_word_embeddings
        assert same_bits(model.embed.weight, embedded)
        assert not same_bits(model.head.weight, embedded)

    def test_stay_tied_where_nothing_was_merged_into_them(self):
        model = self.Model()
        model.body = nn.Linear(3, 3)
        get_peft_model(model, LoraConfig(target_modules=["body"])).merge_and_unload()
        assert model.config.tie_word_embeddings
        assert model.head.weight is model.embed.weight

    def test_both_train_again(self):
        model = self.Model(tied=False)
        get_peft_model(model, LoraConfig(target_modules=["head"])).merge_and_unload()
        assert model.head.weight is not model.embed.weight
        assert model.head.weight.requires_grad
        assert model.embed.weight.requires_grad

    def test_config_that_says_they_are_not(self):
        model = self.Model(tied=False)
        get_peft_model(model, LoraConfig(target_modules=["head"])).merge_and_unload()
        assert not model.config.tie_word_embeddings


@dataclass
class MergeConfig(PeftConfig):
    peft_type: str | None = "MERGE_TOY"
    target_modules: list[str] | set[str] | str | None = None


class Hand(nn.Module, BaseTunerLayer):
    """Written as PEFT's layers are: merging changes the weight in place."""

    adapter_layer_names = ("toy_delta",)

    def __init__(self, base_layer, name):
        super().__init__()
        self.base_layer = base_layer
        self.toy_delta = nn.ParameterDict({name: nn.Parameter(torch.full_like(base_layer.weight, 0.3))})
        self.merged_adapters = []
        self._active_adapter = [name]

    def merge(self, safe_merge=False, adapter_names=None):
        for name in adapter_names or self.active_adapters:
            if name in self.toy_delta:
                self.base_layer.weight.data += self.toy_delta[name].data
                self.merged_adapters.append(name)

    def unmerge(self):
        while self.merged_adapters:
            self.base_layer.weight.data -= self.toy_delta[self.merged_adapters.pop()].data

    def forward(self, x):
        names = [] if self.disable_adapters or self.merged else self.active_adapters
        return self.base_layer(x) + sum(x @ self.toy_delta[name].T for name in names if name in self.toy_delta)


class Bare(Hand):
    merge = BaseTunerLayer.merge
    unmerge = BaseTunerLayer.unmerge


class TestByHand:
    @pytest.fixture(params=[Hand, Bare])
    def model(self, request):
        @hookimpl
        def hook(parent, target_name, target, adapter_name):
            kind = Hand if target_name == "0" else request.param
            setattr(parent, target_name, kind(target, adapter_name))
            return getattr(parent, target_name)

        plugin = types.SimpleNamespace(method=Method(MergeConfig), _create_and_replace=hook)
        register("merge-toy", plugin)
        yield get_peft_model(make_base(), MergeConfig(target_modules=["0", "2"]))
        plugins.unregister("merge-toy")

    def test_calls_cannot_be_routed(self, model):
        with pytest.raises(
            RouteError, match="Calls cannot be routed to none: a Hand was put in by its method's own code, which"
        ):
            model.use_adapter([]).__enter__()
        with model.use_adapter("default"):
            assert difference(run(model), run(make_base())) > 1e-3

    @pytest.mark.parametrize("keep", ["cpu", "none"])
    def test_where_originals_are_kept_is_not_their_business(self, model, keep):
        output = run(model)
        if isinstance(model.get_base_model()[2], Bare):
            with pytest.raises(NotImplementedError):
                model.merge_adapter(keep_base=keep)
            return
        model.merge_adapter(keep_base=keep)
        assert all(layer.merged for layer in model.base_model.layers())
        torch.testing.assert_close(run(model), output)

    @pytest.mark.parametrize("adapter_too", [False, True])
    def test_for_good_all_or_none(self, model, adapter_too):
        if adapter_too:
            model.add_adapter("low", LoraConfig(r=2, target_modules=["3"]))
            move(model, "low")
            model.base_model.set_adapter(["default", "low"])
        before, output = Snapshot.of(model), run(model)
        if isinstance(model.get_base_model()[2], Bare):
            with pytest.raises(NotImplementedError, match="Bare does not define merge"):
                model.merge_and_unload()
            assert before.differences(model) == []
            assert same_bits(run(model), output)
        else:
            torch.testing.assert_close(run(model.merge_and_unload()), output)

    def test_merging_for_good_says_what_stands_in_for_what(self, model, monkeypatch):
        def merge_for_good(layer, names):
            old = layer.base_layer.weight
            layer.merge(adapter_names=names)
            layer.base_layer.weight = nn.Parameter(old.detach().clone(), requires_grad=False)
            return [(old, layer.base_layer.weight)]

        monkeypatch.setattr(Hand, "merge_for_good", merge_for_good)
        if not isinstance(model.get_base_model()[2], Bare):
            output = run(model)
            plain = model.merge_and_unload()
            torch.testing.assert_close(run(plain), output)
            assert plain[0].weight.requires_grad

    def test_may_refuse_before_anything_is_done(self, model, monkeypatch):
        def check_merge(layer, names):
            raise MergeError("not these")

        monkeypatch.setattr(Hand, "check_merge", check_merge)
        before = Snapshot.of(model)
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(MergeError, match="not these"):
                merge()
        assert before.differences(model) == []

    def test_all_or_none(self, model):
        before, output = Snapshot.of(model), run(model)
        assert difference(output, run(make_base())) > 1e-3
        if isinstance(model.get_base_model()[2], Bare):
            with pytest.raises(
                NotImplementedError, match="Bare does not define merge, so its adapters cannot be merged"
            ):
                model.merge_adapter()
            assert before.differences(model) == []
            assert same_bits(run(model), output)
        else:
            model.merge_adapter()
            torch.testing.assert_close(run(model), output)
            model.unmerge_adapter()
            torch.testing.assert_close(run(model), output)
            torch.testing.assert_close(run(model.merge_and_unload()), output)


class Loose(Adapter):
    entries = ("loose",)

    def __init__(self, site, config):
        super().__init__(site, config)
        self.loose = nn.Parameter(site.ones(1))

    def merged(self, below):
        return below.weight * self.loose, below.bias


def test_delete_inside_a_stack_of_parameters():
    """Layers that adapt two parameters of one module stand on one another; the upper one may go first or last."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))

        def forward(self, x):
            return x @ self.up @ self.down

    @dataclass
    class Config(MergeConfig):
        target_parameters: list[str] | None = None

    class OnParameters(Loose):
        kinds = frozenset({"parameter"})

    register("merge-toy", types.SimpleNamespace(method=Method(Config, OnParameters)))
    try:
        for first, second in (("up", "down"), ("down", "up")):
            base = nn.Sequential(Pair())
            pair = base[0]
            model = get_peft_model(base, Config(target_parameters=["up", "down"]), "both")
            model.add_adapter("single", Config(target_parameters=[first]))
            model.delete_adapter("single")
            assert base[0].get_base_layer() is pair
            model.add_adapter("single", Config(target_parameters=[second]))
            model.set_adapter("single")
            model.delete_adapter("both")
            assert base[0].base_layer is pair
            assert base[0].parameter_name == second
            model.unload()
            assert base[0] is pair
    finally:
        plugins.unregister("merge-toy")


def test_unload_while_a_route_is_in_force_changes_nothing_there(model):
    with model.use_adapter("one"):
        inside = run(model)
    assert difference(inside, run(model)) > 1e-3
    with pytest.raises(UnknownAdapterError), model.use_adapter("three"):
        pytest.fail("the block must not be entered")
    assert model.active_adapters == ["one", "two"]
