from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from tunerkit import sites
from tunerkit.errors import ConfigError
from tunerkit.sites import (
    Bound,
    EmbeddingSite,
    LinearSite,
    ParameterSite,
    Site,
    in_words,
    is_making_on_meta,
    make_on_meta,
    make_site,
    site_class,
    twin,
)


class Own(nn.Linear):
    """A layer whose result is not that of `F.linear`."""

    def forward(self, x, power=1):
        return super().forward(x).sigmoid() ** power


KINDS = {
    "linear": lambda: (nn.Linear(5, 4), torch.randn(3, 5)),
    "own": lambda: (Own(5, 4), torch.randn(3, 5)),
    "embedding": lambda: (nn.Embedding(7, 5, padding_idx=0), torch.randint(7, (3, 2))),
    "conv": lambda: (nn.Conv2d(3, 4, 3), torch.randn(2, 3, 5, 5)),
    "norm": lambda: (nn.LayerNorm(5), torch.randn(3, 5)),
    "batch norm": lambda: (nn.BatchNorm1d(5).eval(), torch.randn(3, 5)),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=KINDS)
def case(request):
    return KINDS[request.param]()


def state_of(module):
    return {name: (id(tensor), tensor.detach().clone()) for name, tensor in module.named_parameters()}


def assert_untouched(module, before):
    for name, (number, value) in before.items():
        assert id(module.get_parameter(name)) == number
        assert torch.equal(module.get_parameter(name), value)


class TestTwin:
    def test_runs_with_other_parameters(self, case):
        module, x = case
        before, plain = state_of(module), module(x)
        weight = torch.randn_like(module.weight)
        y = twin(module, weight=weight)(x)
        assert (y - plain).abs().max() > 1e-3
        assert_untouched(module, before)
        assert torch.equal(y, torch.func.functional_call(module, {"weight": weight}, (x,)))
        assert torch.equal(module(x), plain)

    def test_hooks_fire(self, case):
        module, x = case
        seen = []
        module.register_forward_pre_hook(lambda it, args: seen.append("pre"))
        module.register_forward_hook(lambda it, args, y: y * 0)
        assert torch.count_nonzero(twin(module, weight=torch.randn_like(module.weight))(x)) == 0
        assert seen == ["pre"]

    def test_gradients(self, case):
        module, x = case
        weight = torch.randn_like(module.weight).requires_grad_()
        twin(module, weight=weight)(x).square().sum().backward()
        assert weight.grad is not None
        assert module.weight.grad is None

    def test_of_what_is_not_there(self):
        module = nn.Linear(5, 4, bias=False)
        x = torch.randn(3, 5)
        assert torch.allclose(twin(module, bias=torch.ones(4))(x), module(x) + 1)
        assert module.bias is None
        assert torch.equal(twin(nn.Linear(5, 4), weight=module.weight, bias=None)(x), module(x))

    def test_what_is_bound_to_the_original(self, case):
        module, x = case
        weight = torch.randn_like(module.weight)
        wanted = twin(module, weight=weight)(x)
        plain = module(x)
        module.compile(backend="eager")
        assert torch.allclose(module(x), plain, atol=1e-6)
        assert torch.equal(twin(module, weight=weight)(x), wanted)
        module._compiled_call_impl = None
        module.forward = module.forward
        assert torch.equal(twin(module, weight=weight)(x), wanted)

    def test_shares_children_and_settings(self):
        module = nn.Sequential(nn.Linear(5, 4))
        other = twin(module)
        assert other[0] is module[0]
        assert type(other) is nn.Sequential
        assert other.training == module.training

    def test_threads(self):
        module, x = nn.Linear(8, 8), torch.randn(3, 8)
        before, plain = state_of(module), module(x)
        weights = [torch.randn(8, 8) for _ in range(6)]
        wanted = [nn.functional.linear(x, weight, module.bias) for weight in weights]
        module.register_forward_hook(lambda *_: None)
        wrong = []

        def work(weight, y):
            site = LinearSite(module)
            for _ in range(60):
                with torch.no_grad():
                    if not torch.equal(site.run(x, weight, module.bias), y) or not torch.equal(module(x), plain):
                        wrong.append(1)

        threads = [threading.Thread(target=work, args=pair) for pair in zip(weights, wanted, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert_untouched(module, before)


class TestSite:
    def test_any_module(self, case):
        module, x = case
        site = Site(module, "path")
        before = state_of(module)
        assert torch.equal(site(x), module(x))
        assert site.kind == "module"
        assert site.base is site
        assert site.owner is module
        assert site.weight is site.stored is module.weight
        assert site.bias is module._parameters.get("bias")
        assert site.device == torch.device("cpu")
        assert site.dtype is torch.float32
        y = site.run(x, 2 * module.weight, site.bias)
        assert torch.equal(y, twin(module, weight=2 * module.weight)(x))
        assert_untouched(module, before)
        assert Site.takes(module) is None
        assert repr(site) == f"Site(path: {type(module).__name__})"
        assert repr(Site(module)) == f"Site(unnamed: {type(module).__name__})"

    def test_another_module_in_its_place(self):
        site = LinearSite(nn.Linear(5, 4), "path")
        other = nn.Linear(5, 4)
        moved = site.at(other)
        assert (moved.module, moved.name, type(moved)) == (other, "path", LinearSite)
        assert site.module is not other

    def test_other_parameters_for_one_call(self):
        layer, x = nn.Conv2d(3, 4, 2), torch.randn(2, 3, 5, 5)
        site, before = Site(layer, "path"), state_of(layer)
        assert (site.weight_name, site.bias_name) == ("weight", "bias")
        tensors = site.fitted(torch.zeros(4, 12), torch.ones(4))
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {"weight": (4, 3, 2, 2), "bias": (4,)}
        other = site.with_parameters(tensors)
        assert (type(other), other.name) == (Site, "path")
        assert torch.equal(other(x), torch.ones(2, 4, 4, 4))
        assert_untouched(layer, before)

    def test_in_the_form_in_which_it_is_stored(self):
        site = Site(nn.Conv2d(3, 4, 2, dtype=torch.bfloat16))
        stored = site.to_stored(torch.ones(4, 12), None)
        assert stored["weight"].shape == (4, 3, 2, 2)
        assert stored["weight"].dtype is torch.bfloat16
        assert stored["bias"] is None
        assert set(Site(nn.Linear(5, 4, bias=False)).to_stored(torch.ones(4, 5), None)) == {"weight"}
        made = Site(nn.Linear(5, 4, bias=False, dtype=torch.float64)).to_stored(torch.ones(4, 5), torch.ones(4))
        assert made["bias"].dtype is torch.float64

    def test_inputs(self):
        site = LinearSite(nn.Linear(5, 4))
        assert (site.channels, site.groups) == (5, 1)
        scale = torch.randn(5)
        x = torch.randn(3, 5)
        found = site.run(x, site.weight * site.scale_inputs(scale), site.bias)
        assert torch.allclose(found, site(x * scale), atol=1e-6)

    def test_shape_in_which_it_is_stored(self):
        site = make_site(nn.Conv2d(3, 4, 2))
        assert site.weight.shape == (4, 12)
        assert torch.equal(site.as_stored(site.weight), site.module.weight)
        assert Site(nn.Conv2d(3, 4, 2)).as_stored(torch.ones(4, 12, dtype=torch.float64)).dtype is torch.float64


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        ({"linear"}, "linear layers"),
        ({"linear", "embedding"}, "linear layers and embeddings"),
        ({"conv1d", "conv3d", "linear", "attention"}, "linear layers, attention layers and convolutions (1d, 3d)"),
        ({"conv2d"}, "convolutions (2d)"),
        ({"parameter", "norm", "convex"}, "bare parameters, 'convex' and 'norm'"),
    ],
)
def test_kinds_in_words(kinds, words):
    assert in_words(kinds) == words


class TestNewTensors:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("word", ["empty", "zeros", "ones", "normal", "kaiming_uniform"])
    def test_dtype_and_device(self, word, dtype):
        site = LinearSite(nn.Linear(5, 4, dtype=dtype))
        tensor = getattr(site, word)(2, 5)
        assert (tensor.shape, tensor.dtype, tensor.device) == ((2, 5), dtype, torch.device("cpu"))
        assert not tensor.requires_grad
        assert getattr(LinearSite(nn.Linear(5, 4, device="meta")), word)(2, 5).is_meta
        tensor = make_on_meta(lambda: getattr(site, word)(2, 5))
        assert tensor.is_meta
        assert tensor.dtype is dtype
        assert not getattr(site, word)(2, 5).is_meta

    def test_larger_than_any_memory(self):
        site = LinearSite(nn.Linear(5, 4))
        with pytest.raises(ConfigError, match=rf"shape \({2**62}, 5\) is larger than any memory\. Check the sizes in"):
            site.empty(2**62, 5)

    def test_values(self):
        site = LinearSite(nn.Linear(5, 4))
        assert torch.equal(site.zeros(2, 3), torch.zeros(2, 3))
        assert torch.equal(site.ones(2, 3), torch.ones(2, 3))
        assert 1.9 < site.normal(100, 100, std=2.0).std() < 2.1
        assert -0.1 < site.normal(100, 100, std=2.0).mean() < 0.1
        assert 2.9 < site.uniform(100, 100, bound=3).abs().max() <= 3
        assert -0.1 < site.uniform(100, 100, bound=3).mean() < 0.1
        uniform = site.kaiming_uniform(50, 100)
        assert 0.09 < uniform.abs().max() <= 0.1
        assert 0.1 / 3**0.5 * 0.95 < uniform.std() < 0.1 / 3**0.5 * 1.05
        assert site.kaiming_uniform(3, 0).shape == (3, 0)

    def test_uniform_as_an_ordinary_layer_starts(self):
        torch.manual_seed(3)
        ordinary = nn.Linear(5, 4, bias=False).weight
        site = LinearSite(nn.Linear(5, 4))
        torch.manual_seed(3)
        assert torch.allclose(site.kaiming_uniform(4, 5), ordinary)

    def test_at_a_layer_of_integers(self):
        layer = nn.Linear(5, 4)
        layer._parameters["weight"] = nn.Parameter(torch.ones(4, 5, dtype=torch.int8), requires_grad=False)
        assert Site(layer).zeros(2).dtype is torch.float32

    def test_meta_is_known(self):
        assert make_on_meta(is_making_on_meta)
        assert not is_making_on_meta()

    def test_meta_in_one_thread_only(self):
        seen = []
        site = LinearSite(nn.Linear(5, 4))

        def make():
            thread = threading.Thread(target=lambda: seen.append(site.zeros(1).is_meta))
            thread.start()
            thread.join()
            return site.zeros(1)

        assert make_on_meta(make).is_meta
        assert seen == [False]

    def test_meta_after_an_error(self):
        with pytest.raises(ZeroDivisionError):
            make_on_meta(lambda: 1 / 0)
        assert not LinearSite(nn.Linear(5, 4)).zeros(1).is_meta


class TestBound:
    def test_other_arguments(self):
        module, x = Own(5, 4), torch.randn(3, 5)
        site = make_site(module)
        bound = Bound(site, site, (2,), {})
        assert torch.equal(bound(x), module(x, 2))
        assert torch.equal(Bound(site, site, (), {"power": 2})(x), module(x, 2))
        weight = torch.randn(4, 5)
        assert torch.equal(bound.run(x, weight, None), twin(module, weight=weight, bias=None)(x, 2))
        assert bound.weight is module.weight
        assert bound.bias is module.bias
        assert bound.base is site


class TestRegistry:
    def test_by_type(self):
        assert site_class(nn.Linear) is LinearSite
        assert site_class(Own) is LinearSite
        assert site_class(nn.Embedding) is EmbeddingSite
        assert site_class(nn.LayerNorm) is None
        assert type(make_site(nn.Linear(5, 4), "a.b")) is LinearSite
        assert make_site(nn.Linear(5, 4), "a.b").name == "a.b"
        assert make_site(nn.LayerNorm(3)) is None
        site = make_site(nn.LayerNorm(3), "norm", "weight")
        assert type(site) is ParameterSite
        assert site.parameter_name == "weight"

    def test_register(self, monkeypatch):
        class Norm(Site):
            kind = "norm"

        class MyOwn(LinearSite):
            kind = "mine"

        class More(Own):
            pass

        monkeypatch.setattr(sites, "_SITES", dict(sites._SITES))
        sites.register_site(nn.LayerNorm, Norm)
        sites.register_site(Own, MyOwn)
        assert make_site(nn.LayerNorm(3)).kind == "norm"
        assert make_site(More(5, 4)).kind == "mine"
        assert make_site(nn.Linear(5, 4)).kind == "linear"
