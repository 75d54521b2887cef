"""What the sites say of quantised layers, before a method comes."""

import copy

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Linear8bitLt, LinearNF4
from quantised import FORMATS, Mlp, quantised, quantised_linear
from torch import nn

from tunerkit import get_peft_model
from tunerkit.errors import UnsupportedSiteError
from tunerkit.sites import make_site, site_class
from tunerkit_bitsandbytes import EightBitSite, FourBitSite
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoraConfig


def layer(form, **settings):
    return quantised_linear(nn.Linear(64, 96), form, **settings).to("cpu")


def dequantised(module):
    """What bitsandbytes says the weight is, by its own functions."""
    weight = module.weight
    if isinstance(module, Linear4bit):
        return functional.dequantize_4bit(weight.data, weight.quant_state)
    scales = module.state.SCB if weight.SCB is None else weight.SCB
    return weight.data.float() * scales[:, None] / 127


def test_types():
    assert [site_class(kind) for kind in (Linear4bit, LinearNF4)] == [FourBitSite, FourBitSite]
    assert site_class(Linear8bitLt) is EightBitSite
    assert make_site(layer("nf4")).kind == "linear"


@pytest.mark.parametrize("form", FORMATS)
class TestSite:
    def test_weight(self, form):
        module = layer(form)
        site = make_site(module, "path")
        assert torch.allclose(site.weight, dequantised(module), atol=1e-7)
        assert torch.equal(site.stored + 0, site.weight)
        assert (site.in_features, site.out_features, site.channels) == (64, 96, 64)
        assert site.bias is module.bias

    def test_form_is_known_without_reading_the_weight(self, form, monkeypatch):
        site = make_site(layer(form))
        monkeypatch.setattr(type(site), "read_weight", lambda *_: pytest.fail("the weight was read"))
        assert (site.stored.shape, site.stored.dtype, site.device.type) == ((96, 64), torch.float32, "cpu")
        assert site.zeros(2, 3).dtype == torch.float32
        model = get_peft_model(quantised(Mlp(), form), LoraConfig(target_modules=["first"]))
        model.add_adapter("other", IA3Config(target_modules=["first"], feedforward_modules=[]))
        model(torch.randn(2, 64))

    def test_dtype_of_before(self, form):
        module = quantised_linear(nn.Linear(64, 96).bfloat16(), form).to(torch.bfloat16).to("cpu")
        site = make_site(module)
        if form != "int8":  # where nobody knows it
            assert site.dtype == site.weight.dtype == torch.bfloat16
        assert site.to_stored(site.weight.float(), None)["weight"].dtype == module.weight.dtype

    def test_weight_after_calls(self, form):
        """Calls move what belongs to the numbers from the parameter to the layer."""
        module = layer(form)
        before, x = make_site(module).weight, torch.randn(3, 64)
        module(x), module.eval()(x)
        assert torch.equal(make_site(module).weight, before)

    def test_runs_with_other_parameters(self, form):
        module, x = layer(form), torch.randn(3, 64)
        weight, bias, called = torch.randn(96, 64), torch.randn(96), []
        module.register_forward_hook(lambda *_: called.append(1))
        y = make_site(module).run(x, weight, bias)
        assert torch.equal(y, nn.functional.linear(x, weight, bias))
        assert called == [1]
        assert make_site(module).run(x.bfloat16(), weight, None).dtype == torch.bfloat16

    def test_stores_to_the_nearest(self, form):
        site = make_site(layer(form))
        again = site.with_parameters(site.to_stored(site.weight, site.bias))
        assert torch.allclose(again.weight, site.weight, atol=2e-3)
        assert torch.equal(again.bias, site.bias)

    def test_runs_other_stored_parameters_and_keeps_its_own(self, form):
        module, x = layer(form), torch.randn(3, 64)
        site, before = make_site(module), module(x)
        other = site.with_parameters(site.to_stored(site.weight * 2, None))
        assert torch.allclose(other.module(x), 2 * nn.functional.linear(x, site.weight), atol=0.05)
        assert torch.equal(module(x), before)
        assert torch.equal(site.weight, make_site(module).weight)

    def test_dequantised(self, form):
        module, x = layer(form).eval(), torch.randn(3, 64)
        plain = make_site(module).dequantised()
        assert type(plain) is nn.Linear
        assert not plain.training
        assert plain.bias is module.bias
        assert torch.equal(plain(x), nn.functional.linear(x, make_site(module).weight, module.bias))

    def test_deepcopy(self, form):
        module = layer(form)
        module(torch.randn(2, 64))
        assert torch.equal(make_site(copy.deepcopy(module)).weight, make_site(module).weight)

    def test_not_quantised_yet(self, form):
        model = nn.Sequential(quantised_linear(nn.Linear(64, 96), form))
        msg = r"The module '0' \(Linear.*\) cannot be adapted: its weight is not quantised yet; move the model"
        with pytest.raises(UnsupportedSiteError, match=msg):
            get_peft_model(model, LoraConfig(target_modules=["0"]))


def test_weight_of_eight_bits_that_is_not_quantised():
    model = nn.Sequential(Linear8bitLt(64, 96))
    msg = r"it keeps its weight unquantised \(has_fp16_weights=True\); make it with has_fp16_weights=False"
    with pytest.raises(UnsupportedSiteError, match=msg):
        get_peft_model(model, LoraConfig(target_modules=["0"]))


@pytest.mark.parametrize("nested", [True, False])
def test_numbers_in_the_order_of_some_processors(nested):
    """Where the processor has instructions for it, a call without gradients puts the numbers into another order."""
    module = layer("nf4", compress_statistics=nested)
    before, parameter = make_site(module).weight, module.weight
    parameter.data, parameter.quant_state = functional._convert_weight_packed_for_cpu(
        parameter.data, copy.copy(parameter.quant_state)
    )
    site = make_site(module)
    assert site.dtype == torch.float32
    assert torch.allclose(site.weight, before, rtol=2e-2, atol=1e-4)  # the scales were rounded on the way
    assert parameter.quant_state.packing_format_for_cpu
    other = site.quantise(site.weight)
    assert other.quant_state.nested is nested


@pytest.mark.parametrize("form", FORMATS)
def test_the_status_names_the_library(form):
    name = "bnb 8bit" if form == "int8" else "bnb 4bit"
    model = get_peft_model(quantised(Mlp(), form), LoraConfig(target_modules=["first", "second"]))
    assert {layer.quantization_backend for layer in model.get_layer_status()} == {name}
    assert model.get_model_status().quantization_backend == name
    model.add_adapter("other", LoraConfig(target_modules=["second", "head"]))
    assert [layer.quantization_backend for layer in model.get_layer_status()] == [name, name, None]
    assert model.get_model_status().quantization_backend == "irregular"


def test_the_status_has_pefts_names_for_it():
    quantization = pytest.importorskip("peft.utils.quantization_utils", reason="comparing with PEFT needs it")
    assert FourBitSite.backend == quantization.Bnb4bitBackend.backend_name
    assert EightBitSite.backend == quantization.Bnb8bitBackend.backend_name


@pytest.mark.parametrize("form", FORMATS)
class TestGradients:
    """With gradients a layer computes with its weight in full precision, so they are the formula's."""

    @pytest.mark.parametrize(
        "config",
        [
            LoraConfig(r=4, target_modules=["first"], init_lora_weights=False),
            LoraConfig(r=4, target_modules=["first"], init_lora_weights=False, use_dora=True),
            IA3Config(target_modules=["first"], feedforward_modules=[], init_ia3_weights=False),
        ],
        ids=["lora", "dora", "ia3"],
    )
    def test_equal_those_on_a_plain_layer(self, form, config):
        base = quantised(Mlp(), form)
        plain = copy.deepcopy(base)
        for name in ("first", "second"):
            setattr(plain, name, make_site(getattr(plain, name)).dequantised())
        results = []
        for start in (base, plain):
            torch.manual_seed(1)
            model = get_peft_model(start, config)
            x = torch.randn(5, 64, requires_grad=True)
            model(x).square().sum().backward()
            results.append({"x": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}})
        assert all(gradient.abs().max() > 1e-3 for gradient in results[0].values())
        for name, gradient in results[0].items():
            scale = float(results[1][name].abs().max())
            limit = 3e-2 if form == "int8" else 1e-5  # the outputs of eight bits are rounded, and the loss is of them
            assert (gradient - results[1][name]).abs().max() < limit * scale, name
