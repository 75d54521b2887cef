from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tunerkit.absent import Absent

CPU = torch.device("cpu")


@pytest.fixture
def fetched():
    return []


@pytest.fixture
def absent(fetched):
    whole = torch.arange(24.0).reshape(2, 3, 4)

    def fetch():
        fetched.append(whole)
        return whole

    return Absent(whole.to("meta"), CPU, fetch)


def test_its_form_is_there_and_its_numbers_are_not(absent, fetched):
    assert (absent.shape, absent.dtype, absent.device) == ((2, 3, 4), torch.float32, CPU)
    assert (absent.flatten(1).shape, absent[0].T.shape) == ((2, 12), (4, 3))
    assert repr(absent) == "Absent((2, 3, 4), dtype=torch.float32)"
    assert fetched == []


def test_is_fetched_once(absent, fetched):
    assert torch.equal(absent + 1, torch.arange(24.0).reshape(2, 3, 4) + 1)
    assert torch.equal(torch.cat([absent, absent]).flatten(), torch.arange(24.0).repeat(2))
    assert len(fetched) == 1


def test_views(absent, fetched):
    weight = absent.flatten(1)
    assert torch.equal(weight.T * 1, torch.arange(24.0).reshape(2, 12).T)
    assert len(fetched) == 1


def test_gradients_of_what_it_meets(absent):
    x = torch.ones(2, 12, requires_grad=True)
    F.linear(x, absent.flatten(1)).sum().backward()
    assert torch.equal(x.grad, torch.arange(24.0).reshape(2, 12).sum(0).expand(2, 12))
