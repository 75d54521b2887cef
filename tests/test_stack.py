from __future__ import annotations

import pytest
import torch
from torch import nn

from tunerkit.stack import StackSum, add_to_stack


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def parts(request):
    generator = torch.Generator().manual_seed(0)
    stack, left, right = (torch.randn(4, *shape, generator=generator) for shape in ((5, 6), (5, 2), (2, 6)))
    return stack.to(request.param).requires_grad_(), left.requires_grad_(), right.requires_grad_()


def plain(stack, left, right):
    return (stack + 0.5 * (left @ right)).to(stack.dtype)


def close(found, wanted, dtype):
    tolerance = 1e-5 if dtype is torch.float32 else 0.1
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


READS = {
    "number": lambda w: w[1],
    "negative": lambda w: w[-1] + w[0],
    "tensor of a number": lambda w: w[torch.tensor(2)],
    "numbers": lambda w: w[torch.tensor([1, 1, 0])],
    "tensor and number": lambda w: w[torch.tensor(1), 2],
    "rows of one": lambda w: w[1, :, 2],
}
WHOLE = {
    "as many as there are": lambda w: w[torch.arange(4).repeat(2)],
    "numbers and a number": lambda w: w[torch.tensor([1, 2]), 2],
    "slice": lambda w: w[1:3],
    "mask": lambda w: w[torch.tensor([True, False, True, False])],
    "truth": lambda w: w[True],
    "list": lambda w: w[[0, 2]],
    "new axis": lambda w: w[None, 1],
    "last axis": lambda w: w[..., 2],
    "bmm": lambda w: torch.bmm(torch.ones(4, 3, 5, dtype=w.dtype), w),
    "einsum": lambda w: torch.einsum("eio,i->eo", w, torch.ones(5, dtype=w.dtype)),
    "view": lambda w: w.view(20, 6) * 1,
    "turned": lambda w: w.mT.contiguous(),
    "iteration": lambda w: torch.stack([*w]),
    "with itself": lambda w: w + w[2],
    "dtype": lambda w: w.to(torch.float64),
    "by name": lambda w: torch.sum(input=w, dim=0),
    "function of its own": lambda w: 2 * Square.apply(w),
}


class Square(torch.autograd.Function):
    """Not seen by `__torch_function__`."""

    @staticmethod
    def forward(ctx, weight):
        ctx.save_for_backward(weight)
        return weight * weight

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient * ctx.saved_tensors[0]


@pytest.mark.parametrize("use", [*READS, *WHOLE])
def test_values_and_gradients(parts, use):
    made, wanted = add_to_stack(*parts, 0.5), plain(*parts)
    assert type(made) is StackSum
    function = {**READS, **WHOLE}[use]
    found, expected = function(made), function(wanted)
    assert type(found) is torch.Tensor
    dtype = parts[0].dtype
    close(found, expected, dtype)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(expected.dtype)
    for gradient, right in zip(
        torch.autograd.grad(found, parts, direction), torch.autograd.grad(expected, parts, direction), strict=True
    ):
        assert gradient.dtype == right.dtype
        close(gradient, right, dtype)
    assert (made._whole is None) == (use in READS)


def test_the_whole_is_computed_once(parts):
    made = add_to_stack(*parts, 0.5)
    whole = made.whole()
    assert made.whole() is whole
    assert not whole.requires_grad


def test_what_it_says_of_itself(parts):
    made = add_to_stack(*parts, 0.5)
    stack = parts[0]
    assert (made.shape, made.dtype, made.device, len(made)) == (stack.shape, stack.dtype, stack.device, 4)
    assert made.requires_grad
    assert not made.is_leaf
    assert repr(made) == f"StackSum((4, 5, 6), dtype={stack.dtype})"
    assert made._whole is None
    with torch.no_grad():
        assert not add_to_stack(*parts, 0.5).requires_grad


def test_only_what_trains_gets_a_gradient(parts):
    stack, left, right = parts[0].detach(), parts[1], parts[2].detach()
    (gradient,) = torch.autograd.grad((add_to_stack(stack, left, right, 0.5) * 1).sum(), left)
    (wanted,) = torch.autograd.grad((plain(stack, left, right) * 1).sum(), left)
    close(gradient, wanted, stack.dtype)


def test_on_another(parts):
    stack, left, right = parts
    made = add_to_stack(add_to_stack(*parts, 0.5), left * 2, right, 1.0)
    assert type(made) is StackSum
    wanted = (plain(*parts) + (2 * left @ right)).to(stack.dtype)
    close(made[1], wanted[1], stack.dtype)
    assert made.stack._whole is None
    close(made * 1, wanted, stack.dtype)


@pytest.mark.parametrize("index", [4, -5])
def test_out_of_range(parts, index):
    with pytest.raises(IndexError, match="out of bounds"):
        add_to_stack(*parts, 0.5)[index]


def test_under_autocast(parts):
    stack = parts[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = add_to_stack(*parts, 0.5)
        assert made[0].dtype is stack.dtype
        assert (made.whole()).dtype is stack.dtype


class TestPlainSum:
    """Where a tensor of its own kind could be in the way."""

    def test_of_other_tensors(self, parts):
        class Own(torch.Tensor):
            pass

        stack = parts[0].detach().as_subclass(Own)
        made = add_to_stack(stack, *parts[1:], 0.5)
        assert not isinstance(made, StackSum)

    def test_of_a_parameter_it_is_not(self, parts):
        assert type(add_to_stack(nn.Parameter(parts[0].detach()), *parts[1:], 0.5)) is StackSum

    def test_within_vmap(self, parts):
        stack, left, right = parts
        found = torch.vmap(lambda one: add_to_stack(stack, one, right, 0.5)[1])(torch.stack([left, 2 * left]))
        close(found[1], plain(stack, 2 * left, right)[1], stack.dtype)

    def test_compiled(self, parts):
        torch._dynamo.reset()
        compiled = torch.compile(lambda *args: add_to_stack(*args, 0.5)[1], backend="eager", fullgraph=True)
        close(compiled(*parts), plain(*parts)[1], parts[0].dtype)
