"""Whatever goes wrong at whatever moment of a call, the model is what it was, object for object and bit for bit."""

from __future__ import annotations

import contextlib
import os
import sys
import types
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import tunerkit
from tunerkit import BaseTunerLayer, Method, PeftConfig, PeftModel, get_peft_model, hookimpl, plugins, register
from tunerkit.adapter import Adapter, Part
from tunerkit.layer import tuner_layers
from tunerkit.testing.bench import Snapshot, move
from tunerkit.tuner import find_tuner
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoraConfig

HOME = str(Path(tunerkit.__file__).parent)
ERRORS = (RuntimeError, KeyboardInterrupt)
STRIDE = 1 if os.environ.get("TUNERKIT_FAULTS") == "all" else 3
"""Of the moments of a call every third is tried; with TUNERKIT_FAULTS=all each of them, which takes minutes."""


# What a model is


def snapshot(model):
    """Return everything a model is made of, in a form that says what differs."""
    return Snapshot.of(model), outside_the_tree(model)


def outside_the_tree(model):
    """Return what `named_modules` does not reach, or holds in dicts: adapters, parts, hooks, configs, modes."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in module.__dict__.items():
            if "hooks" in name:
                found[path, name] = list(value.items()) if isinstance(value, dict) else value
    for path, layer in tuner_layers(model):
        for name, adapter in getattr(layer, "adapters", {}).items():
            state = {key: dict(value) if isinstance(value, dict) else value for key, value in adapter.__dict__.items()}
            found[path, "adapter", name] = (id(adapter), state)
    tuner = find_tuner(model)
    if tuner is not None:
        found["parts"] = {name: (id(part), part.__dict__.copy()) for name, part in tuner.parts.items()}
    for holder in (model, tuner, None if tuner is None else tuner.model):
        configs = getattr(holder, "peft_config", None) or {}
        found["configs", type(holder)] = {name: (id(config), config.to_dict()) for name, config in configs.items()}
    return found


def differences(before, model):
    inside, outside = before
    now = outside_the_tree(model)
    changed = [key for key in {**outside, **now} if not same(outside.get(key), now.get(key))]
    return inside.differences(model) + [f"{key} changed" for key in changed]


def same(one, other):
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return one is other or (not isinstance(one, torch.Tensor) and one == other)


def outcome(model):
    """Return what a call came to, without regard to which objects it made."""
    tuner = find_tuner(model)
    return {
        "tensors": {name: (tensor.tolist(), tensor.requires_grad) for name, tensor in model.named_parameters()},
        "types": {path: (type(module), module.training) for path, module in model.named_modules()},
        "layers": [(layer.active_adapters, layer.merged_adapters) for _, layer in tuner_layers(model)],
        "tuner": None if tuner is None else (tuner.active_adapters, list(tuner.peft_config), tuner.disabled),
    }


# Methods that use what the two installed ones do not


@dataclass
class FaultConfig(PeftConfig):
    peft_type: str | None = "FAULT_SHARED"
    target_modules: list[str] | set[str] | str | None = None


@dataclass
class HandConfig(FaultConfig):
    peft_type: str | None = "FAULT_HAND"


class SharedAdapter(Adapter):
    entries = ("shared_scale", "shared_seen")

    def __init__(self, site, config):
        super().__init__(site, config)
        self.shared_scale = nn.Parameter(site.ones(1))
        self.register_buffer("shared_seen", site.zeros(1), persistent=False)

    def merged(self, below):
        return below.weight * self.shared_scale * self.part.shared_factor, below.bias


class SharedPart(Part):
    entries = ("shared_factor",)

    def __init__(self, sites, config):
        super().__init__(sites, config)
        self.shared_factor = nn.Parameter(sites[0].ones(1))


class HandLayer(nn.Module, BaseTunerLayer):
    """Written as PEFT's layers are; merging adds in place, so taking out again is not exact."""

    adapter_layer_names = ("hand_delta",)

    def __init__(self, base_layer, name):
        super().__init__()
        self.base_layer = base_layer
        self.hand_delta = nn.ParameterDict({name: nn.Parameter(torch.full_like(base_layer.weight, 0.3))})
        self.merged_adapters = []
        self._active_adapter = [name]

    def merge(self, safe_merge=False, adapter_names=None):
        for name in adapter_names or self.active_adapters:
            if name in self.hand_delta:
                self.base_layer.weight.data += self.hand_delta[name].data
                self.merged_adapters.append(name)

    def unmerge(self):
        while self.merged_adapters:
            self.base_layer.weight.data -= self.hand_delta[self.merged_adapters.pop()].data

    def forward(self, x):
        return self.base_layer(x)


@hookimpl
def _create_and_replace(adapter_name, target, target_name, parent):
    target.bias = None
    target.register_forward_hook(lambda *_: None)
    layer = HandLayer(target, adapter_name)
    setattr(parent, target_name, layer)
    return layer


@pytest.fixture(autouse=True)
def methods():
    register("fault-shared", types.SimpleNamespace(method=Method(FaultConfig, SharedAdapter, SharedPart)))
    register("fault-hand", types.SimpleNamespace(method=Method(HandConfig), _create_and_replace=_create_and_replace))
    yield
    plugins.unregister("fault-shared")
    plugins.unregister("fault-hand")


# The calls


def make_base():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.Linear(4, 2))
    base[0].register_forward_hook(lambda module, args, output: None)
    base[0].bias.requires_grad_(requires_grad=False)
    base[1].eval()
    return base


def make_small():
    return make_base().bfloat16()


def lora(*targets):
    return LoraConfig(target_modules=list(targets or ("0", "2")), r=2)


def whole(*saved):
    """A config that also has copies of modules."""
    return LoraConfig(target_modules=["0"], r=2, modules_to_save=list(saved or ("3",)))


def ia3(*targets):
    return IA3Config(target_modules=list(targets or ("0", "3")), feedforward_modules=list(targets or ("0", "3"))[:1])


def make_adapted(*active):
    """Three adapters of different methods, which overlap, with all of their tensors moved."""
    model = get_peft_model(make_base(), lora(), "one")
    model.add_adapter("two", ia3())
    model.add_adapter("three", FaultConfig(target_modules=["2"]))
    for name in ("one", "two", "three"):
        move(model, name)
    model.set_adapter(list(active or ("one",)))
    return model


def make_whole():
    """Two adapters with copies of modules, of which one is of the same module."""
    model = get_peft_model(make_base(), whole(), "one")
    model.add_adapter("two", whole("3"))
    move(model, "one")
    move(model, "two")
    return model


def merged(model, *names):
    model.merge_adapter(list(names) or None)
    return model


def alone():
    model = get_peft_model(make_base(), lora(), "one")
    model.merge_adapter()
    return model


def by_hand(*, merge):
    model = get_peft_model(make_base(), HandConfig(target_modules=["0", "3"]), "one")
    return merged(model) if merge else model


# Name of the call: what it is done to, and how.
CALLS = {
    "attach": (make_base, lambda model, _: get_peft_model(model, lora())),
    "attach with a part": (make_base, lambda model, _: get_peft_model(model, FaultConfig(target_modules=["0", "2"]))),
    "attach by hand": (make_base, lambda model, _: get_peft_model(model, HandConfig(target_modules=["0", "3"]))),
    "attach in bfloat16": (make_small, lambda model, _: get_peft_model(model, lora())),
    "inject": (make_base, lambda model, _: tunerkit.inject_adapter_in_model(ia3(), model)),
    "add": (make_adapted, lambda model, _: model.add_adapter("new", lora("0", "3"))),
    "add with a part": (
        make_adapted,
        lambda model, _: model.add_adapter("new", FaultConfig(target_modules=["0", "2"])),
    ),
    "load first": (make_base, PeftModel.from_pretrained),
    "load first trainable": (make_base, lambda model, f: PeftModel.from_pretrained(model, f, is_trainable=True)),
    "load": (make_adapted, lambda model, folder: model.load_adapter(folder, "new")),
    "load over": (make_adapted, lambda model, folder: model.load_adapter(folder, "one", is_trainable=True)),
    "attach with copies": (make_base, lambda model, _: get_peft_model(model, whole())),
    "add with copies": (make_whole, lambda model, _: model.add_adapter("new", whole())),
    "delete with copies": (make_whole, lambda model, _: model.delete_adapter("one")),
    "unload with copies": (make_whole, lambda model, _: model.unload()),
    "delete": (make_adapted, lambda model, _: model.delete_adapter("two")),
    "delete the active one": (make_adapted, lambda model, _: model.delete_adapter("one")),
    "delete one with a part": (lambda: make_adapted("three", "two"), lambda model, _: model.delete_adapter("three")),
    "delete the last": (lambda: get_peft_model(make_base(), lora()), lambda model, _: model.delete_adapter("default")),
    "set": (make_adapted, lambda model, _: model.set_adapter(["three", "two"])),
    "set while merged": (alone, lambda model, _: model.set_adapter("one", inference_mode=True)),
    "train": (make_adapted, lambda model, _: model.set_requires_grad(["one", "three"], requires_grad=False)),
    "disable": (make_adapted, lambda model, _: model.disable_adapter_layers()),
    "disable while merged": (alone, lambda model, _: model.disable_adapter_layers()),
    "merge": (lambda: make_adapted("one", "two", "three"), lambda model, _: model.merge_adapter(safe_merge=True)),
    "merge by hand": (lambda: by_hand(merge=False), lambda model, _: model.merge_adapter()),
    "unmerge": (lambda: merged(make_adapted("one", "three")), lambda model, _: model.unmerge_adapter()),
    "unmerge by hand": (lambda: by_hand(merge=True), lambda model, _: model.unmerge_adapter()),
    "unload": (make_adapted, lambda model, _: model.unload()),
    "unload while merged": (lambda: merged(make_adapted("one", "two")), lambda model, _: model.unload()),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    model = get_peft_model(make_base(), lora())
    move(model, "default")
    model.save_pretrained(path)
    return path


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tunerkit.TunerkitWarning)
        yield


class Lines:
    """Sees every line of the package that a call runs, and raises at one of them."""

    def __init__(self, number=None, error=None):
        self.number = number
        self.error = error
        self.seen = []

    def trace(self, frame, event, _argument):
        if not frame.f_code.co_filename.startswith(HOME):
            return None
        if event == "line":
            self.seen.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.seen) - 1 == self.number:
                raise self.error("on purpose")
        return self.trace

    def run(self, call, *arguments):
        torch.manual_seed(1)
        before = sys.gettrace()
        sys.settrace(self.trace)
        try:
            return call(*arguments)
        finally:
            sys.settrace(before)
            # An interrupt on the line that ends a `with` block comes before its exit: torch.no_grad() would stay on for
            # all tests of this process.
            torch.set_grad_enabled(True)


def moments(lines):
    """Return the first and the last time that each line is reached."""
    first, last = {}, {}
    for number, line in enumerate(lines):
        first.setdefault(line, number)
        last[line] = number
    return sorted({*first.values(), *last.values()})


@pytest.mark.parametrize("name", CALLS)
def test_failing_at_any_line(name, folder):
    make, call = CALLS[name]
    with quiet():
        Lines().run(call, make(), folder)  # what is cached the first time takes other lines
        whole, lines = make(), Lines()
        lines.run(call, whole, folder)
        complete, completed = outcome(whole), 0
        for turn, moment in enumerate(moments(lines.seen)[::STRIDE]):
            model = make()
            before = snapshot(model)
            fault = Lines(moment, ERRORS[turn % 2])
            try:
                fault.run(call, model, folder)
            except ERRORS as error:
                assert str(error) == "on purpose"  # noqa: PT017 - the line may not be reached again
            else:
                assert len(fault.seen) <= moment
                continue
            changed = differences(before, model)
            if changed:
                # The last step of all, which ends the call, is taken or not.
                assert outcome(model) == complete, (fault.seen[-1], changed)
                completed += 1
        assert len(lines.seen) > 20
        assert completed <= 12, (
            "a call that is interrupted after its last step is done; that is a moment, not a stretch"
        )
