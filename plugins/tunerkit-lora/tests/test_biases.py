"""Training the base's own biases here and in PEFT, and what PEFT does not do: putting them back."""

import copy
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tunerkit
from tunerkit import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tunerkit.errors import AdapterStateError, MergeError, RouteError, TargetError, TargetWarning
from tunerkit.testing.bench import Snapshot
from tunerkit.testing.parity import (
    Pair,
    assert_close,
    assert_same_tensors,
    describe_parameters,
    peft_config,
    quiet,
    run,
)
from tunerkit_lora import LoraConfig


def ia3_config(**settings):
    ia3 = pytest.importorskip("tunerkit_ia3", reason="a second method to mix with: tunerkit-ia3")
    return ia3.IA3Config(**settings)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.low, self.norm, self.mid, self.high = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 3)
        for layer in (self.low, self.norm, self.mid, self.high):
            nn.init.normal_(layer.bias)

    def forward(self, x):
        return self.high(torch.tanh(self.mid(self.norm(torch.tanh(self.low(x))))))


@pytest.fixture
def base():
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture
def inputs():
    return {"x": torch.randn(5, 6, generator=torch.Generator().manual_seed(1))}


def lora(bias="all", *targets, **others):
    return LoraConfig(target_modules=list(targets or ("low", "mid")), bias=bias, **others)


def biases(model):
    """Return the values of the base's biases by their paths in the base."""
    return {
        name.replace("base_model.model.", "").replace(".base_layer", ""): value.detach().clone()
        for name, value in model.named_parameters()
        if name.endswith(".bias")
    }


def same(one, other):
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def trained(base, bias="all", name="default"):
    """Return a model whose adapter and biases have been moved."""
    model = get_peft_model(base, lora(bias), adapter_name=name).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("bias", ["all", "lora_only"])
class TestParity:
    def test_everything(self, base, inputs, tmp_path, bias):
        pytest.importorskip("peft", reason="comparing with PEFT needs it: pip install peft")
        pair = Pair(base, lora(bias), inputs)
        moved = {name: not torch.equal(value, biases(base)[name]) for name, value in biases(pair.ours).items()}
        assert moved == {"low.bias": True, "norm.bias": bias == "all", "mid.bias": True, "high.bias": bias == "all"}
        assert same(biases(pair.ours), biases(pair.theirs))
        pair.check_parameters()
        pair.check_tensors()
        pair.check_outputs()
        pair.check_disabled()
        pair.check_files(tmp_path)
        pair.check_gradients()
        pair.check_steps()
        pair.check_merged()

    def test_frozen_when_loaded(self, base, bias, tmp_path):
        peft = pytest.importorskip("peft", reason="comparing with PEFT needs it: pip install peft")
        trained(copy.deepcopy(base), bias).save_pretrained(tmp_path)
        for trains in (True, False):
            ours = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=trains)
            with quiet():
                theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=trains)
            flags = describe_parameters(theirs)
            if not trains:  # PEFT leaves the biases trainable in an adapter that is loaded for inference
                flags = {name: (*description[:2], False) for name, description in flags.items()}
            assert describe_parameters(ours) == flags


def test_keys(base):
    state = get_peft_model_state_dict(trained(base))
    assert {key for key in state if key.endswith("bias")} == {
        "base_model.model.low.base_layer.bias",
        "base_model.model.mid.base_layer.bias",
        "base_model.model.norm.bias",
        "base_model.model.high.bias",
    }


def test_a_real_model(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the model is of transformers")
    peft = pytest.importorskip("peft", reason="comparing with PEFT needs it: pip install peft")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=40
    )
    base = transformers.BertForMaskedLM(config).eval()  # its output bias stands at two places
    inputs = {"input_ids": torch.arange(6)[None]}
    ours = get_peft_model(copy.deepcopy(base), lora("all", "query")).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    ours.save_pretrained(tmp_path)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert (run(ours, inputs) - run(base, inputs)).abs().max() > 1e-3
    assert_close(run(theirs, inputs), run(ours, inputs))
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_tensors(
        load_file(tmp_path / "theirs" / "adapter_model.safetensors"), load_file(tmp_path / "adapter_model.safetensors")
    )
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")
    assert_close(run(again, inputs), run(ours, inputs))
    with ours.disable_adapter():
        assert torch.equal(run(ours, inputs), run(base, inputs))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_beside_modules_that_are_copied(base, inputs, tmp_path, bias):
    peft = pytest.importorskip("peft", reason="comparing with PEFT needs it: pip install peft")
    config = lora(bias, "low", modules_to_save=["high"])
    ours = get_peft_model(copy.deepcopy(base), config).eval()
    with quiet():
        theirs = peft.get_peft_model(copy.deepcopy(base), peft_config(config)).eval()
    assert describe_parameters(ours) == describe_parameters(theirs)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs", is_trainable=True).eval()
    assert_close(run(loaded, inputs), run(theirs, inputs))
    assert (run(loaded, inputs) - run(base, inputs)).abs().max() > 1e-3
    loaded.save_pretrained(tmp_path / "ours")
    with quiet():
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert_close(run(again, inputs), run(theirs, inputs))
    with loaded.disable_adapter():
        assert torch.equal(run(loaded, inputs), run(base, inputs))


class TestPuttingBack:
    @pytest.mark.parametrize("bias", ["all", "lora_only"])
    def test_disabled_is_the_base_bit_for_bit(self, base, inputs, bias):
        plain, objects = run(base, inputs), dict(base.named_parameters())
        model = trained(base, bias)
        with_adapter, values = run(model, inputs), biases(model)
        flags = describe_parameters(model)
        with model.disable_adapter():
            assert torch.equal(run(model, inputs), plain)
            assert not any(parameter.requires_grad for parameter in model.parameters())
        assert torch.equal(run(model, inputs), with_adapter)
        assert same(biases(model), values)
        assert describe_parameters(model) == flags
        assert all(any(parameter is known for known in model.parameters()) for parameter in objects.values())

    def test_between_a_forward_and_its_backward(self, base, inputs):
        model = trained(base)
        expected = torch.autograd.grad(model(**inputs).sum(), model.base_model.biases.parameters())
        output = model(**inputs).sum()
        with model.disable_adapter():
            model(**inputs)
        assert all(map(torch.equal, torch.autograd.grad(output, model.base_model.biases.parameters()), expected))

    def test_unload(self, base, inputs):
        before, plain = Snapshot.of(base), run(base, inputs)
        model = trained(base)
        assert model.unload() is base
        assert before.differences(base) == []
        assert torch.equal(run(base, inputs), plain)
        assert model.base_model.biases.name == ""

    def test_delete(self, base, inputs):
        before = Snapshot.of(base)
        model = trained(base)
        model.delete_adapter("default")
        assert [text for text in before.differences(base) if "requires_grad" not in text and "train" not in text] == []
        assert not any(parameter.requires_grad for parameter in base.parameters())

    def test_delete_while_another_stays(self, base, inputs):
        own = biases(base)
        model = trained(base)
        model.add_adapter("b", lora("none", "high"))
        model.set_adapter(["default", "b"])
        model.delete_adapter("default")
        assert same(biases(model), own)
        assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} <= {"lora_A", "lora_B"}

    def test_delete_while_disabled(self, base):
        model = trained(base)
        own = model.base_model.biases.kept
        model.add_adapter("b", lora("none", "high"))
        model.base_model.disable_adapter_layers()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.delete_adapter("default")
        model.base_model.enable_adapter_layers()
        assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith("bias"))
        assert [value.tolist() for value in own] != []

    def test_set_adapter(self, base, inputs):
        own = biases(base)
        model = trained(base)
        values, with_adapter = biases(model), run(model, inputs)
        model.add_adapter("b", lora("none"))
        assert same(biases(model), values)
        model.set_adapter("b")
        assert same(biases(model), own)
        assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith("bias"))
        model.set_requires_grad("default")
        assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith("bias"))
        with model.disable_adapter():
            assert same(biases(model), own)
        assert same(biases(model), own)
        model.set_adapter(["default", "b"])
        assert same(biases(model), values)
        assert torch.equal(run(model, inputs), with_adapter)
        assert all(p.requires_grad for name, p in model.named_parameters() if name.endswith("bias"))
        model.set_adapter("default", inference_mode=True)
        assert not any(p.requires_grad for p in model.parameters())
        model.set_requires_grad("default")
        assert all(p.requires_grad for name, p in model.named_parameters() if name.endswith("bias"))

    def test_set_adapter_while_disabled(self, base, inputs):
        own = biases(base)
        model = trained(base)
        values = biases(model)
        model.add_adapter("b", lora("none"))
        with model.disable_adapter():
            model.set_adapter("b")
            model.set_adapter("default")
            assert same(biases(model), own)
        assert same(biases(model), values)
        assert all(p.requires_grad for name, p in model.named_parameters() if name.endswith("bias"))

    def test_an_optimiser_keeps_its_parameters(self, base, inputs):
        model = trained(base)
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        own = model.base_model.biases.kept[0].clone()
        with model.disable_adapter():
            pass
        before = biases(model)
        model(**inputs).sum().backward()
        optimiser.step()
        assert not same(biases(model), before)
        with model.disable_adapter():
            assert torch.equal(biases(model)["low.bias"], own)


class TestFiles:
    def test_added_to_a_model(self, base, inputs, tmp_path):
        own = biases(base)
        first = trained(copy.deepcopy(base))
        first.save_pretrained(tmp_path)
        model = get_peft_model(base, lora("none", "high"), adapter_name="other").eval()
        report = model.load_adapter(tmp_path, "default")
        assert report.complete
        assert same(biases(model), own)
        assert_same_tensors(get_peft_model_state_dict(model), get_peft_model_state_dict(first))
        model.set_adapter("default")
        assert_close(run(model, inputs), run(first, inputs))

    def test_are_the_same_whatever_is_active_or_there(self, base, inputs, tmp_path):
        model = trained(base)
        state = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
        model.add_adapter("b", lora("none", "high"))
        model.add_adapter("c", ia3_config(target_modules=["low"], feedforward_modules=[]))
        assert_same_tensors(get_peft_model_state_dict(model), state)
        model.set_adapter("b")
        assert_same_tensors(get_peft_model_state_dict(model), state)
        assert_same_tensors(get_peft_model_state_dict(model, model.state_dict()), state)
        assert not any(key.endswith("bias") for key in get_peft_model_state_dict(model, adapter_name="b"))
        model.set_adapter("default")
        assert_same_tensors(get_peft_model_state_dict(model, model.state_dict()), state)
        model.merge_adapter()
        assert_same_tensors(get_peft_model_state_dict(model), state)

    def test_of_a_layer_whose_bias_is_merged(self, base, inputs):
        model = trained(base, "lora_only")
        state = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
        model.add_adapter("c", ia3_config(target_modules=["low"], feedforward_modules=[], init_ia3_weights=False))
        model.set_adapter(["c", "default"])
        model.merge_adapter(["c"])
        own = model.base_model.model.low.base_layer.bias
        assert not any(own is parameter for parameter in model.base_model.biases.parameters())
        assert_same_tensors(get_peft_model_state_dict(model), state)

    def test_a_file_without_them_is_refused(self, base, tmp_path):
        state = get_peft_model_state_dict(trained(copy.deepcopy(base)))
        model = get_peft_model(base, lora())
        report = set_peft_model_state_dict(model, {k: v for k, v in state.items() if not k.endswith("bias")})
        assert len(report.missing_keys) == 4

    def test_copies(self, base, inputs):
        model = trained(base)
        output, own = run(model, inputs), model.base_model.biases.kept[0].clone()
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - what was just written
            assert torch.equal(run(other, inputs), output)
            other.base_model.disable_adapter_layers()
            assert torch.equal(biases(other)["low.bias"], own)
            assert torch.equal(run(model, inputs), output)


class TestMerging:
    def test_and_taking_out_again(self, base, inputs):
        plain = run(base, inputs)
        model = trained(base)
        output, values = run(model, inputs), biases(model)
        model.merge_adapter()
        assert_close(run(model, inputs), output)
        with model.disable_adapter():
            assert torch.equal(run(model, inputs), plain)
        assert_close(run(model, inputs), output)
        model.unmerge_adapter()
        assert torch.equal(run(model, inputs), output)
        assert same(biases(model), values)

    def test_with_an_adapter_that_changes_them(self, base, inputs):
        plain = run(base, inputs)
        model = trained(base)
        model.add_adapter("c", ia3_config(target_modules=["low"], feedforward_modules=[], init_ia3_weights=False))
        model.set_adapter(["default", "c"])
        output = run(model, inputs)
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(run(model, inputs), plain)
        assert_close(run(model, inputs), output)
        model.unload()
        assert torch.equal(run(base, inputs), plain)

    def test_for_good(self, base, inputs):
        model = trained(base)
        output, values = run(model, inputs), biases(model)
        merged = model.merge_and_unload()
        assert_close(run(merged, inputs), output)
        assert same(biases(merged), values)
        assert all(parameter.requires_grad for parameter in merged.parameters())

    def test_for_good_of_another(self, base, inputs):
        own = biases(base)
        model = trained(base)
        model.add_adapter("b", lora("none", init_lora_weights=False))
        model.set_adapter("b")
        output = run(model, inputs)
        merged = model.merge_and_unload()
        assert_close(run(merged, inputs), output)
        assert same(biases(merged), own)


class TestRefusals:
    @pytest.fixture
    def model(self, base):
        model = trained(base, "lora_only")
        model.add_adapter("b", lora("none"))
        return model

    def test_a_second_adapter(self, model):
        before = Snapshot.of(model)
        with pytest.raises(AdapterStateError) as caught:
            model.add_adapter("c", lora("all"))
        assert str(caught.value) == (
            "The adapter 'default' trains the base model's biases (bias='lora_only'), which are shared, so only one "
            "adapter at a time can. Set bias='none' in the config of the other, or take this one out first with "
            "delete_adapter('default')."
        )
        assert isinstance(caught.value, ValueError)
        assert before.differences(model) == []
        model.set_adapter("b")
        model.delete_adapter("default")
        model.add_adapter("c", lora("all"))

    def test_routes(self, model, inputs):
        with pytest.raises(RouteError) as caught, model.use_adapter("b"):
            pass
        assert str(caught.value) == (
            "Calls cannot be routed to 'b': 'default' trains the base model's own biases (bias='lora_only'), which all "
            "calls share, and is active. Call set_adapter(), or use disable_adapter() for the base model."
        )
        with pytest.raises(RouteError, match=r"^Calls cannot be routed to the base model: 'default' trains"):
            model.use_adapter([]).__enter__()
        with model.use_adapter(["b", "default"]):
            both = run(model, inputs)
        model.set_adapter(["b", "default"])
        assert torch.equal(run(model, inputs), both)
        model.set_adapter("b")
        output = run(model, inputs)
        with model.use_adapter("b"):
            assert torch.equal(run(model, inputs), output)
        with pytest.raises(
            RouteError, match=r"^Calls cannot be routed to 'default': .* share, and is not active\. Call"
        ):
            model.use_adapter("default").__enter__()

    def test_merging_what_is_not_in_place(self, model):
        model.set_adapter("b")
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(MergeError) as caught:
                merge(adapter_names=["default"])
            assert str(caught.value) == (
                "The adapter 'default' trains the base model's biases (bias='lora_only'), and they are in place only "
                "while it is active. Call set_adapter('default') before merging it."
            )

    def test_merging_another_for_good(self, model):
        before = Snapshot.of(model)
        with pytest.raises(MergeError) as caught:
            model.merge_and_unload(adapter_names=["b"])
        assert str(caught.value) == (
            "The biases that 'default' trains (bias='lora_only') are in place, and 'default' is not among what is "
            "merged, 'b'. Merge it too, or make the others active first with set_adapter()."
        )
        assert before.differences(model) == []
        model.merge_adapter(["b"])

    def test_deleting_while_another_is_merged(self, model):
        model.merge_adapter(["b"])
        with pytest.raises(AdapterStateError) as caught:
            model.delete_adapter("default")
        assert str(caught.value) == (
            "'default' trains the base model's biases, which cannot be put back while 'b' is merged. Call "
            "unmerge_adapter() before deleting it."
        )

    def test_injecting(self, base):
        before = Snapshot.of(base)
        with pytest.raises(TargetError) as caught:
            tunerkit.inject_adapter_in_model(lora("lora_only"), base)
        assert str(caught.value) == (
            "bias='lora_only' trains the model's own biases, whose original values need a home beside the model. Use "
            "get_peft_model(model, config), or leave bias at 'none'."
        )
        assert before.differences(base) == []

    def test_nothing_to_train(self):
        model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3))
        with pytest.warns(TargetWarning) as caught:
            get_peft_model(model, lora("lora_only", "0"))
        assert [str(item.message) for item in caught] == [
            "bias='lora_only' trains nothing, for there is no bias to train. The other entries were matched."
        ]


@pytest.mark.filterwarnings("ignore")
def test_a_failure_on_the_way_leaves_all_as_it_was(base, inputs, monkeypatch):
    model = trained(base)
    model.add_adapter("b", lora("none"))
    before, output = Snapshot.of(model), run(model, inputs)
    show = tunerkit.biases.Biases.show

    def fail(self, *, trained):
        show(self, trained=trained)
        raise KeyboardInterrupt

    monkeypatch.setattr(tunerkit.biases.Biases, "show", fail)
    calls = (
        lambda: model.set_adapter("b"),
        model.base_model.disable_adapter_layers,
        model.unload,
        lambda: model.delete_adapter("default"),
    )
    for call in calls:
        with pytest.raises(KeyboardInterrupt):
            call()
        assert before.differences(model) == []
        assert torch.equal(run(model, inputs), output)
        assert model.base_model.biases.shown


def test_a_copied_module_has_the_bases_own_biases():
    base = Model()
    own = base.high.bias.detach().clone()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["low"], bias="all"), "one")
    with torch.no_grad():
        model.get_base_model().high.bias.add_(1)
    model.add_adapter("two", LoraConfig(r=2, target_modules=["low"], modules_to_save=["high"]))
    high = model.get_base_model().high
    assert torch.equal(high.modules_to_save["two"].bias, own)
    assert torch.equal(high.original_module.bias, own + 1)


class TestSwapping:
    def swapped(self, model, other):
        tunerkit.hotswap_adapter_from_state_dict(
            model, get_peft_model_state_dict(other), "default", other.peft_config["default"]
        )

    def loaded(self, model, other):
        set_peft_model_state_dict(model, get_peft_model_state_dict(other))

    def other(self, base, bias="all"):
        model = trained(copy.deepcopy(base), bias)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(-2)
        return model

    @pytest.mark.parametrize("bias", ["all", "lora_only"])
    @pytest.mark.parametrize("active", [True, False], ids=["active", "not active"])
    def test_takes_the_biases_along(self, base, inputs, bias, active):
        other, plain = self.other(base, bias), run(base, inputs)
        model = trained(base, bias)
        model.add_adapter("more", lora("none"))
        parameters = dict(model.named_parameters())
        assert (run(model, inputs) - run(other, inputs)).abs().max() > 1e-3
        if not active:
            model.set_adapter("more")
        self.swapped(model, other)
        if not active:
            assert torch.equal(run(model, inputs), plain)
            model.set_adapter("default")
        assert torch.equal(run(model, inputs), run(other, inputs))
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
        with model.disable_adapter():
            assert torch.equal(run(model, inputs), plain)

    @pytest.mark.parametrize(("ours", "theirs"), [("all", "none"), ("none", "all"), ("all", "lora_only")])
    def test_other_biases_are_refused(self, base, inputs, ours, theirs):
        other = self.other(base, theirs)
        model = trained(base, ours)
        before, output = Snapshot.of(model), run(model, inputs)
        with pytest.raises(AdapterStateError) as error:
            self.swapped(model, other)
        assert f"'default' has bias={ours!r} and the other bias={theirs!r}, so " in str(error.value)
        assert before.differences(model) == []
        assert torch.equal(run(model, inputs), output)

    def test_the_base_model_alone_does_not_know_them(self, base):
        other, model = self.other(base), trained(base)
        with pytest.raises(AdapterStateError, match=r"trains the base model's biases .* Pass the PeftModel itself\."):
            self.swapped(model.get_base_model(), other)

    def test_an_error_on_the_way_undoes_what_was_done(self, base, inputs, monkeypatch):
        other, model = self.other(base), trained(base)
        output = run(model, inputs)

        def fail(self, adapter):
            raise KeyboardInterrupt("on purpose")

        monkeypatch.setattr("tunerkit_lora.adapter.LoraAdapter.take", fail)
        with pytest.raises(KeyboardInterrupt, match="on purpose"):
            self.swapped(model, other)
        assert torch.equal(run(model, inputs), output)

    @pytest.mark.parametrize("swap", [True, False], ids=["swapped", "loaded"])
    def test_is_refused_while_another_adapter_is_merged(self, base, swap):
        other, model = self.other(base), trained(base)
        model.add_adapter("more", lora("none"))
        model.merge_adapter(["more"])
        put = self.swapped if swap else self.loaded
        with pytest.raises(AdapterStateError, match=r"biases.*'more' is merged.*Call unmerge_adapter\(\) first"):
            put(model, other)


class TestStateOfTheBase:
    """`get_base_model_state_dict` and `set_base_model_state_dict` mean the base's own biases, whatever is in place."""

    @pytest.mark.parametrize("state", ["active", "not active", "disabled"])
    def test_is_read(self, base, inputs, state):
        own = {key: value.clone() for key, value in base.state_dict().items()}
        model = trained(base)
        model.add_adapter("more", lora("none"))
        output = run(model, inputs)
        if state == "not active":
            model.set_adapter("more")
        elif state == "disabled":
            model.base_model.disable_adapter_layers()
        before = Snapshot.of(model)
        found = tunerkit.get_base_model_state_dict(model)
        assert same(found, own)
        assert before.differences(model) == []
        model.base_model.enable_adapter_layers()
        model.set_adapter("default")
        assert same(found, own)
        assert torch.equal(run(model, inputs), output)

    def test_has_the_dtype_that_the_model_has_now(self, base):
        model = trained(base)
        found = tunerkit.get_base_model_state_dict(model.double())
        assert {tensor.dtype for tensor in found.values()} == {torch.float64}

    @pytest.mark.parametrize("state", ["active", "not active", "disabled"])
    def test_is_written(self, base, inputs, state):
        torch.manual_seed(3)
        new = Model().eval()
        model = trained(base)
        model.add_adapter("more", lora("none"))
        if state == "not active":
            model.set_adapter("more")
        elif state == "disabled":
            model.base_model.disable_adapter_layers()
        adapter = get_peft_model_state_dict(model)
        adapter = {key: value.clone() for key, value in adapter.items()}
        assert tunerkit.set_base_model_state_dict(model, new.state_dict()).complete
        assert same(tunerkit.get_base_model_state_dict(model), new.state_dict())
        assert same(get_peft_model_state_dict(model), adapter)
        model.base_model.enable_adapter_layers()
        model.set_adapter("more")
        assert torch.equal(run(model, inputs), run(new, inputs))
        model.set_adapter("default")
        expected = get_peft_model(copy.deepcopy(new), lora()).eval()
        set_peft_model_state_dict(expected, adapter)
        assert torch.equal(run(model, inputs), run(expected, inputs))
        assert same(tunerkit.get_base_model_state_dict(model), new.state_dict())

    def test_an_error_in_writing_leaves_the_trained_biases_in_place(self, base, inputs, monkeypatch):
        model = trained(base)
        output, own = run(model, inputs), tunerkit.get_base_model_state_dict(model)

        def fail(self, *args, **kwargs):
            raise KeyboardInterrupt("on purpose")

        monkeypatch.setattr(Model, "load_state_dict", fail)
        with pytest.raises(KeyboardInterrupt, match="on purpose"):
            tunerkit.set_base_model_state_dict(model, Model().state_dict())
        assert torch.equal(run(model, inputs), output)
        assert same(tunerkit.get_base_model_state_dict(model), own)

    def test_what_is_merged_is_in_it(self, base, inputs):
        model = trained(base)
        output = run(model, inputs)
        model.merge_adapter()
        loaded = Model().eval()
        loaded.load_state_dict(tunerkit.get_base_model_state_dict(model))
        assert_close(run(loaded, inputs), output)

    def test_another_merged_onto_trained_biases_is_refused(self, base):
        model = trained(base)
        model.add_adapter("more", lora("none"))
        model.merge_adapter(["more"])
        with pytest.raises(AdapterStateError, match=r"'more' is merged.*biases.*'default' trains"):
            tunerkit.get_base_model_state_dict(model)

    def test_the_base_model_alone_does_not_know_them(self, base):
        inner = trained(base).get_base_model()
        message = r"trains the base model's biases .* Pass the PeftModel itself\."
        with pytest.raises(AdapterStateError, match=message):
            tunerkit.get_base_model_state_dict(inner)
        with pytest.raises(AdapterStateError, match=message):
            tunerkit.set_base_model_state_dict(inner, Model().state_dict())
