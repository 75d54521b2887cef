from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tunerkit.adapter import Adapter, AdditiveAdapter, Part, add_low_rank, linear
from tunerkit.sites import LinearSite


class Plus(AdditiveAdapter):
    def __init__(self, site, config=None):
        super().__init__(site, config)
        self.toy_plus = nn.Parameter(site.normal(site.out_features * site.in_features))

    def delta(self, base):
        return self.toy_plus


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def site():
    return LinearSite(nn.Linear(5, 4), "fc")


class WithoutBias(Adapter):
    def merged(self, below):
        return below.weight, None


class TestEffect:
    @pytest.mark.parametrize("number", [0.0, 1e-9, 1e-3, float("nan"), float("inf")])
    def test_what_is_added(self, site, number):
        adapter = Plus(site)
        nn.init.constant_(adapter.toy_plus, number)
        assert adapter.has_effect(site) == (number not in (0.0, 1e-9))

    @pytest.mark.parametrize("number", [0.0, 1.0])
    def test_a_bias_that_is_taken_away(self, site, number):
        nn.init.constant_(site.module.bias, number)
        assert WithoutBias(site, None).has_effect(site) == bool(number)


class TestAdapter:
    def test_defaults(self, site):
        adapter = Adapter(site, None)
        assert adapter.entries == ()
        assert adapter.kinds == {"linear"}
        assert adapter.unfoldable is None
        assert adapter.part is None
        assert not adapter.commutes
        assert adapter.together([adapter]) is None
        tensors = {"a": torch.ones(1)}
        assert adapter.to_checkpoint(tensors) == adapter.from_checkpoint(tensors) == tensors

    def test_what_an_author_must_define(self, site):
        with pytest.raises(
            NotImplementedError, match=r"Adapter must define merged\(below\), or forward\(x, below\) and unfo"
        ):
            Adapter(site, None).merged(site)
        with pytest.raises(NotImplementedError, match=r"AdditiveAdapter must define delta\(base\)"):
            AdditiveAdapter(site, None).merged(site)

    def test_forward_runs_the_layer_with_what_is_merged(self, site):
        class Nothing(Adapter):
            def merged(self, below):
                return 0 * below.weight, torch.ones(4)

        assert torch.equal(Nothing(site, None)(torch.randn(3, 5), site), torch.ones(3, 4))

    def test_additive(self, site):
        adapter = Plus(site)
        assert adapter.commutes
        weight, bias = adapter.merged(site)
        assert torch.equal(weight, site.weight + adapter.toy_plus.view(4, 5))
        assert bias is site.bias

    @pytest.mark.parametrize("bias", [False, True])
    def test_additive_to_the_bias(self, bias):
        class More(Plus):
            def delta_bias(self, base):
                return torch.ones(base.out_features)

        site = LinearSite(nn.Linear(5, 4, bias=bias))
        expected = site.bias + 1 if bias else torch.ones(4)
        assert torch.equal(More(site).merged(site)[1], expected)

    def test_part(self, site):
        part = Part([site], None)
        assert part.entries == part.exposes == ()
        assert part.around(lambda *args, **kwargs: (args, kwargs), 1, two=2) == ((1,), {"two": 2})
        adapter = Plus(site)
        adapter.join(part)
        assert adapter.part is part
        assert list(adapter.named_parameters()) == [("toy_plus", adapter.toy_plus)]
        assert list(adapter.children()) == []


class TestLinear:
    def test_is_an_ordinary_one(self):
        weight = torch.randn(4, 5)
        made, ordinary = linear(weight), nn.Linear(5, 4, bias=False)
        ordinary.load_state_dict(made.state_dict(), strict=True)
        assert (made.in_features, made.out_features, made.bias) == (5, 4, None)
        assert made.weight.data_ptr() == weight.data_ptr()
        assert set(made.__dict__) == set(ordinary.__dict__)
        assert repr(made) == repr(ordinary)
        x = torch.randn(3, 5)
        assert torch.equal(made(x), ordinary(x))

    @pytest.mark.parametrize("trains", [False, True])
    def test_whether_it_trains(self, trains):
        made = linear(torch.randn(4, 5), torch.randn(4), trains=trains)
        assert made.weight.requires_grad is made.bias.requires_grad is trains

    def test_with_a_bias(self):
        weight, bias = torch.randn(4, 5), torch.randn(4)
        made, ordinary = linear(weight, bias), nn.Linear(5, 4)
        ordinary.load_state_dict(made.state_dict(), strict=True)
        x = torch.randn(3, 5)
        assert torch.equal(made(x), ordinary(x))
        assert made.bias.data_ptr() == bias.data_ptr()

    def test_it_draws_no_random_numbers(self):
        state = torch.get_rng_state()
        linear(torch.ones(4, 5))
        assert torch.equal(torch.get_rng_state(), state)


class TestAddLowRank:
    @settings(deadline=None, max_examples=60)
    @given(
        st.lists(st.integers(0, 3), max_size=3),
        st.integers(1, 4),
        st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
        st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
        st.floats(-2, 2),
    )
    def test_by_its_definition(self, batch, rank, dtype, other, scaling):
        x, y = torch.randn(*batch, 5, dtype=dtype), torch.randn(*batch, 4, dtype=dtype)
        down, up = linear(torch.randn(rank, 5, dtype=other)), linear(torch.randn(4, rank, dtype=other))
        before = y.clone()
        found = add_low_rank(y, x, down, up, scaling)
        wanted = y.double() + scaling * (x.double() @ down.weight.double().T) @ up.weight.double().T
        assert found.dtype is dtype
        assert found.shape == y.shape
        low = torch.bfloat16 in {dtype, other}
        assert torch.allclose(found.double(), wanted, atol=0.5 if low else 1e-4, rtol=0.1 if low else 1e-4)
        assert torch.equal(y, before)

    def test_gradients(self):
        tensors = [
            torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4), (3, 5), (2, 5), (4, 2))
        ]

        def run(y, x, a, b):
            down, up = linear(a), linear(b)
            down._parameters["weight"], up._parameters["weight"] = a, b
            return add_low_rank(y, x, down, up, 0.7)

        assert torch.autograd.gradcheck(run, tensors)

    def test_an_output_of_another_precision(self):
        x, y = torch.randn(3, 5, dtype=torch.bfloat16), torch.randn(3, 4)
        found = add_low_rank(y, x, linear(torch.randn(2, 5)), linear(torch.randn(4, 2)), 1.0)
        assert found.dtype is torch.float32

    @pytest.mark.parametrize("which", [0, 1])
    def test_a_subclass_is_called(self, which):
        class Doubling(nn.Linear):
            def forward(self, x):
                return 2 * F.linear(x, self.weight)

        factors = [linear(torch.randn(2, 5)), linear(torch.randn(4, 2))]
        x, y = torch.randn(3, 5), torch.zeros(3, 4)
        plain = add_low_rank(y, x, *factors, 1.0)
        doubling = Doubling(1, 1, bias=False)
        doubling.weight = factors[which].weight
        factors[which] = doubling
        assert torch.allclose(add_low_rank(y, x, *factors, 1.0), 2 * plain, atol=1e-6)

    @pytest.mark.parametrize("which", [0, 1])
    def test_a_factor_with_a_hook_is_called(self, which):
        factors = [linear(torch.randn(2, 5)), linear(torch.randn(4, 2))]
        x, y = torch.randn(3, 5), torch.zeros(3, 4)
        plain = add_low_rank(y, x, *factors, 1.0)
        factors[which].register_forward_hook(lambda _module, _args, output: 2 * output)
        assert torch.allclose(add_low_rank(y, x, *factors, 1.0), 2 * plain, atol=1e-6)

    def test_a_factor_that_stores_integers_gets_the_input_as_it_is(self):
        class Stored(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.ones(2, 5, dtype=torch.int8), requires_grad=False)

            def forward(self, x):
                return x @ self.weight.to(x.dtype).T

        x, up = torch.randn(3, 5), linear(torch.randn(4, 2))
        wanted = F.linear(F.linear(x, torch.ones(2, 5)), up.weight)
        assert torch.allclose(add_low_rank(torch.zeros(3, 4), x, Stored(), up, 1.0), wanted, atol=1e-5)
