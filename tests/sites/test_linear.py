from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, weight_norm

from tunerkit import sites
from tunerkit.sites import EmbeddingSite, LinearSite, TransposedLinearSite, make_site

HOOKS = [f"register_{when}_hook" for when in ("forward", "forward_pre", "full_backward", "full_backward_pre")]
GLOBAL_HOOKS = [name.replace("register_", "register_module_") for name in HOOKS]


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x).sigmoid()


class Halving(nn.Module):
    def forward(self, weight):
        return weight / 2


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [nn.Linear, Own])
class TestRun:
    def test_as_the_layer_would(self, kind, bias):
        layer, x = kind(5, 4, bias=bias), torch.randn(2, 3, 5)
        site = make_site(layer)
        assert type(site) is LinearSite
        assert (site.in_features, site.out_features, site.weight_name) == (5, 4, "weight")
        weight, vector = torch.randn(4, 5), torch.randn(4)
        after = torch.sigmoid if kind is Own else (lambda y: y)
        assert torch.equal(site.run(x, weight, vector), after(F.linear(x, weight, vector)))
        assert torch.equal(site.run(x, weight, None), after(F.linear(x, weight)))
        assert torch.equal(site.run(x, layer.weight, layer.bias), layer(x))

    def test_precision_of_the_layer(self, kind, bias):
        layer = kind(5, 4, bias=bias, dtype=torch.bfloat16)
        y = make_site(layer).run(torch.randn(3, 5, dtype=torch.bfloat16), torch.randn(4, 5), torch.randn(4))
        assert y.dtype is torch.bfloat16

    @pytest.mark.parametrize("register", HOOKS)
    def test_hooks(self, kind, bias, register):
        layer, seen = kind(5, 4, bias=bias), []
        getattr(layer, register)(lambda *_: seen.append(1))
        x = torch.randn(3, 5, requires_grad=True)
        make_site(layer).run(x, torch.randn(4, 5), None).sum().backward()
        assert seen == [1]

    def test_arguments_that_the_layer_does_not_take(self, kind, bias):
        layer = kind(5, 4, bias=bias)
        with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given"):
            make_site(layer).run(torch.randn(3, 5), layer.weight, None, 2)
        with pytest.raises(TypeError, match="unexpected keyword argument 'scale'"):
            make_site(layer).run(torch.randn(3, 5), layer.weight, None, scale=2)


def halves_its_weight(layer):
    """Leave a layer as offloaders do: its weight is a plain attribute."""
    weight = layer.weight.detach() / 2
    del layer.weight
    layer.weight = weight


def forward_of_its_own(layer):
    layer.forward = lambda x: F.linear(x, layer.weight, layer.bias) / 2


def compiled_call(layer):
    layer._compiled_call_impl = lambda x: F.linear(x, layer.weight, layer.bias) / 2


class TestCall:
    """The layer is not called where that would be a product with its weight and nothing else."""

    @pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("kind", [nn.Linear, Own])
    def test_as_the_layer(self, kind, bias, shape):
        layer, x = kind(5, 4, bias=bias), torch.randn(shape)
        assert torch.equal(make_site(layer)(x), layer(x))

    @pytest.mark.parametrize("change", [halves_its_weight, forward_of_its_own, compiled_call])
    def test_what_was_replaced_on_the_layer(self, change):
        layer, x = nn.Linear(5, 4, bias=False), torch.randn(3, 5)
        site, before = make_site(layer), layer(x)
        change(layer)
        assert torch.allclose(site(x), before / 2)

    def test_forward_replaced_for_all_layers(self, monkeypatch):
        layer, x = nn.Linear(5, 4), torch.randn(3, 5)
        site, before = make_site(layer), layer(x)
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: F.linear(x, self.weight, self.bias) / 2)
        assert torch.allclose(site(x), before / 2)

    @pytest.mark.parametrize("register", GLOBAL_HOOKS)
    def test_hooks_of_all_modules(self, register):
        layer, seen = nn.Linear(5, 4), []
        handle = getattr(nn.modules.module, register)(lambda module, *_: seen.append(module))
        try:
            make_site(layer)(torch.randn(3, 5, requires_grad=True)).sum().backward()
        finally:
            handle.remove()
        assert seen == [layer]

    @pytest.mark.parametrize("register", HOOKS)
    def test_hooks_that_come_and_go(self, register):
        layer, seen, x = nn.Linear(5, 4), [], torch.randn(3, 5, requires_grad=True)
        site = make_site(layer)
        site(x).sum().backward()
        handle = getattr(layer, register)(lambda *_: seen.append(1))
        site(x).sum().backward()
        handle.remove()
        site(x).sum().backward()
        assert seen == [1]

    def test_arguments_that_the_layer_does_not_take(self):
        site = make_site(nn.Linear(5, 4))
        with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given"):
            site(torch.randn(3, 5), 2)
        with pytest.raises(TypeError, match="unexpected keyword argument 'scale'"):
            site(torch.randn(3, 5), scale=2)


class TestTakes:
    def test_what_it_takes(self):
        for layer in (
            nn.Linear(5, 4),
            Own(5, 4),
            nn.Linear(5, 4, dtype=torch.bfloat16),
            nn.Linear(5, 4, device="meta"),
        ):
            assert LinearSite.takes(layer) is None
        assert EmbeddingSite.takes(nn.Embedding(7, 5)) is None

    @pytest.mark.parametrize(("layer", "site"), [(nn.Linear(5, 4), LinearSite), (nn.Embedding(7, 5), EmbeddingSite)])
    def test_integers(self, layer, site):
        layer._parameters["weight"] = nn.Parameter(torch.ones(4, 5, dtype=torch.int8), requires_grad=False)
        assert site.takes(layer) == (
            "its weight is stored as torch.int8, for which no installed package teaches a site"
        )

    @pytest.mark.filterwarnings("ignore::FutureWarning")
    @pytest.mark.parametrize(
        "change",
        [
            lambda layer: parametrize.register_parametrization(layer, "weight", Halving()),
            parametrizations.weight_norm,
            weight_norm,
        ],
    )
    @pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding])
    def test_a_weight_that_is_computed(self, change, kind):
        """Other parameters in place of such a weight would have no effect, so it must not seem to work."""
        layer = kind(5, 4)
        change(layer)
        site = make_site(layer)
        assert "its weight is not a parameter of its own" in site.takes(layer)


NO_TRANSFORMERS = "the layer is one of transformers"


def conv1d(*args):
    return pytest.importorskip("transformers.pytorch_utils", reason=NO_TRANSFORMERS).Conv1D(*args)


class TestTransposed:
    def test_shows_its_weight_like_any_other(self):
        layer = conv1d(4, 5)
        site = make_site(layer)
        assert type(site) is TransposedLinearSite
        assert (site.kind, site.transposed, site.in_features, site.out_features) == ("linear", True, 5, 4)
        assert torch.equal(site.weight, layer.weight.T)
        weight = torch.randn(4, 5)
        stored = site.to_stored(weight, None)
        assert torch.equal(stored["weight"], weight.T)
        assert stored["weight"].is_contiguous()
        assert torch.equal(site.as_stored(site.weight), layer.weight)

    def test_subclasses_too(self):
        class Own(type(conv1d(1, 1))):
            def forward(self, x):
                return super().forward(x).sigmoid()

        layer, x, weight = Own(4, 5), torch.randn(3, 5), torch.randn(4, 5)
        site = make_site(layer)
        assert type(site) is TransposedLinearSite
        assert torch.allclose(site.run(x, weight, layer.bias), F.linear(x, weight, layer.bias).sigmoid())

    @pytest.mark.parametrize("hooked", [False, True])
    def test_runs_with_other_parameters(self, hooked):
        layer, x = conv1d(4, 5), torch.randn(2, 3, 5)
        seen = []
        if hooked:
            layer.register_forward_hook(lambda *_: seen.append(1))
        before = layer.weight.detach().clone()
        weight, bias = torch.randn(4, 5, requires_grad=True), torch.randn(4)
        y = make_site(layer).run(x, weight, bias)
        assert torch.allclose(y, F.linear(x, weight, bias), atol=1e-6)
        assert torch.equal(y, F.linear(x, weight, bias)) or hooked
        assert len(seen) == hooked
        assert torch.autograd.grad(y.sum(), weight)[0].abs().max() > 1e-3
        assert torch.equal(layer.weight, before)
        assert torch.allclose(make_site(layer).run(x, layer.weight.T, layer.bias), layer(x), atol=1e-6)

    def test_precision_of_the_layer(self):
        layer = conv1d(4, 5).bfloat16()
        y = make_site(layer).run(torch.randn(3, 5).bfloat16(), torch.randn(4, 5), torch.randn(4))
        assert y.dtype is torch.bfloat16

    def test_is_known_without_the_library(self):
        made = type("Conv1D", (nn.Module,), {"__module__": "transformers.pytorch_utils", "__qualname__": "Conv1D"})
        assert sites.site_class(made) is TransposedLinearSite


def test_a_weight_without_a_shape():
    assert "has no shape before the layer is first run" in LinearSite.takes(nn.LazyLinear(3))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forward_that_is_replaced_for_all_linear_layers_is_called(when):
    """Whether it is replaced before the package is imported or after, by one that looks like torch's."""
    replace = """
ordinary = nn.Linear.forward
@functools.wraps(ordinary)
def doubled(self, x):
    return ordinary(self, x) * 2
nn.Linear.forward = doubled
"""
    use = "from tunerkit.sites import LinearSite\n"
    program = f"""
import functools
import torch
from torch import nn
{replace + use if when == "before" else use + replace}
layer, x = nn.Linear(3, 4), torch.ones(2, 3)
assert torch.equal(LinearSite(layer)(x), 2 * (x @ layer.weight.T + layer.bias))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
