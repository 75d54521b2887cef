"""Merging into quantised weights: what it rounds, that it says so, and how to have it exact."""

import copy
import warnings

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from quantised import FORMATS, Mlp, quantised

from tunerkit import get_peft_model
from tunerkit.errors import MergeError, MergeWarning, QuantisationWarning
from tunerkit.sites import make_site
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoraConfig

LORA = LoraConfig(r=4, target_modules=["first", "second"], init_lora_weights=False)
DORA = LoraConfig(r=4, target_modules=["first", "second"], init_lora_weights=False, use_dora=True)
IA3 = IA3Config(target_modules=["first", "second"], feedforward_modules=["second"], init_ia3_weights=False)
CLOSE = {"nf4": 0.12, "fp4": 0.16, "int8": 0.02}
"""How far rounding may move a weight, relative to its norm: what quantising a normal matrix does, and a little."""
FAR = 2.5
"""How much further it may move the output of two such layers and what lies between them."""


@pytest.fixture
def x():
    return torch.randn(5, 64)


def adapted(form, config=LORA):
    return get_peft_model(quantised(Mlp(), form), config).eval()


def exact_weight(layer):
    return layer.adapters["default"].merged(layer.bare_site)[0].detach()


@pytest.mark.parametrize("config", [LORA, DORA, IA3], ids=["lora", "dora", "ia3"])
@pytest.mark.parametrize("form", FORMATS)
class TestMerging:
    def test_rounds_and_says_how_far(self, form, config, x):
        model = adapted(form, config)
        layer = model.base_model.model.first
        expected, before = exact_weight(layer), model(x)
        with pytest.warns(QuantisationWarning, match=r"into 2 quantised layers, .* by up to \d+\.\d\d% of") as caught:
            model.merge_adapter()
        [warning] = caught
        assert warning.filename == __file__
        assert set(warning.message.errors) == {"first", "second"}
        assert isinstance(layer.base_layer, (Linear4bit, Linear8bitLt))
        weight = make_site(layer.base_layer).weight
        error = float((weight - expected).norm() / expected.norm())
        assert warning.message.errors["first"] == pytest.approx(error, rel=1e-4)
        assert 1e-4 < error < CLOSE[form]
        assert 1e-4 < (model(x) - before).norm() / before.norm() < FAR * CLOSE[form]

    def test_error_is_that_of_quantising_the_exact_weight(self, form, config):
        model = adapted(form, config)
        layer = model.base_model.model.first
        best = layer.site.with_parameters(layer.site.to_stored(exact_weight(layer), None)).weight
        with pytest.warns(QuantisationWarning):
            model.merge_adapter()
        assert torch.equal(make_site(layer.base_layer).weight, best)

    @pytest.mark.filterwarnings("ignore::tunerkit.errors.QuantisationWarning")
    def test_unmerged_bit_for_bit(self, form, config, x):
        model = adapted(form, config)
        first = model.base_model.model.first.base_layer
        before, weight = model(x), first.weight
        bits, state = weight.data.clone(), {key: value.clone() for key, value in first.state_dict().items()}
        for _ in range(2):
            model.merge_adapter()
            assert first.weight is not weight
            model(x)
            model.unmerge_adapter()
            assert first.weight is weight
            assert torch.equal(weight.data, bits)
            assert all(torch.equal(value, state[key]) for key, value in first.state_dict().items())
            assert torch.equal(model(x), before)

    def test_merge_and_unload(self, form, config, x):
        model = adapted(form, config)
        before = model(x)
        with pytest.warns(QuantisationWarning) as caught:
            merged = model.merge_and_unload()
        assert len(caught) == 1
        assert isinstance(merged.first, (Linear4bit, Linear8bitLt))
        assert 1e-4 < (merged(x) - before).norm() / before.norm() < FAR * CLOSE[form]

    def test_dequantised_is_exact(self, form, config, x):
        model = adapted(form, config)
        expected = {name: exact_weight(getattr(model.base_model.model, name)) for name in ("first", "second")}
        merged = model.merge_and_unload(dequantize=True)
        for name, weight in expected.items():
            module = getattr(merged, name)
            assert not isinstance(module, (Linear4bit, Linear8bitLt))
            assert torch.allclose(module.weight, weight, atol=1e-6)
        plain = Mlp().eval()
        plain.load_state_dict(merged.state_dict())
        assert torch.equal(merged(x), plain(x))

    @pytest.mark.filterwarnings("ignore::tunerkit.errors.QuantisationWarning")
    def test_disabled_while_merged(self, form, config, x):
        model = adapted(form, config)
        with model.disable_adapter():
            before = model(x)
        model.merge_adapter()
        merged = model(x)
        with model.disable_adapter():
            assert torch.equal(model(x), before)
        assert torch.equal(model(x), merged)


@pytest.mark.filterwarnings("ignore::tunerkit.errors.QuantisationWarning")
@pytest.mark.parametrize("form", FORMATS)
class TestSeveral:
    def test_second_is_rounded_once_with_the_first(self, form):
        together = adapted(form)
        together.add_adapter("other", DORA)
        together.set_adapter(["default", "other"])
        in_turn = copy.deepcopy(together)
        together.merge_adapter()
        in_turn.merge_adapter(["default"])
        first = make_site(in_turn.base_model.model.first.base_layer).weight + 0
        in_turn.merge_adapter(["other"])
        one, other = (make_site(model.base_model.model.first.base_layer).weight for model in (together, in_turn))
        assert torch.equal(one, other)
        assert not torch.allclose(one, first, atol=1e-3)

    def test_merged_before_dequantising(self, form, x):
        model = adapted(form)
        before = model(x)
        model.merge_adapter()
        with pytest.warns(MergeWarning, match="merged already"):
            merged = model.merge_and_unload(dequantize=True)
        limit = 2e-2 if form == "int8" else 1e-5  # the inputs are rounded too, before
        assert torch.allclose(merged(x), before, atol=limit)

    def test_without_the_originals(self, form, x):
        model = adapted(form)
        before = model(x)
        model.merge_adapter(keep_base="none")
        assert 1e-4 < (model(x) - before).norm() / before.norm() < FAR * CLOSE[form]
        with pytest.raises(MergeError, match="the original parameters were not kept"):
            model.unmerge_adapter()
        weight = make_site(model.base_model.model.first.base_layer).weight + 0
        with pytest.warns(MergeWarning, match="merged already"):
            merged = model.merge_and_unload(dequantize=True)
        assert torch.equal(merged.first.weight, weight)

    def test_delta_is_not_rounded(self, form):
        model = adapted(form)
        layer = model.base_model.model.first
        low = layer.adapters["default"]
        delta = low.scaling * low.lora_B.weight @ low.lora_A.weight
        assert torch.allclose(layer.get_delta_weight("default"), delta, atol=1e-6)

    def test_what_is_not_finite_is_refused(self, form):
        model = adapted(form)
        weight = model.base_model.model.first.base_layer.weight
        model.base_model.model.second.lora_B["default"].weight.data[0, 0] = torch.nan
        with pytest.raises(MergeError, match="Merging into 'second' would put NaN or infinities into its weight"):
            model.merge_adapter(safe_merge=True)
        assert model.base_model.model.first.base_layer.weight is weight

    @pytest.mark.parametrize(
        "merge",
        [
            lambda model: model.merge_adapter(),
            lambda model: model.merge_adapter(keep_base="none"),
            lambda model: model.merge_and_unload(),
        ],
        ids=["kept", "not_kept", "for_good"],
    )
    def test_a_warning_that_is_an_error_undoes_the_merge(self, form, merge, x):
        model = get_peft_model(
            quantised(Mlp(), form), LoraConfig(r=4, target_modules=["first", "head"], init_lora_weights=False)
        ).eval()
        before = model(x)
        modules = dict(model.named_modules())
        parameters = dict(model.named_parameters())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(QuantisationWarning):
                merge(model)
        assert all(modules[name] is module for name, module in model.named_modules())
        assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
        assert not any(layer.merged for layer in model.base_model.layers())
        assert torch.equal(model(x), before)
