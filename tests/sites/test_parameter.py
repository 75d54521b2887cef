from __future__ import annotations

import pytest
import torch
from torch import nn

from tunerkit.adapted_layer import AdaptedLayer
from tunerkit.route import Owner
from tunerkit.sites import ParameterSite, make_site


class Experts(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 5, 6, dtype=dtype))
        self.down = nn.Parameter(torch.randn(6, 5, dtype=dtype))
        self.bias = nn.Parameter(torch.randn(5, dtype=dtype))

    def forward(self, x, expert=0):
        return x @ self.up[expert] @ self.down + self.bias


@pytest.fixture
def experts():
    torch.manual_seed(0)
    return Experts()


@pytest.fixture
def x():
    return torch.randn(2, 5, generator=torch.Generator().manual_seed(1))


class TestByItself:
    @pytest.mark.parametrize(("name", "sizes"), [("up", (5, 6)), ("down", (6, 5))])
    def test_what_it_shows(self, experts, name, sizes):
        site = make_site(experts, "moe", name)
        assert type(site) is ParameterSite
        assert (site.kind, site.weight_name) == ("parameter", name)
        assert site.weight is site.stored is experts.get_parameter(name)
        assert (site.out_features, site.in_features) == sizes
        assert site.bias is None
        assert site.owner is experts

    def test_its_names(self, experts):
        site = make_site(experts, "moe", "down")
        assert (site.parameter_name, site.read, site.settings_name) == ("down", ("down",), "moe.down")

    def test_another_module_in_its_place(self, experts):
        other = Experts()
        moved = make_site(experts, "moe", "up").at(other)
        assert (moved.name, moved.parameter_name) == ("moe", "up")
        assert moved.weight is other.up

    def test_fitted_is_the_very_tensor_where_its_form_is_right(self, experts):
        site, weight = make_site(experts, "moe", "down"), torch.randn(6, 5)
        assert site.fitted(weight, None)["down"] is weight
        assert site.fitted(weight.double().flatten(), None)["down"].shape == (6, 5)

    @pytest.mark.parametrize("name", ["up", "down"])
    def test_run(self, experts, x, name):
        site = make_site(experts, "moe", name)
        weight = torch.randn_like(site.weight)
        before = {key: (p, p.detach().clone()) for key, p in experts.named_parameters()}
        wanted = torch.func.functional_call(experts, {name: weight}, (x, 2))
        assert torch.equal(site.run(x, weight, None, 2), wanted)
        assert torch.equal(site.run(x, weight, None, expert=2), wanted)
        assert torch.equal(site.run(x, weight.reshape(-1), None, expert=2), wanted)
        assert all(experts.get_parameter(key) is p and torch.equal(p, value) for key, (p, value) in before.items())

    def test_the_module_has_a_bias_of_its_own(self, experts):
        assert set(make_site(experts, "moe", "down").to_stored(torch.ones(6, 5), None)) == {"down"}


class TestNested:
    @pytest.fixture
    def layers(self, experts):
        inner = AdaptedLayer(make_site(experts, "moe", "up"), Owner())
        return inner, AdaptedLayer(make_site(inner, "moe", "down"), Owner())

    def test_the_parameter_is_found_below(self, experts, layers):
        site = layers[1].site
        assert site.module is layers[0]
        assert site.owner is experts
        assert site.weight is experts.down
        assert layers[1].get_base_layer() is experts

    def test_run(self, experts, layers, x):
        weight = torch.randn(6, 5)
        state = dict(layers[0].__dict__)
        wanted = torch.func.functional_call(experts, {"down": weight}, (x, 1))
        assert torch.equal(layers[1].site.run(x, weight, None, 1), wanted)
        assert torch.equal(layers[1].site.with_parameters({"down": weight}).module(x, 1), wanted)
        assert layers[0].base_layer is experts
        assert layers[0].__dict__ == state

    def test_replaced_below(self, layers, x):
        layers[0].base_layer = other = Experts()
        assert layers[1].site.weight is other.down
        assert torch.equal(layers[1](x), other(x))
