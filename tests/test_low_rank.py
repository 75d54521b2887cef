from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tunerkit.adapter import linear
from tunerkit.low_rank import add_low_rank, add_low_rank_rows, plain_weights
from tunerkit.rows import Groups


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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


class TestPlainWeights:
    def test_are_the_parameters(self):
        factors = [linear(torch.randn(2, 5)), linear(torch.randn(4, 2))]
        weights = plain_weights(factors)
        assert len(weights) == 2
        assert all(weight is factor.weight for weight, factor in zip(weights, factors, strict=True))

    def test_none_where_one_must_be_called(self):
        hooked = linear(torch.randn(4, 2))
        hooked.register_forward_hook(lambda *_: None)
        biased, empty, meant = linear(torch.randn(4, 2), torch.randn(4)), linear(torch.randn(4, 2)), nn.Identity()
        empty._parameters["weight"] = None
        for factor in (hooked, biased, empty, meant):
            assert plain_weights([linear(torch.randn(4, 2)), factor]) is None


@pytest.mark.parametrize("scalings", [[2.0, 2.0, 2.0], [2.0, 0.5, 1.0], [torch.tensor(2.0), 0.5, torch.tensor(1.0)]])
@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 3, 2)])
@pytest.mark.parametrize(
    "names",
    [list("abcabc"), list("aabbcc"), list("abc"), list("cbbab"), [*"aaaaaaa", "b", "c"]],
    ids=["in turn", "in order", "one each", "filled up", "too uneven to be filled up"],
)
@pytest.mark.parametrize("middle", [(), (2,), (2, 3)])
def test_rows_with_factors_of_their_own(names, ranks, scalings, middle):
    groups = Groups.of(names)
    downs = [torch.randn(rank, 5, requires_grad=True) for rank in ranks]
    ups = [torch.randn(4, rank, requires_grad=True) for rank in ranks]
    x, y = (torch.randn(len(names), *middle, size, requires_grad=True) for size in (5, 4))
    tensors = [x, y, *downs, *ups]
    which = ["abc".index(name) for name in names]
    expected = torch.stack(
        [
            add_low_rank(y[row], x[row], *map(linear_of, (downs[one], ups[one])), scalings[one])
            for row, one in enumerate(which)
        ]
    )
    found = add_low_rank_rows(y, x, downs, ups, scalings, groups)
    assert torch.allclose(found, expected, atol=1e-5)
    weights = torch.randn(found.shape)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), tensors),
        torch.autograd.grad((expected * weights).sum(), tensors),
        strict=True,
    ):
        assert torch.allclose(one, other, atol=1e-4)


def linear_of(weight):
    """Return a factor that holds this very tensor."""
    factor = linear(weight.detach())
    factor._parameters["weight"] = weight
    return factor
