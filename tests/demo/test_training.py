from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tunerkit.demo.baseline import LinearMap, train_linear_map
from tunerkit.demo.training import BATCH_SIZE, TEMPERATURE, contrastive_loss, make_batches, rate, train


def unit(*shape: int, seed: int) -> torch.Tensor:
    return nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


class TestContrastiveLoss:
    def test_is_the_formula(self):
        sentences, lines = unit(3, 4, seed=0), unit(3, 4, seed=1)
        scores = (sentences @ lines.T / TEMPERATURE).tolist()
        terms = []
        for i in range(3):
            terms.append(math.log(sum(math.exp(scores[i][j]) for j in range(3))) - scores[i][i])
            terms.append(math.log(sum(math.exp(scores[j][i]) for j in range(3))) - scores[i][i])
        assert contrastive_loss(sentences, lines).item() == pytest.approx(sum(terms) / 6, rel=1e-5)

    def test_is_lowest_where_the_partners_are_alike(self):
        sentences = unit(5, 8, seed=0)
        assert contrastive_loss(sentences, sentences) < contrastive_loss(sentences, sentences.roll(1, 0))


@given(st.integers(1, 300))
def test_each_pair_is_in_one_batch(size):
    batches = make_batches(size)
    assert [index for batch in batches for index in range(size)[batch]] == list(range(size))
    assert all(1 <= batch.stop - batch.start <= BATCH_SIZE for batch in batches)


@given(st.integers(1, 300))
def test_the_rate_rises_to_one_and_falls(steps):
    rates = [rate(step, steps) for step in range(steps)]
    top = rates.index(max(rates))
    assert rates[top] == 1
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates) > 0


class TestTrain:
    def test_the_loss_falls_and_each_step_is_told(self):
        torch.manual_seed(0)
        model = nn.Linear(8, 8)
        sentences = unit(BATCH_SIZE, 8, seed=0)
        lines = nn.functional.normalize(sentences @ torch.randn(8, 8), dim=-1)
        losses = []
        last = train(
            model.parameters(),
            lambda batch: contrastive_loss(nn.functional.normalize(model(sentences[batch]), dim=-1), lines[batch]),
            make_batches(BATCH_SIZE) * 30,
            learning_rate=0.05,
            on_step=losses.append,
        )
        assert len(losses) == 30
        assert losses[-1] < losses[0] / 2
        assert last == losses[-1]

    def test_only_what_is_given_is_trained(self):
        torch.manual_seed(0)
        trained, left = nn.Linear(4, 4), nn.Linear(4, 4)
        before = left.weight.clone(), trained.weight.clone()
        train(
            trained.parameters(),
            lambda _: trained(left(torch.ones(2, 4))).square().sum(),
            make_batches(1),
            learning_rate=0.1,
        )
        assert torch.equal(left.weight, before[0])
        assert not torch.equal(trained.weight, before[1])


class TestLinearMap:
    def test_starts_as_the_identity(self):
        vectors = unit(5, 8, seed=0)
        torch.testing.assert_close(LinearMap(8)(vectors), vectors)

    def test_learns(self):
        sentences = unit(4 * BATCH_SIZE, 16, seed=0)
        lines = nn.functional.normalize(sentences + 0.5 * unit(4 * BATCH_SIZE, 16, seed=1), dim=-1)
        losses = []
        linear_map = train_linear_map(sentences, lines, make_batches(4 * BATCH_SIZE) * 10, on_step=losses.append)
        assert len(losses) == 40
        with torch.no_grad():
            after = contrastive_loss(linear_map(sentences), linear_map(lines))
        assert after < contrastive_loss(sentences, lines)
