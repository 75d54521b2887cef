"""Which hooks are called, and when, as an extension sees it."""

from collections import Counter

import pytest
import torch
from toys import bare, hooks_by_hand, registered, rotation, shared

import tunerkit
from tunerkit.naming import method_id
from tunerkit.plugins import get_method
from tunerkit.testing.bench import loss_of
from tunerkit.testing.models import Linears


class Counting:
    """Counts the calls of a method's hooks, and leaves the answers to others."""

    def __init__(self, name, seen):
        self.name, self.seen = name, seen

    @tunerkit.hookimpl(wrapper=True)
    def _prepare_adapter_config(self):
        self.seen[self.name, "_prepare_adapter_config"] += 1
        return (yield)

    @tunerkit.hookimpl(wrapper=True)
    def _check_target_module_exists(self):
        self.seen[self.name, "_check_target_module_exists"] += 1
        return (yield)

    @tunerkit.hookimpl(wrapper=True)
    def _create_and_replace(self):
        self.seen[self.name, "_create_and_replace"] += 1
        return (yield)


TOYS = (bare, hooks_by_hand, rotation, shared)


@pytest.fixture
def calls():
    """The calls of the hooks of all methods, counted by method and hook."""
    seen = Counter()
    with registered(*TOYS):
        for toy in TOYS:
            name = method_id(toy.Config.peft_type)
            get_method(name).manager.register(Counting(name, seen))
        yield seen


def of(toy, modules, targets):
    name = method_id(toy.Config.peft_type)
    return {
        (name, "_prepare_adapter_config"): 1,
        (name, "_check_target_module_exists"): modules,
        (name, "_create_and_replace"): targets,
    }


@pytest.mark.parametrize("toy", TOYS, ids=lambda toy: toy.__name__)
def test_only_the_hooks_of_the_method_that_was_asked_for_are_called(toy, calls):
    tunerkit.get_peft_model(Linears(), toy.Config(target_modules=["wide", "narrow"]))
    assert calls == of(toy, modules=4, targets=2)


def test_each_further_adapter_asks_its_own_method_once_for_each_module(calls):
    model = tunerkit.get_peft_model(Linears(), rotation.Config(target_modules=["wide"]))
    calls.clear()
    model.add_adapter("bare", bare.Config(target_modules=["wide", "square", "narrow"]))
    assert calls == of(bare, modules=4, targets=3)


def test_planning_makes_nothing(calls):
    tunerkit.plan(Linears(), rotation.Config(target_modules=["wide"]))
    assert calls == {key: count for key, count in of(rotation, 4, 0).items() if count}


def test_no_hook_is_called_after_attaching(calls, tmp_path):
    model = tunerkit.get_peft_model(Linears(), rotation.Config(target_modules=["wide"]), "rotation")
    model.add_adapter("shared", shared.Config(target_modules=["wide", "square"]))
    model.add_adapter("hand", hooks_by_hand.Config(target_modules=["narrow"]))
    calls.clear()
    x = torch.randn(2, 6)
    for names in ("rotation", ["shared", "rotation"], "hand"):
        model.set_adapter(names)
        loss_of(model(x)).backward()
        with model.disable_adapter():
            model(x)
        model.merge_adapter()
        model(x)
        model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    model.delete_adapter("shared")
    model.merge_and_unload()
    assert calls == {}


def test_loading_asks_the_method_of_the_checkpoint(calls, tmp_path):
    model = tunerkit.get_peft_model(Linears(), rotation.Config(target_modules=["wide"]))
    model.save_pretrained(tmp_path)
    other = tunerkit.get_peft_model(Linears(), bare.Config(target_modules=["wide"]))
    calls.clear()
    other.load_adapter(tmp_path, "loaded")
    assert calls == of(rotation, modules=4, targets=1)
