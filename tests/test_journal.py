# ruff: noqa: PT012 - what a block did before it raised is what is undone
from __future__ import annotations

import gc
import threading
from collections import OrderedDict

import pytest
import torch
from torch import nn

from tunerkit import get_peft_model
from tunerkit.journal import Journal
from tunerkit.route import CallHook
from tunerkit.testing.bench import Snapshot
from tunerkit_lora import LoraConfig


@pytest.fixture
def module():
    module = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    module.register_buffer("seen", torch.ones(2))
    module.notes, module.names, module.count = ["a"], {"x"}, 1
    module.register_forward_hook(lambda *_: None)
    return module


def spoil(module):
    """Change everything about a module that is its own."""
    module._modules.clear()
    module.add_module("other", nn.Linear(1, 1))
    module.register_buffer("more", torch.zeros(1))
    module.seen = torch.zeros(3)
    module.register_forward_hook(lambda *_: None)
    module.register_forward_pre_hook(lambda *_: None)
    module.notes.append("b")
    module.names.clear()
    module.count = 2
    module.new = 3
    module.eval()
    module._backward_hooks = OrderedDict(a=1)


class TestUndo:
    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
    def test_a_module_is_put_back(self, module, error):
        before, hooks = Snapshot.of(module), dict(module._forward_hooks)
        containers = {name: value for name, value in vars(module).items() if isinstance(value, (dict, list, set))}
        with pytest.raises(error), Journal() as journal:
            journal.note_module(module)
            spoil(module)
            raise error
        assert before.differences(module) == []
        assert module.notes == ["a"]
        assert module.names == {"x"}
        assert dict(module._forward_hooks) == hooks
        assert list(module._modules) == ["0", "1"]
        for name, value in containers.items():
            assert vars(module)[name] is value

    def test_nothing_is_undone_if_nothing_is_raised(self, module):
        with Journal() as journal:
            journal.note_module(module)
            spoil(module)
        assert list(module._modules) == ["other"]
        assert module.count == 2

    def test_order_of_tensors_is_kept(self):
        linear = nn.Linear(2, 2)
        with pytest.raises(ValueError, match="stop"), Journal() as journal:
            journal.note_module(linear)
            del linear.weight
            linear.weight = nn.Parameter(torch.zeros(1))
            raise ValueError("stop")
        assert list(linear._parameters) == ["weight", "bias"]

    def test_flags_values_and_modes(self, module):
        weight, bias = module[0].weight, module[0].bias
        bits = weight.detach().clone()
        bias.requires_grad_(requires_grad=False)
        module[1].eval()
        with pytest.raises(ValueError, match="stop"), Journal() as journal:
            journal.note_flags(iter([weight, bias]))
            journal.note_values(weight)
            journal.note_training().extend([module, module[0]])
            weight.requires_grad_(requires_grad=False)
            bias.requires_grad_()
            with torch.no_grad():
                weight.zero_()
            module.eval()
            raise ValueError("stop")
        assert (weight.requires_grad, bias.requires_grad) == (True, False)
        assert torch.equal(weight, bits)
        assert [part.training for part in module.modules()] == [True, True, False]

    def test_one_item_of_many(self):
        """The others are neither copied nor put back, whoever takes one out meanwhile."""
        module = nn.Module()
        module.held = {str(number): number for number in range(3)}
        with pytest.raises(KeyError), Journal() as journal:
            journal.note_module(module, apart=module.held)
            journal.note_item(module.held, "new")
            journal.note_item(module.held, "1")
            module.other = 1
            module.held["new"] = 3
            del module.held["0"], module.held["1"]
            raise KeyError
        assert module.held == {"1": 1, "2": 2}
        assert not hasattr(module, "other")

    def test_flags_of_the_modules_own_tensors(self):
        linear = nn.Linear(2, 2, bias=False)
        with pytest.raises(ValueError, match="stop"), Journal() as journal:
            journal.note_module(linear)
            linear.requires_grad_(requires_grad=False)
            raise ValueError("stop")
        assert linear.weight.requires_grad

    def test_last_change_first(self):
        done = []
        journal = Journal()
        journal.note(done.append, 1)
        journal.note(done.append, 2)
        journal.undo()
        journal.undo()
        assert done == [2, 1]

    def test_views_of_adapters_are_left_alone(self):
        model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
        entry = model.get_base_model()[0].lora_A
        before = Snapshot.of(model)
        with pytest.raises(ValueError, match="stop"), Journal() as journal:
            journal.note_module(entry)
            entry._non_persistent_buffers_set.add("x")
            raise ValueError("stop")
        assert before.differences(model) == []
        assert entry["default"].weight.shape == (8, 2)


class TestNesting:
    def test_outer_undoes_what_the_inner_one_saw_through(self):
        done = []
        with pytest.raises(ValueError, match="stop"), Journal() as outer:
            outer.note(done.append, "outer")
            with Journal() as inner:
                inner.note(done.append, "inner")
            assert done == []
            raise ValueError("stop")
        assert done == ["inner", "outer"]

    def test_inner_undoes_its_own_alone(self):
        done = []
        with Journal() as outer:
            outer.note(done.append, "outer")
            with pytest.raises(ValueError, match="stop"), Journal() as inner:
                inner.note(done.append, "inner")
                raise ValueError("stop")
            assert done == ["inner"]
        assert done == ["inner"]

    def test_one_after_the_other_are_apart(self):
        done = []
        with Journal() as first:
            first.note(done.append, "first")
        with pytest.raises(ValueError, match="stop"), Journal() as second:
            second.note(done.append, "second")
            raise ValueError("stop")
        assert done == ["second"]

    def test_threads_are_apart(self):
        done, failed = [], []

        def elsewhere():
            try:
                with Journal() as journal:
                    journal.note(done.append, "elsewhere")
                    raise ValueError("stop")  # noqa: TRY301 - what is tested
            except ValueError as error:
                failed.append(str(error))

        with Journal() as journal:
            journal.note(done.append, "here")
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
        assert (done, failed) == (["elsewhere"], ["stop"])

    def test_block_left_without_its_end_is_forgotten(self):
        # As by an interrupt at the very moment when the block ends.
        done = []
        left = Journal()
        left.__enter__()
        left.note(done.append, "left")
        del left
        gc.collect()
        with pytest.raises(ValueError, match="stop"), Journal() as journal:
            journal.note(done.append, "next")
            raise ValueError("stop")
        assert done == ["next"]
        assert journal._start == 0


def test_hooks_of_calls_come_and_go_by_themselves():
    """They are other threads', which may begin and end calls while something is undone here."""
    layer = nn.Linear(2, 2)
    over = layer.register_forward_hook(CallHook(None, print))
    before = layer.register_forward_hook(print)
    with pytest.raises(RuntimeError, match="on purpose"), Journal() as journal:
        journal.note_module(layer)
        over.remove()
        begun = layer.register_forward_hook(CallHook(None, print))
        layer.register_forward_hook(repr)
        raise RuntimeError("on purpose")
    assert list(layer._forward_hooks) == [before.id, begun.id]


def test_what_stays_is_there_throughout():
    """Other threads may be reading while something is undone."""
    gone = []

    class Watched(dict):
        def clear(self):
            gone.append("all")
            super().clear()

        def __delitem__(self, key):
            gone.append(key)
            super().__delitem__(key)

    layer = nn.Linear(2, 2)
    layer.__dict__["_parameters"] = Watched(layer._parameters)
    with pytest.raises(RuntimeError, match="on purpose"), Journal() as journal:
        journal.note_module(layer)
        layer.register_parameter("added", None)
        layer._parameters["bias"] = None
        raise RuntimeError("on purpose")
    assert gone == ["added"]
    assert layer.bias is not None
