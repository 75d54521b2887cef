from __future__ import annotations

import copy
import io
import pickle
import sys
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from tunerkit.lean import LeanModule, Linear

ORDINARY = set(nn.Module().__dict__)
HELD = {"_parameters", "_buffers", "_modules"}


class Holder(LeanModule):
    """Holds whatever a test puts in."""


@pytest.fixture
def layer():
    return Linear(torch.randn(3, 4))


def later(module):
    """The containers that a module has not made yet."""
    return ORDINARY - set(module.__dict__)


class TestLeanModule:
    def test_has_what_is_used_and_nothing_for_hooks(self):
        kept = {name for name, value in nn.Module().__dict__.items() if not isinstance(value, (dict, set))}
        assert set(Holder().__dict__) == HELD | kept

    def test_is_half_the_size(self):
        assert (
            sum(map(sys.getsizeof, Holder().__dict__.values()))
            < sum(map(sys.getsizeof, nn.Module().__dict__.values())) / 2
        )

    @pytest.mark.parametrize("name", sorted(ORDINARY))
    def test_each_attribute_is_there_when_asked_for_and_stays(self, name):
        module = Holder()
        value = getattr(module, name)
        assert type(value) is type(nn.Module().__dict__[name])
        assert getattr(module, name) is value
        assert value == nn.Module().__dict__[name]

    def test_what_is_not_there_is_an_error_as_ever(self):
        with pytest.raises(AttributeError, match="'Holder' object has no attribute 'absent'"):
            Holder().absent  # noqa: B018 - reading it is the test

    def test_two_threads_get_the_same(self):
        module, found = Holder(), []
        start = threading.Barrier(8)

        def ask():
            start.wait()
            found.append(id(module._forward_hooks))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(found)) == 1

    def test_children_buffers_and_parameters(self):
        module = Holder()
        module.child, module.own = nn.Linear(2, 2), nn.Parameter(torch.ones(2))
        module.register_buffer("kept", torch.ones(1))
        module.register_buffer("scratch", torch.ones(1), persistent=False)
        assert set(module.state_dict()) == {"own", "kept", "child.weight", "child.bias"}
        assert not module.eval().child.training
        assert module.double().own.dtype == torch.float64


class TestLinear:
    def test_holds_its_tensors_and_no_more(self, layer):
        kept = {name for name, value in nn.Module().__dict__.items() if not isinstance(value, (dict, set))}
        assert set(layer.__dict__) == kept | {"_parameters", "_modules", "in_features", "out_features"}

    @pytest.mark.parametrize("name", sorted(ORDINARY))
    def test_each_attribute_is_there_when_asked_for_and_stays(self, layer, name):
        value = getattr(layer, name)
        assert type(value) is type(nn.Module().__dict__[name])
        assert getattr(layer, name) is value

    @pytest.mark.parametrize("persistent", [True, False])
    def test_buffers(self, layer, persistent):
        layer.register_buffer("scale", torch.ones(1), persistent)
        layer.offset = nn.Buffer(torch.zeros(1), persistent=persistent)
        layer.scale = torch.ones(2)
        assert [name for name, _ in layer.named_buffers()] == ["scale", "offset"]
        assert set(layer.state_dict()) == {"weight", "scale", "offset"} if persistent else {"weight"}
        assert layer.double().scale.dtype == torch.float64

    def test_what_is_not_there_is_an_error_as_ever(self, layer):
        with pytest.raises(AttributeError, match="'Linear' object has no attribute 'absent'"):
            layer.absent  # noqa: B018 - reading it is the test

    def test_a_call_and_a_walk_give_what_an_ordinary_one_gives(self, layer):
        ordinary = nn.Linear(4, 3, bias=False)
        ordinary.load_state_dict(layer.state_dict())
        x = torch.randn(2, 4)
        assert torch.equal(layer(x), ordinary(x))
        assert [name for name, _ in layer.named_modules()] == [""]
        assert isinstance(layer, nn.Linear)

    @pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward_pre", "full_backward"])
    def test_hooks_are_called(self, layer, kind):
        calls = []
        handle = getattr(layer, f"register_{kind}_hook")(lambda *_: calls.append(kind))
        layer(torch.randn(2, 4, requires_grad=True)).sum().backward()
        assert calls == [kind]
        handle.remove()
        layer(torch.randn(2, 4))
        assert calls == [kind]

    def test_hooks_of_one_are_not_those_of_another(self, layer):
        layer.register_forward_hook(lambda *_: None)
        assert not Linear(torch.randn(3, 4))._forward_hooks

    def test_state_dict_hooks(self, layer):
        layer.register_state_dict_post_hook(lambda _, state, *__: state.update(more=torch.ones(1)))
        assert set(layer.state_dict()) == {"weight", "more"}
        layer.register_load_state_dict_pre_hook(lambda _, state, *__: state.pop("more"))
        layer.load_state_dict({"weight": torch.ones(3, 4), "more": torch.ones(1)})
        assert torch.equal(layer.weight, torch.ones(3, 4))

    def test_a_copy_is_lean_too(self, layer):
        copied = copy.deepcopy(layer)
        assert torch.equal(copied.weight, layer.weight)
        assert copied.weight is not layer.weight
        assert later(copied) == later(layer) != set()

    def test_pickle(self, layer):
        loaded = pickle.loads(pickle.dumps(layer))  # noqa: S301 - of this very test
        assert torch.equal(loaded(torch.ones(1, 4)), layer(torch.ones(1, 4)))

    def test_saved_whole(self, layer):
        stream = io.BytesIO()
        torch.save(layer, stream)
        stream.seek(0)
        assert torch.equal(torch.load(stream, weights_only=False).weight, layer.weight)

    def test_parametrized(self, layer):
        before = layer.weight.detach().clone()
        parametrize.register_parametrization(layer, "weight", nn.Tanh())
        assert torch.equal(layer.weight, before.tanh())

    def test_pruned(self, layer):
        prune.l1_unstructured(layer, "weight", amount=6)
        assert (layer.weight == 0).sum() == 6

    @pytest.mark.parametrize("trains", [False, True])
    def test_flags(self, trains):
        layer = Linear(torch.randn(3, 4), torch.zeros(3), trains=trains)
        assert [parameter.requires_grad for parameter in layer.parameters()] == [trains, trains]
