"""How well sentences find their functions: the ranks of the right answers and what is read from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean over sentences.

    Attributes:
        mean: The mean.
        error: Its standard error.
    """

    mean: float
    error: float

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """Estimate the mean of one value per sentence, (sentences,)."""
        values = values.double()
        # For zeros and ones this is the familiar sqrt(p * (1 - p) / n).
        return cls(values.mean().item(), values.std(correction=0).item() / len(values) ** 0.5)


@dataclass(frozen=True)
class Scores:
    """What is reported of a retrieval.

    Attributes:
        n: The number of sentences, and of functions searched.
        recall_at_1: The share of the sentences whose function came first.
        recall_at_5: The share whose function was among the first five.
        mrr: The mean of 1 / rank.
    """

    n: int
    recall_at_1: Estimate
    recall_at_5: Estimate
    mrr: Estimate

    @classmethod
    def of(cls, ranks: Tensor) -> Scores:
        """Score the ranks of the right answers, counted from 1, (sentences,)."""
        return cls(len(ranks), Estimate.of(ranks <= 1), Estimate.of(ranks <= 5), Estimate.of(1 / ranks))  # noqa: PLR2004


@dataclass(frozen=True)
class Retrieval:
    """The search for every sentence's function among all functions.

    Attributes:
        sentences: Vectors of the sentences, (n, width).
        lines: Vectors of their functions, in the same order, (n, width).
        ranks: The ranks of the right functions, counted from 1, (n,), int64.
        first: The index of the function that came first for each sentence, (n,), int64.
        scores: What is reported.
    """

    sentences: Tensor
    lines: Tensor
    ranks: Tensor
    first: Tensor
    scores: Scores

    @classmethod
    def of(cls, sentences: Tensor, lines: Tensor) -> Retrieval:
        """Search for each sentence's function, the one at the same index of `lines`."""
        ranks = rank_answers(sentences, lines)
        return cls(sentences, lines, ranks, (sentences @ lines.T).argmax(1), Scores.of(ranks))


def rank_answers(sentences: Tensor, lines: Tensor) -> Tensor:
    """Rank each sentence's own function among all.

    A wrong function that scores exactly as high counts as ranked before it, so vectors that are all alike earn nothing.

    Args:
        sentences: Vectors of the sentences, (n, width).
        lines: Vectors of their functions, in the same order, (n, width).

    Returns:
        The ranks, counted from 1, (n,), int64.
    """
    scores = sentences @ lines.T
    return (scores >= scores.diagonal().unsqueeze(1)).sum(1)
