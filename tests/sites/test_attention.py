from __future__ import annotations

import types
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from tunerkit import Method, PeftConfig, get_peft_model, plan, plugins, register
from tunerkit.adapter import Adapter
from tunerkit.errors import UnsupportedSiteError
from tunerkit.sites import AttentionSite, LinearSite, OutputProjectionSite, make_site


@pytest.fixture
def attention():
    torch.manual_seed(0)
    return nn.MultiheadAttention(8, 2)


@pytest.fixture
def x():
    return torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(1))


def test_what_it_shows(attention):
    site = make_site(attention, "block.attn")
    assert type(site) is AttentionSite
    assert (site.kind, site.weight_name, site.bias_name) == ("attention", "in_proj_weight", "in_proj_bias")
    assert site.weight is site.stored is attention.in_proj_weight
    assert site.bias is attention.in_proj_bias
    assert (site.out_features, site.in_features) == (24, 8)
    assert site.read == ("in_proj_weight", "in_proj_bias")
    assert site.settings_name == "block.attn"
    assert AttentionSite.parameters_of(attention) == ()
    assert AttentionSite.takes(attention) is None


def test_run(attention, x):
    site = make_site(attention, "attn")
    weight, bias = torch.randn(24, 8), torch.randn(24)
    before = dict(attention._parameters)
    wanted = torch.func.functional_call(attention, {"in_proj_weight": weight, "in_proj_bias": bias}, (x, x, x))
    for found in (site.run(x, weight, bias, x, x), site.run(x, weight, bias, value=x, key=x)):
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])
    assert all(attention._parameters[name] is before[name] for name in before)


def test_separate_projections():
    attention = nn.MultiheadAttention(8, 2, kdim=5)
    assert AttentionSite.parameters_of(attention) == ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def test_parametrized(attention):
    nn.utils.parametrize.register_parametrization(attention, "in_proj_weight", nn.Identity())
    assert "not a parameter of its own" in AttentionSite.takes(attention)


def test_output_projection(attention):
    site = make_site(attention.out_proj, "block.attn.out_proj")
    assert type(site) is OutputProjectionSite
    assert site.kind == "linear"
    assert site.read == ("weight", "bias")
    assert site.settings_name == "block.attn"
    assert "MultiheadAttention reads its weight and never calls it" in OutputProjectionSite.alone(attention.out_proj)
    assert LinearSite.alone(nn.Linear(2, 2)) is None


@dataclass
class Config(PeftConfig):
    peft_type: str | None = "TEST_HALF"
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | None = None
    target_parameters: list[str] | None = None


class TestPlan:
    """With a method of its own, for attention layers and linear ones."""

    class Half(Adapter):
        kinds = frozenset({"attention", "linear", "parameter"})

        def merged(self, below):
            return below.weight / 2, below.bias

    class NoForm(Half):
        unfoldable = "it is not linear"

    @pytest.fixture
    def use(self):
        def registered(adapter):
            register("test-half", types.SimpleNamespace(method=Method(config=Config, adapter=adapter)))
            return Config

        yield registered
        plugins.unregister("test-half")

    def test_reasons(self, use, attention):
        made = use(self.Half)
        model = nn.ModuleDict({"attn": attention, "lin": nn.Linear(8, 8)})
        found = plan(model, made(target_modules=["attn", "lin"]))
        assert {item.name: item.reason for item in found.decisions} == {
            "attn": "'attn'",
            "attn.out_proj": "with 'attn'",
            "lin": "'lin'",
        }
        assert plan(model, made(target_modules=["attn"], exclude_modules=["out_proj"])).adapted == ["attn"]
        assert plan(model, made(target_modules="attn.*")).adapted == ["attn", "attn.out_proj"]

    def test_a_shared_layer(self, use, attention, x):
        plain = nn.MultiheadAttention(8, 2)
        plain.load_state_dict({k: v / 2 if v.dim() == 2 else v for k, v in attention.state_dict().items()})
        model = nn.ModuleDict({"first": attention, "second": attention})
        adapted = get_peft_model(model, use(self.Half)(target_modules=["first", "second"]))
        found = adapted.base_model.model
        assert found["first"] is found["second"]
        assert found["first"].base_layer.out_proj.available_adapters == ["default"]
        assert not hasattr(found["first"].base_layer.out_proj.base_layer, "base_layer")
        torch.testing.assert_close(found["second"](x, x, x)[0], plain(x, x, x)[0])

    @pytest.mark.parametrize(
        "targets", [{"target_modules": ["attn"]}, {"target_modules": [], "target_parameters": ["attn.in_proj_weight"]}]
    )
    def test_no_merged_form(self, use, attention, targets):
        made = use(self.NoForm)
        model = nn.ModuleDict({"attn": attention})
        with pytest.raises(
            UnsupportedSiteError, match=r"'attn' cannot be adapted by 'test-half'.*\(it is not linear\)"
        ):
            get_peft_model(model, made(**targets))
        assert model["attn"] is attention

    def test_other_methods_are_not_concerned(self, use, attention):
        class OnlyLinear(self.Half):
            kinds = frozenset({"embedding"})

        made = use(OnlyLinear)
        with pytest.raises(UnsupportedSiteError, match="adapts embeddings only"):
            get_peft_model(nn.ModuleDict({"attn": attention}), made(target_modules=["attn"]))
