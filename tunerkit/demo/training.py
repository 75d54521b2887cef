"""Contrastive training: a sentence shall be closer to its own function than to the others of its batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

BATCH_SIZE = 32
TEMPERATURE = 0.05
WARM_UP = 0.1
"""The share of the steps over which the learning rate rises; it falls to zero over the rest."""


def contrastive_loss(sentences: Tensor, lines: Tensor) -> Tensor:
    """Cross-entropy of picking the right partner in the batch, over both directions.

    Args:
        sentences: Vectors of unit length, (pairs, width).
        lines: The vectors of their functions, in the same order, (pairs, width).

    Returns:
        The mean loss in nats, a scalar.
    """
    scores = sentences @ lines.T / TEMPERATURE
    right = torch.arange(len(scores), device=scores.device)
    return (nn.functional.cross_entropy(scores, right) + nn.functional.cross_entropy(scores.T, right)) / 2


def make_batches(size: int) -> list[slice]:
    """Cut `size` pairs into batches in their order, each pair in one batch; the last batch may be smaller."""
    return [slice(start, min(start + BATCH_SIZE, size)) for start in range(0, size, BATCH_SIZE)]


def train(
    parameters: Iterable[nn.Parameter],
    compute_loss: Callable[[slice], Tensor],
    batches: Sequence[slice],
    *,
    learning_rate: float,
    on_step: Callable[[float], None] = lambda _: None,
) -> float:
    """Train for one step per batch.

    Args:
        parameters: What is trained.
        compute_loss: The loss of a batch, given which pairs are in it.
        batches: The batches in order.
        learning_rate: The highest learning rate, reached after the warm-up.
        on_step: Called after each step with its loss.

    Returns:
        The loss of the last step, before its update.
    """
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, len(batches)))
    value = float("nan")
    for batch in batches:
        optimizer.zero_grad()
        loss = compute_loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        value = loss.item()
        on_step(value)
    return value


def rate(step: int, steps: int) -> float:
    """The share of the learning rate at a step: up over the warm-up, then down in a straight line to zero."""
    warm_up = max(1, round(WARM_UP * steps))
    return (step + 1) / warm_up if step < warm_up else (steps - step) / max(1, steps - warm_up)
