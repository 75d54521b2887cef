"""What is particular to LoRA; what every method has to pass stands in `test_conformance.py`."""

import math

import pytest
import torch
from torch import nn

from tunerkit import cast_adapter_dtype, get_peft_model
from tunerkit.adapter import AdditiveAdapter
from tunerkit.errors import MergeError, UnsupportedSiteError
from tunerkit.sites import ConvolutionSite, LinearSite
from tunerkit_lora import AnchoredLora, LoraAdapter, LoraConfig, LoraConvolution, LoraLayer, LoraModel

X = torch.linspace(-1, 1, 24).reshape(4, 6)


def adapted(**settings):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(target_modules=["0"], **settings))
    layer = model.get_base_model()[0]
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    return model.eval(), layer


def update(layer):
    return layer.lora_B["default"].weight @ layer.lora_A["default"].weight


class TestFormula:
    @pytest.mark.parametrize(
        ("settings", "scaling"),
        [
            ({"r": 4, "lora_alpha": 6}, 1.5),
            ({"r": 4, "lora_alpha": 6, "use_rslora": True}, 3.0),
            ({"r": 3, "lora_alpha": 2.5}, 2.5 / 3),
            ({}, 1.0),
        ],
    )
    def test_adds_the_scaled_product(self, settings, scaling):
        model, layer = adapted(**settings)
        assert layer.scaling["default"] == pytest.approx(scaling)
        expected = layer.base_layer(X) + scaling * X @ update(layer).T
        assert torch.allclose(model(X), expected, atol=1e-5)

    def test_delta_is_what_merging_adds(self):
        model, layer = adapted(r=2, lora_alpha=6)
        before = layer.weight.clone()
        delta = layer.adapters["default"].delta(layer.bare_site)
        model.merge_adapter()
        assert torch.allclose(layer.weight, before + delta)
        assert torch.allclose(delta, 3 * update(layer))
        assert layer.bias is layer.base_layer.bias

    def test_scaling_is_read_when_it_is_used(self):
        model, layer = adapted(r=2, lora_alpha=2)
        plain = layer.base_layer(X)
        first = model(X) - plain
        layer.scaling["default"] = 3.0
        assert layer.scaling["default"] == 3
        assert torch.allclose(model(X) - plain, 3 * first, atol=1e-5)
        model.merge_adapter()
        assert torch.allclose(model(X) - plain, 3 * first, atol=1e-5)

    def test_supports_conversion(self):
        model, _ = adapted()
        assert issubclass(LoraAdapter, AdditiveAdapter)
        assert model.base_model.supports_lora_conversion()


class TestStart:
    def big(self, **settings):
        torch.manual_seed(0)
        model = get_peft_model(nn.Sequential(nn.Linear(400, 300)), LoraConfig(target_modules=["0"], **settings))
        layer = model.get_base_model()[0]
        return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()

    def test_by_default_the_first_factor_is_uniform_and_the_second_zero(self):
        first, second = self.big(r=20)
        bound = 1 / math.sqrt(400)
        assert first.shape == (20, 400)
        assert second.shape == (300, 20)
        assert 0.99 * bound < first.abs().max() <= bound
        assert first.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert not second.any()

    def test_gaussian(self):
        first, second = self.big(r=20, init_lora_weights="gaussian")
        assert first.std() == pytest.approx(1 / 20, rel=0.05)
        assert first.abs().max() > 3 / 20
        assert not second.any()

    def test_without_it_the_adapter_changes_the_output_at_once(self):
        first, second = self.big(r=20, init_lora_weights=False)
        assert first.abs().max() <= 1 / math.sqrt(400)
        assert 0 < second.abs().max() <= 1 / math.sqrt(20)


class TestDropout:
    def test_only_while_training(self):
        model, _ = adapted(lora_dropout=0.5)
        plain = model(X)
        assert torch.equal(model(X), plain)
        model.train()
        assert not torch.allclose(model(X), plain)

    def test_drops_only_the_input_of_the_adapter(self):
        model, layer = adapted(lora_dropout=1.0)
        model.train()
        assert torch.equal(model(X), layer.base_layer(X))

    def test_keeps_the_mean(self):
        model, layer = adapted(lora_dropout=0.5)
        row = torch.ones(1, 6)
        expected = model(row)
        model.train()
        torch.manual_seed(0)
        mean = model(row.expand(20_000, 6)).mean(dim=0)
        spread = (update(layer).detach() ** 2).sum(dim=1).max().sqrt()
        assert torch.allclose(mean, expected[0], atol=float(5 * spread / math.sqrt(20_000)))

    def test_is_not_in_the_merged_weight(self):
        model, _ = adapted(lora_dropout=0.5)
        expected = model(X)
        model.train()
        model.merge_adapter()
        assert torch.allclose(model(X), expected, atol=1e-5)

    def test_is_a_number_on_the_layer(self):
        _, layer = adapted(lora_dropout=0.25)
        assert layer.lora_dropout["default"] == 0.25


class TestFactors:
    def test_are_linear_layers_that_can_be_hooked(self):
        model, layer = adapted()
        plain = layer.base_layer(X)
        seen = []
        handle = layer.lora_A["default"].register_forward_hook(lambda _module, _args, output: seen.append(output))
        expected = plain + X @ update(layer).T
        assert torch.allclose(model(X), expected, atol=1e-5)
        handle.remove()
        assert [tuple(output.shape) for output in seen] == [(4, 8)]

    def test_are_single_precision_on_a_half_precision_base(self):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(6, 5)).to(torch.bfloat16)
        model = get_peft_model(base, LoraConfig(target_modules=["0"]), autocast_adapter_dtype=False)
        layer = base[0]
        assert layer.lora_A["default"].weight.dtype == torch.bfloat16
        cast_adapter_dtype(base, "default")
        assert layer.lora_A["default"].weight.dtype == torch.float32
        assert model(X.bfloat16()).dtype == torch.bfloat16


class TestNames:
    def test_layer_and_tuner_are_lora_while_they_hold_it(self):
        model, layer = adapted()
        assert isinstance(layer, LoraLayer)
        assert isinstance(model.base_model, LoraModel)
        base = model.get_base_model()
        model.delete_adapter("default")
        assert not isinstance(base[0], LoraLayer)
        assert not isinstance(model.base_model, LoraModel)
        model.add_adapter("again", LoraConfig(target_modules=["0"]))
        assert isinstance(base[0], LoraLayer)
        assert isinstance(model.base_model, LoraModel)


class TestSettingsName:
    """A layer may go by another path in a config's settings than its own, as an attention's `out_proj` does."""

    class Linear(LinearSite):
        settings_name = "outer"

    class Convolution(ConvolutionSite):
        settings_name = "outer"
        kind = "conv1d"
        layer = nn.Conv1d

    def test_rank_of_a_convolution_with_groups(self):
        site = self.Convolution(nn.Conv1d(3, 6, 2, groups=3), "outer.inner")
        assert LoraConvolution(site, LoraConfig(r=8, rank_pattern={"outer": 3})).r == 3
        with pytest.raises(UnsupportedSiteError, match=r"the rank there, 4, is .* rank_pattern=\{'outer': 3\}"):
            LoraConvolution(site, LoraConfig(r=3, rank_pattern={"outer": 4}))

    def test_a_convolution_with_groups_adds_no_weight(self):
        site = self.Convolution(nn.Conv1d(4, 4, 3, groups=2), "outer.inner")
        with pytest.raises(MergeError, match=r"'outer\.inner' adds nothing that fits its weight: .*groups"):
            LoraConvolution(site, LoraConfig(r=2)).delta(site)

    def test_a_start_with_the_scale_in_it(self):
        layer = nn.Linear(6, 5)
        config = LoraConfig(r=2, init_lora_weights="pissa", rank_pattern={"outer": 5}, alpha_pattern={"outer": 30})
        adapter = AnchoredLora(self.Linear(layer, "outer.inner"), config)
        assert adapter.scaling == 6
        torch.testing.assert_close(adapter.scaling * update_of(adapter), layer.weight.detach())


def update_of(adapter):
    return adapter.lora_start_B @ adapter.lora_start_A
