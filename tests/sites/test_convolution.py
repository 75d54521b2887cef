from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from tunerkit.sites import ConvolutionSite, make_site, site_class
from tunerkit.testing.models import SAMPLES

KINDS = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=[(sample, name) for sample in (*KINDS, "grouped conv2d") for name in ("first", "second")])
def case(request):
    """A convolution, and an input of it."""
    sample, name = request.param
    model, (x,) = SAMPLES[sample](), SAMPLES[sample].inputs()
    return getattr(model, name), x if name == "first" else model.first(x)


def test_which_it_is():
    for kind, layer in KINDS.items():
        site = make_site(layer(2, 4, 3), "path")
        assert isinstance(site, ConvolutionSite)
        assert (site.kind, site.layer, site.transposed) == (kind, layer, False)
    assert site_class(nn.ConvTranspose2d) is None
    assert site_class(type("Own", (nn.Conv2d,), {})).kind == "conv2d"


def test_the_weight_is_the_flattened_kernels():
    site = make_site(nn.Conv2d(4, 6, (3, 2), groups=2))
    assert site.weight.shape == (6, 12)
    assert torch.equal(site.weight, site.module.weight.reshape(6, 12))
    assert (site.in_features, site.out_features, site.channels, site.groups) == (12, 6, 4, 2)
    assert site.kernel_size == (3, 2)
    assert site.as_stored(site.weight).shape == (6, 2, 3, 2)


def test_runs_with_other_parameters(case):
    layer, x = case
    site, before = make_site(layer), copy.deepcopy(layer.state_dict())
    other = copy.deepcopy(layer)
    other.bias = nn.Parameter(torch.randn(len(layer.weight)))
    with torch.no_grad():
        other.weight.normal_()
        expected = other(x)
        assert (expected - layer(x)).abs().max() > 1e-3
        assert torch.equal(site.run(x, other.weight.flatten(1), other.bias), expected)
        assert torch.equal(site.run(x, site.weight, site.bias), layer(x))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_scaled_inputs_are_scaled_columns(case):
    layer, x = case
    site, scale = make_site(layer), torch.randn(layer.in_channels)
    matrix = site.scale_inputs(scale)
    assert matrix.shape == site.weight.shape
    found = site.run(x, site.weight * matrix, site.bias)
    assert torch.allclose(found, layer(x * scale.reshape(-1, *(1 for _ in site.kernel_size))), atol=1e-5)
    assert (found - layer(x)).abs().max() > 1e-3


class TestFactors:
    def test_steps_over_the_input_like_the_layer(self, case):
        layer, x = case
        site = make_site(layer)
        weight = torch.randn(5, layer.in_channels, *layer.kernel_size)
        factor = site.convolution(weight.flatten(1))
        assert type(factor) is site.layer
        assert factor.bias is None
        assert factor.groups == 1
        assert torch.equal(factor.weight, weight)
        assert factor.weight.requires_grad
        own = copy.deepcopy(layer)
        own.groups, own.in_channels, own.out_channels = 1, layer.in_channels, 5
        own.weight, own.bias = nn.Parameter(weight), None
        assert torch.equal(factor(x), own(x))
        assert factor(x).shape[2:] == layer(x).shape[2:]

    def test_their_product_is_a_kernel_where_there_are_no_groups(self, case):
        layer, x = case
        site = make_site(layer)
        first = torch.randn(4, layer.in_channels * layer.weight[0, 0].numel())
        second, bias = torch.randn(len(layer.weight), 4 // layer.groups), torch.randn(len(layer.weight))
        down, up = site.convolution(first), site.pointwise(second, bias)
        assert up.groups == layer.groups
        assert set(up.kernel_size) == set(up.stride) == {1}
        assert torch.equal(up.bias, bias)
        found = up(down(x))
        assert found.shape == layer(x).shape
        if layer.groups == 1:
            assert torch.allclose(found, site.run(x, second @ first, bias), atol=1e-4)

    def test_makes_no_random_numbers(self):
        site, weight = make_site(nn.Conv2d(3, 4, 2)), torch.randn(2, 12)
        state = torch.get_rng_state()
        site.convolution(weight)
        assert site.pointwise(torch.randn(4, 2, generator=torch.Generator())).bias is None
        assert torch.equal(torch.get_rng_state(), state)


class TestTakes:
    def test_what_it_takes(self):
        assert ConvolutionSite.takes(nn.Conv2d(2, 3, 1)) is None

    def test_a_weight_without_a_shape(self):
        assert "has no shape before the layer is first run" in ConvolutionSite.takes(nn.LazyConv2d(3, 1))

    def test_a_weight_that_is_computed(self):
        layer = parametrizations.weight_norm(nn.Conv2d(2, 3, 1))
        assert "its weight is not a parameter of its own" in ConvolutionSite.takes(layer)
