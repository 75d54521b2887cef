from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tunerkit.demo.evaluation import Estimate, Retrieval, Scores, rank_answers


def naive_rank(scores: list[list[int]], row: int) -> int:
    """Where the right answer stands when the list is sorted and every tie goes against it."""
    others = [score for column, score in enumerate(scores[row]) if column != row]
    return 1 + sum(other >= scores[row][row] for other in others)


@given(
    st.integers(1, 8).flatmap(
        lambda n: st.lists(st.lists(st.integers(-3, 3), min_size=n, max_size=n), min_size=n, max_size=n)
    )
)
def test_ranks_and_scores_are_the_naive_ones(scores):
    n = len(scores)
    # With unit vectors as lines, the scores are the sentences' own entries.
    found = Retrieval.of(torch.tensor(scores, dtype=torch.float32), torch.eye(n))
    ranks = [naive_rank(scores, row) for row in range(n)]
    assert found.ranks.tolist() == ranks
    assert found.scores.n == n
    for estimate, values in (
        (found.scores.recall_at_1, [float(rank == 1) for rank in ranks]),
        (found.scores.recall_at_5, [float(rank <= 5) for rank in ranks]),
        (found.scores.mrr, [1 / rank for rank in ranks]),
    ):
        mean = sum(values) / n
        assert estimate.mean == pytest.approx(mean, abs=1e-6)
        assert estimate.error == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values)) / n, abs=1e-6)
    for row, first in enumerate(found.first.tolist()):
        assert scores[row][first] == max(scores[row])


def test_the_error_of_a_share_is_the_binomial_one():
    estimate = Estimate.of(torch.tensor([True] * 3 + [False] * 7))
    assert estimate.mean == pytest.approx(0.3)
    assert estimate.error == pytest.approx(math.sqrt(0.3 * 0.7 / 10))


def test_vectors_that_are_all_alike_find_nothing():
    ranks = rank_answers(torch.ones(6, 4), torch.ones(6, 4))
    assert ranks.tolist() == [6] * 6
    assert Scores.of(ranks).recall_at_5.mean == 0
