from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tunerkit.adapter import linear
from tunerkit.modules import state_of


class Nested(nn.Module):
    """Holds a parameter, buffers that are saved and not, an empty place, and modules below."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(2))
        self.register_parameter("nothing", None)
        self.register_buffer("kept", torch.randn(1))
        self.register_buffer("scratch", torch.randn(1), persistent=False)
        self.register_buffer("absent", None)
        self.register_module("empty", None)
        self.below = nn.ModuleList([nn.Linear(2, 3), linear(torch.randn(3, 2)), nn.BatchNorm1d(2)])
        self.again = self.below[0]


class Telling(nn.Module):
    """Has more to tell than tensors."""

    def get_extra_state(self):
        return torch.ones(1)

    def set_extra_state(self, state):
        """Take nothing."""


class Renaming(nn.Linear):
    """Saves its weight under another name."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}other"] = self.weight


def is_what_torch_returns(module):
    found, expected = state_of(module), module.state_dict(keep_vars=True)
    assert list(found) == list(expected)
    return all(found[key] is expected[key] for key in expected)


class TestStateOf:
    def test_is_what_torch_returns(self):
        assert is_what_torch_returns(Nested())

    @pytest.mark.parametrize("kind", [Telling, Renaming])
    def test_a_module_with_a_way_of_its_own(self, kind):
        module = Nested()
        module.more = kind(2, 2) if kind is Renaming else kind()
        found, expected = state_of(module), module.state_dict(keep_vars=True)
        assert list(found) == list(expected)
        assert ("more._extra_state" in found) == (kind is Telling)
        assert ("more.other" in found) == (kind is Renaming)

    @pytest.mark.parametrize("below", [False, True])
    @pytest.mark.parametrize("before", [False, True])
    def test_hooks_are_called(self, below, before):
        module, calls = Nested(), []
        target = module.below[1] if below else module
        if before:
            target.register_state_dict_pre_hook(lambda *_: calls.append(1))
        else:
            target.register_state_dict_post_hook(lambda _, state, *__: state.update(more=torch.ones(1)))
        found = state_of(module)
        assert calls == ([1] if before else [])
        assert ("more" in found) != before

    @pytest.mark.parametrize("word", ["state_dict", "_save_to_state_dict"])
    def test_a_way_set_on_one_module(self, word):
        module = Nested()
        ordinary = getattr(module.below[0], word)
        calls = []
        setattr(module.below[0], word, lambda *args, **kwargs: calls.append(1) or ordinary(*args, **kwargs))
        assert is_what_torch_returns(module)
        assert calls

    def test_makes_no_containers(self):
        module = linear(torch.randn(3, 2))
        before = set(module.__dict__)
        state_of(module)
        assert set(module.__dict__) == before

    def test_of_a_copy(self):
        assert is_what_torch_returns(copy.deepcopy(Nested()))
