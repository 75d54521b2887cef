"""The maths of combining: each combination is what its paper says, and the factored forms equal the full ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunerkit.combine import (
    PRUNING,
    clamp_to_quantile,
    combine,
    drop_random,
    keep_largest,
    low_rank,
    low_rank_sum,
    weighted_sum,
)
from tunerkit.errors import CombinationError


def tensors(*numbers):
    return [torch.tensor(row, dtype=torch.float32) for row in numbers]


def test_linear_is_the_weighted_sum():
    one, two = tensors([1, 2, -3], [4, -5, 6])
    assert torch.equal(combine("linear", [one, two], [0.5, -2]), 0.5 * one - 2 * two)


def test_the_largest_numbers_are_kept_whatever_their_sign():
    assert keep_largest(torch.tensor([1.0, -4.0, 2.0, 3.0]), 0.5).tolist() == [0, -4, 0, 3]


def test_dropping_at_random_keeps_the_expected_value():
    torch.manual_seed(0)
    dropped = drop_random(torch.ones(20_000), 0.25)
    assert set(dropped.tolist()) == {0.0, 4.0}
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)


def test_magnitude_prune_sums_what_is_kept():
    one, two = tensors([1, 2, -3, 0], [4, -5, 6, 0])
    assert combine("magnitude_prune", [one, two], [1, 2], 0.5).tolist() == [0, 2 - 10, -3 + 12, 0]


def test_ties_averages_what_agrees_with_the_elected_sign():
    one, two, three = tensors([3, 3, -1, 0], [1, -1, -2, 0], [-2, -1, -3, 0])
    # By sums the signs are + + - +; of the first place 3 and 1 agree, of the second 3, of the third all.
    assert combine("ties", [one, two, three], [1, 1, 1], 1).tolist() == [2, 3, -2, 0]
    # By counts the second is negative, where -1 and -1 agree.
    assert combine("ties", [one, two, three], [1, 1, 1], 1, "frequency").tolist() == [2, -1, -2, 0]
    assert combine("ties", [one, two, three], [1, 4, 1], 1).tolist() == [3.5, 3, -4, 0]


@pytest.mark.parametrize("combination", PRUNING)
@given(density=st.floats(0.05, 1), weight=st.floats(-2, 2), other=st.floats(-2, 2), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_combinations_are_those_of_peft(combination, density, weight, other, seed):
    theirs = pytest.importorskip("peft.utils.merge_utils", reason="comparing with PEFT needs it: pip install peft")
    generator = torch.Generator().manual_seed(seed)
    pair = [torch.randn(4, 5, generator=generator) for _ in range(2)]
    weights = [weight, other]
    rest = ("frequency",) if combination.endswith("ties") and seed % 2 else ()
    torch.manual_seed(seed)
    found = combine(combination, pair, weights, density, *rest)
    if density < 1:
        torch.manual_seed(seed)
        expected = getattr(theirs, combination)(list(pair), torch.tensor(weights), density, *rest)
        torch.testing.assert_close(found, expected)


@given(
    out=st.integers(1, 9), width=st.integers(1, 9), ranks=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    rank=st.integers(1, 12),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_the_factored_sum_is_the_closest_of_its_rank(out, width, ranks, rank):
    generator = torch.Generator().manual_seed(out + 10 * width)
    factors = [(torch.randn(out, r, generator=generator), torch.randn(r, width, generator=generator)) for r in ranks]
    whole = sum(up @ down for up, down in factors)
    for left, right in (low_rank(whole, rank), low_rank_sum(factors, rank)):
        assert (left.shape, right.shape) == ((out, rank), (rank, width))
        torch.testing.assert_close((whole - left @ right).norm(), _rest(whole, rank), atol=1e-4, rtol=1e-4)


def _rest(matrix, rank):
    """Return the distance of a matrix to the closest one of a rank."""
    return torch.linalg.svdvals(matrix)[rank:].norm()


def test_factors_are_clamped_to_a_quantile_of_all_their_numbers():
    up, down = clamp_to_quantile((torch.tensor([[-9.0], [1.0]]), torch.tensor([[2.0, 3.0, 4.0]])), 0.75)
    assert (up.tolist(), down.tolist()) == ([[-3], [1]], [[2, 3, 3]])


def test_weights_broadcast_over_any_shape():
    pair = [torch.ones(2, 3, 4), torch.ones(2, 3, 4)]
    assert torch.equal(weighted_sum(pair, [1, 2]), torch.full((2, 3, 4), 3.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cat", 1), "combination_type='cat' is not known; possible are 'linear', 'ties', "),
        (
            ("ties", None),
            "combination_type='ties' keeps a share of each tensor's numbers, so density must be a number ",
        ),
        (("ties", 0), "above 0 and at most 1; it is 0."),
        (("dare_ties", 1.5), "above 0 and at most 1; it is 1.5."),
        (("dare_linear", True), "above 0 and at most 1; it is True."),
        (("ties", 1, "most"), "majority_sign_method='most' is not known; possible are 'total', 'frequency'."),
    ],
)
def test_what_cannot_be_combined_is_refused(arguments, message):
    combination, density, *rest = arguments
    with pytest.raises(CombinationError) as error:
        combine(combination, tensors([1], [2]), [1, 1], density, *rest)
    assert message in str(error.value)
