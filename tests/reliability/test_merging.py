"""What is promised of merging: for every dtype, every order and subset, and where weights are shared."""

from __future__ import annotations

import itertools
import types
import warnings

import pytest
import torch
from torch import nn
from toys import hooks_by_hand, registered

import tunerkit
from tunerkit.errors import MergeError, MergeWarning
from tunerkit.layer import tuner_layers
from tunerkit.testing.bench import MOVED, Snapshot, difference, move, same_bits
from tunerkit.testing.models import Linears

lora = pytest.importorskip("tunerkit_lora", reason="what is merged is LoRA's: pip install tunerkit-lora")
ia3 = pytest.importorskip("tunerkit_ia3", reason="what is merged is (IA)3's: pip install tunerkit-ia3")

WHOLE = {"target_modules": ["wide", "square", "narrow"]}
CONFIGS = {
    "lora": lambda: lora.LoraConfig(r=2, **WHOLE),
    "dora": lambda: lora.LoraConfig(r=2, use_dora=True, **WHOLE),
    "ia3": lambda: ia3.IA3Config(feedforward_modules=["square"], **WHOLE),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ORDERS = [order for count in (1, 2, 3) for order in itertools.permutations(CONFIGS, count)]
INPUT = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(5, 6)


def adapted(names=tuple(CONFIGS), dtype=torch.float32):
    torch.manual_seed(0)
    base = Linears().eval().to(dtype)
    first, *others = names
    model = tunerkit.get_peft_model(base, CONFIGS[first](), first)
    for name in others:
        model.add_adapter(name, CONFIGS[name]())
    for number, name in enumerate(names):
        move(model, name, seed=number)
    return model.eval()


def run(model, x=INPUT):
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        return model(x.to(dtype) if x.is_floating_point() else x).double()


def subsets(order):
    return [names for count in range(1, len(order) + 1) for names in itertools.combinations(order, count)]


class TestEveryOrder:
    @pytest.mark.parametrize("order", ORDERS, ids="-".join)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_and_every_subset_and_dtype(self, order, dtype):
        model = adapted(order, dtype)
        model.set_adapter(list(order))
        output, rounding = run(model), 4 * torch.finfo(dtype).eps
        with model.disable_adapter():
            assert difference(run(model), output) > max(MOVED, 2 * rounding)
        before = Snapshot.of(model)
        for names in subsets(order):
            try:
                model.merge_adapter(list(names), safe_merge=True)
            except MergeError as error:
                # One that does not commute may not be merged past another: told, and nothing done.
                assert "does not commute" in str(error)  # noqa: PT017 - whether it is refused depends on the order
                assert names != order[: len(names)]
                assert before.differences(model) == []
                continue
            assert difference(run(model), output) < rounding
            assert {tuple(layer.merged_adapters) for _, layer in tuner_layers(model)} == {names}
            model.unmerge_adapter()
            assert before.differences(model) == []
        assert difference(run(model.merge_and_unload()), output) < rounding


LARGE = 6e4
"""float16 ends at 65504, so twice this is infinite there and finite in float32, in which a delta is computed."""


def spoil(layer, name, what):
    with torch.no_grad():
        if what != "overflow":
            next(iter(layer.adapter_tensors(name).values())).view(-1)[0] = float(what)
        elif name == "lora":
            layer.get_base_layer().weight[0, 0] = LARGE
            layer.adapters[name].lora_A.weight.fill_(LARGE)
            layer.adapters[name].lora_B.weight.fill_(1)
        else:
            layer.get_base_layer().weight[0, 0] = LARGE
            for key, tensor in layer.adapter_tensors(name).items():
                tensor.mul_(0).add_(0 if "lora_B" in key else 1e4 if "magnitude" in key else 4)


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("what", ["nan", "inf", "-inf", "overflow"])
@pytest.mark.parametrize("name", CONFIGS)
class TestSafe:
    def test_refuses_what_is_not_finite_and_changes_nothing(self, name, what, call):
        model = adapted((name,), torch.float16)
        last = [layer for _, layer in tuner_layers(model)][-1]
        spoil(last, name, what)
        before = Snapshot.of(model)
        with pytest.raises(MergeError, match="Merging into 'narrow' would put NaN or infinities into its weight"):
            getattr(model, call)(safe_merge=True)
        assert before.differences(model) == []
        assert not any(layer.merged for _, layer in tuner_layers(model))


class Tied(nn.Module):
    """Weights that several modules hold: both embeddings, two layers, and a layer and a bare parameter; one bias."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(8, 6), nn.Linear(6, 8, bias=False)
        self.head.weight = self.embed.weight
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight, self.two.bias = self.one.weight, self.one.bias
        self.bare = Bare(self.one.weight)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + torch.tanh(self.one(x))
        x = x + torch.tanh(self.two(2 * x))
        return self.head(x + torch.tanh(self.bare(x)))


class Bare(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.matrix = weight

    def forward(self, x):
        return x @ self.matrix


TOKENS = torch.arange(8).reshape(2, 4)
SHARING = {"embed": "head", "head": "embed", "one": "two", "two": "one"}


def tied(config=None):
    torch.manual_seed(0)
    base = Tied().eval()
    if config is not None:
        base.config = types.SimpleNamespace(tie_word_embeddings=config, to_dict=dict)
        base.get_input_embeddings, base.get_output_embeddings = lambda: base.embed, lambda: base.head
    return base


@pytest.mark.filterwarnings("ignore::tunerkit.errors.TyingWarning")
class TestSharedWeights:
    def adapted(self, base, method, target):
        if method == "parameter":
            config = lora.LoraConfig(r=2, target_modules=[], target_parameters=["bare.matrix"])
        elif method == "ia3":
            config = ia3.IA3Config(target_modules=[target], feedforward_modules=[])
        else:
            config = lora.LoraConfig(r=2, target_modules=[target], use_dora=method == "dora")
        model = tunerkit.get_peft_model(base, config)
        move(model, "default")
        return model.eval()

    CASES = (
        *(("lora", target) for target in SHARING),
        *(("dora", target) for target in SHARING),
        *(("ia3", target) for target in ("head", "one", "two")),
        ("parameter", "bare"),
    )

    @pytest.mark.parametrize(("method", "target"), CASES)
    def test_merging_into_one_side_leaves_the_other(self, method, target):
        base = tied()
        plain = run(base, TOKENS)
        shared = base.embed.weight, base.one.weight
        bits = [weight.detach().clone() for weight in shared]
        model = self.adapted(base, method, target)
        output = run(model, TOKENS)
        assert difference(output, plain) > MOVED
        before = Snapshot.of(model)
        model.merge_adapter()
        assert difference(run(model, TOKENS), output) < 1e-5
        others = [base.embed, base.head, base.one, base.two]
        held = [module for module in others if not hasattr(module, "base_layer")]
        assert all(any(module.weight is weight for weight in shared) for module in held)
        assert all(same_bits(weight, old) for weight, old in zip(shared, bits, strict=True))
        model.unmerge_adapter()
        assert before.differences(model) == []
        plain_again = model.merge_and_unload()
        assert difference(run(plain_again, TOKENS), output) < 1e-5
        assert all(same_bits(weight, old) for weight, old in zip(shared, bits, strict=True))
        if target in SHARING:
            assert getattr(base, target).weight is not getattr(base, SHARING[target]).weight
            assert any(getattr(base, SHARING[target]).weight is weight for weight in shared)

    @pytest.mark.parametrize("config", [None, False, True])
    @pytest.mark.parametrize("target", ["embed", "head"])
    def test_a_config_that_ties_again_is_told(self, target, config):
        base = tied(config)
        model = self.adapted(base, "lora", target)
        output = run(model, TOKENS)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.merge_and_unload()
        told = (
            "Merging into one of two tied embeddings made them differ, so the model's config says "
            "tie_word_embeddings=False now; save the config with the model."
        )
        assert [str(one.message) for one in caught if issubclass(one.category, MergeWarning)] == [told] * bool(config)
        assert not getattr(getattr(base, "config", None), "tie_word_embeddings", False)
        assert difference(run(base, TOKENS), output) < 1e-5

    @pytest.mark.parametrize("target", ["embed", "head"])
    def test_a_copy_of_one_side(self, target):
        base = tied(config=True)
        shared, bits = base.embed.weight, base.embed.weight.detach().clone()
        model = tunerkit.get_peft_model(base, lora.LoraConfig(r=2, target_modules=["one"], modules_to_save=[target]))
        move(model, "default")
        output = run(model.eval(), TOKENS)
        with pytest.warns(MergeWarning, match="tie_word_embeddings=False now"):
            model.merge_and_unload()
        assert difference(run(base, TOKENS), output) < 1e-5
        assert getattr(base, SHARING[target]).weight is shared
        assert same_bits(shared, bits)

    def test_adapters_of_both_sides(self):
        base = tied()
        model = tunerkit.get_peft_model(base, lora.LoraConfig(r=2, target_modules=list(SHARING)))
        move(model, "default")
        model.add_adapter("scales", ia3.IA3Config(target_modules=["two"], feedforward_modules=["two"]))
        move(model, "scales")
        model.set_adapter(["default", "scales"])
        output = run(model.eval(), TOKENS)
        before = Snapshot.of(model)
        model.merge_adapter()
        assert difference(run(model, TOKENS), output) < 1e-5
        model.unmerge_adapter()
        assert before.differences(model) == []
        assert difference(run(model.merge_and_unload(), TOKENS), output) < 1e-5

    @pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
    @pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
    def test_one_module_at_two_places(self, method, call):
        base = tied()
        base.two = base.one
        # Text means one place; a name in a list would do as well.
        model = self.adapted(base, method, "one")
        output, before = run(model, TOKENS), Snapshot.of(model)
        with pytest.raises(MergeError) as error:
            getattr(model, call)()
        assert str(error.value) == (
            "The module at 'one' also stands at 'two', where other adapters apply or none, so merging into it would "
            "change the output there. Target all of its places with one adapter, or keep the adapter as it is."
        )
        assert before.differences(model) == []
        assert same_bits(run(model, TOKENS), output)

    @pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
    def test_one_module_at_two_places_that_are_both_meant(self, method):
        base = tied()
        base.two = base.one
        settings = {"feedforward_modules": []} if method == "ia3" else {"use_dora": method == "dora", "r": 2}
        kind = ia3.IA3Config if method == "ia3" else lora.LoraConfig
        model = tunerkit.get_peft_model(base, kind(target_modules=["one", "two"], **settings))
        move(model, "default")
        output = run(model.eval(), TOKENS)
        model.merge_adapter()
        assert difference(run(model, TOKENS), output) < 1e-5
        model.unmerge_adapter()
        assert same_bits(run(model, TOKENS), output)
        merged = model.merge_and_unload()
        assert merged.one is merged.two
        assert difference(run(merged, TOKENS), output) < 1e-5

    @pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
    @pytest.mark.parametrize("targets", [["one"], ["one", "two"]])
    def test_a_layer_that_changes_its_weight_in_place(self, targets, call):
        with registered(hooks_by_hand):
            model = tunerkit.get_peft_model(tied(), hooks_by_hand.Config(target_modules=targets))
            move(model, "default")
            output, before = run(model.eval(), TOKENS), Snapshot.of(model)
            with pytest.raises(MergeError) as error:
                getattr(model, call)()
            others = "'two', 'bare'" if targets == ["one"] else "'two.base_layer', 'bare'"
            assert str(error.value) == (
                f"The module at 'one' shares a parameter with {others}, and a GatedLayer, which its method's own code "
                "put in, may change it in place, so merging into it would change the others. Keep the adapter as it "
                "is, or give the module a parameter of its own first."
            )
            assert before.differences(model) == []
            assert same_bits(run(model, TOKENS), output)

    def test_a_part_at_two_places(self):
        """The holder of the module stands twice, so that both places mean one layer."""
        base = tied()
        base.more = nn.ModuleDict({"here": base.bare})
        base.bare.add_module("inner", nn.Linear(6, 6))
        base.bare.forward = lambda x: base.bare.inner(x @ base.bare.matrix)
        model = tunerkit.get_peft_model(base, lora.LoraConfig(r=2, target_modules=["inner"]))
        move(model, "default")
        output = run(model.eval(), TOKENS)
        model.merge_adapter()
        assert difference(run(model, TOKENS), output) < 1e-5
        model.unmerge_adapter()
        assert difference(run(model.merge_and_unload(), TOKENS), output) < 1e-5
