"""Whatever goes wrong at whatever moment of a call, the model is what it was, object for object and bit for bit."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import types
import warnings
from dataclasses import dataclass
from pathlib import Path

import pluggy
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name

import tunerkit
import tunerkit_ia3
import tunerkit_lora
from tunerkit import BaseTunerLayer, Method, PeftConfig, PeftModel, get_peft_model, hookimpl, plugins, register
from tunerkit.adapter import Adapter, Part
from tunerkit.layer import tuner_layers
from tunerkit.lean import attributes_of
from tunerkit.testing.bench import Snapshot, move
from tunerkit.tuner import find_tuner
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoraConfig, rescale_adapter_scale

HOME = tuple(str(Path(package.__file__).parent) for package in (tunerkit, tunerkit_lora, tunerkit_ia3))
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
        for name, value in attributes_of(module).items():
            if "hooks" in name:
                found[path, name] = list(value.items()) if isinstance(value, dict) else value
    for path, layer in tuner_layers(model):
        for name, adapter in getattr(layer, "adapters", {}).items():
            state = {
                key: dict(value) if isinstance(value, dict) else value for key, value in attributes_of(adapter).items()
            }
            found[path, "adapter", name] = (id(adapter), state)
    tuner = find_tuner(model)
    config = getattr(model if tuner is None else tuner.model, "config", None)
    found["config"] = dict(config.__dict__) if isinstance(config, types.SimpleNamespace) else None
    if tuner is not None:
        found["biases"] = {**vars(tuner.biases), "kept": [tensor.tolist() for tensor in tuner.biases.kept]}
        found["replication"] = tuner.replication
        found["parts"] = {name: (id(part), attributes_of(part)) for name, part in tuner.parts.items()}
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
        "biases": None if tuner is None else (tuner.biases.shown, [kept.tolist() for kept in tuner.biases.kept]),
        "repeated": None if tuner is None else tuner.replication.ranges,
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


def make_biased(*active):
    """An adapter that trains all biases, and one that trains none, both moved."""
    model = get_peft_model(make_base(), LoraConfig(target_modules=["0", "2"], r=2, bias="all"), "one")
    model.add_adapter("two", lora("0", "3"))
    move(model, "one")
    move(model, "two")
    for number, bias in enumerate(model.base_model.biases.parameters()):
        bias.data.add_(1 + number)
    model.set_adapter(list(active or ("one",)))
    return model


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 3)


class Deep(nn.Module):
    """Layers that can be repeated, between an embedding and an output layer that are tied."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(5, 3)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.words.weight
        self.config = types.SimpleNamespace(num_hidden_layers=2)


def make_deep():
    torch.manual_seed(0)
    return Deep()


REPEATED = LoraConfig(target_modules=["lin"], r=2, layer_replication=[(0, 2), (1, 2)])
TIED = LoraConfig(target_modules=["lin", "words"], r=2, ensure_weight_tying=True)
TIED_COPIES = LoraConfig(target_modules=["lin"], r=2, modules_to_save=["words"], ensure_weight_tying=True)


def deep(config, *more):
    """A model with an adapter of a config, and perhaps one of another, both moved."""
    with quiet():
        model = get_peft_model(make_deep(), config, "one")
        for number, other in enumerate(more):
            model.add_adapter(f"more{number}", other)
    for name in model.peft_config:
        move(model, name)
    return model


def combine(model, _):
    model.add_weighted_adapter(["one", "two"], [0.5, 0.7], "new", combination_type="svd", svd_rank=2)


def rescale(model, _):
    with rescale_adapter_scale(model, 0.5):
        model(torch.ones(2, 3))


def make_pair():
    """Two adapters that can be combined."""
    model = get_peft_model(make_base(), lora(), "one")
    model.add_adapter("two", lora("0", "3"))
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
    "attach with biases": (
        make_base,
        lambda model, _: get_peft_model(model, LoraConfig(target_modules=["0"], r=2, bias="all")),
    ),
    "add beside biases": (make_biased, lambda model, _: model.add_adapter("new", whole("1"))),
    "set away from biases": (make_biased, lambda model, _: model.set_adapter("two")),
    "set biases": (lambda: make_biased("two"), lambda model, _: model.set_adapter(["one", "two"])),
    "train biases": (make_biased, lambda model, _: model.set_requires_grad("one", requires_grad=False)),
    "delete biases": (make_biased, lambda model, _: model.delete_adapter("one")),
    "disable biases": (make_biased, lambda model, _: model.disable_adapter_layers()),
    "disable biases while merged": (lambda: merged(make_biased()), lambda model, _: model.disable_adapter_layers()),
    "merge with biases": (make_biased, lambda model, _: model.merge_adapter()),
    "unload biases": (lambda: merged(make_biased()), lambda model, _: model.unload()),
    "attach repeated": (make_deep, lambda model, _: get_peft_model(model, REPEATED)),
    "add to repeated": (lambda: deep(REPEATED), lambda model, _: model.add_adapter("new", REPEATED)),
    "delete repeated": (lambda: deep(REPEATED), lambda model, _: model.delete_adapter("one")),
    "unload repeated": (lambda: merged(deep(REPEATED)), lambda model, _: model.unload()),
    "inject repeated": (make_deep, lambda model, _: tunerkit.inject_adapter_in_model(REPEATED, model)),
    "attach tied": (make_deep, lambda model, _: get_peft_model(model, TIED)),
    "merge tied": (lambda: deep(TIED), lambda model, _: model.merge_adapter()),
    "unload tied": (lambda: merged(deep(TIED)), lambda model, _: model.unload()),
    "attach with tied copies": (make_deep, lambda model, _: get_peft_model(model, TIED_COPIES)),
    "add with tied copies": (lambda: deep(TIED_COPIES), lambda model, _: model.add_adapter("new", TIED_COPIES)),
    "set tied copies": (lambda: deep(TIED_COPIES, TIED_COPIES), lambda model, _: model.set_adapter("more0")),
    "delete tied copies": (lambda: deep(TIED_COPIES, TIED_COPIES), lambda model, _: model.delete_adapter("one")),
    "swap": (make_pair, lambda model, folder: tunerkit.hotswap_adapter(model, folder, "one")),
    "combine": (make_pair, combine),
    "rescale": (make_pair, rescale),
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
        # What is raised at the end of a `with`, before that ends, leaves its file to be closed when it is forgotten.
        warnings.simplefilter("ignore", ResourceWarning)
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


class Operations(TorchFunctionMode):
    """Sees every operation of a call, whoever calls it and how often, and raises in place of one of them.

    An operation is one of torch's on a tensor, a tensor or a module that becomes part of a module, an attribute of a
    module that is set, a hook that is called, and a change to a file or folder.
    """

    SEEN = (
        (nn.Module, "__setattr__"),
        (nn.Module, "__delattr__"),
        (nn.Module, "register_parameter"),
        (nn.Module, "register_buffer"),
        (nn.Module, "add_module"),
        (nn.Module, "requires_grad_"),
        (nn.Module, "train"),
        (pluggy.HookCaller, "__call__"),
        (os, "fsync"),
        (Path, "open"),
        (Path, "mkdir"),
        (Path, "replace"),
        (Path, "rename"),
        (Path, "unlink"),
    )

    def __init__(self, number=None, error=None):
        super().__init__()
        self.number = number
        self.error = error
        self.seen = []

    def count(self, name):
        self.seen.append(name)
        if len(self.seen) - 1 == self.number:
            raise self.error("on purpose")

    def __torch_function__(self, operation, _types, arguments=(), keywords=None):
        self.count(resolve_name(operation) or str(operation))
        return operation(*arguments, **(keywords or {}))

    def counted(self, name, function):
        @functools.wraps(function)
        def counting(*arguments, **keywords):
            self.count(name)
            return function(*arguments, **keywords)

        return counting

    def run(self, call, *arguments):
        torch.manual_seed(1)
        # Also where what fails is the step that leaves `no_grad`.
        with torch.enable_grad(), pytest.MonkeyPatch.context() as patch, self:
            for owner, name in self.SEEN:
                patch.setattr(owner, name, self.counted(f"{owner.__name__}.{name}", getattr(owner, name)))
            return call(*arguments)


def moments(lines):
    """Return the first and the last time that each line is reached."""
    first, last = {}, {}
    for number, line in enumerate(lines):
        first.setdefault(line, number)
        last[line] = number
    return sorted({*first.values(), *last.values()})


@pytest.mark.parametrize("name", CALLS)
def test_failing_at_any_line(name, folder):
    every = fail_at_each(name, folder, Lines, moments, STRIDE)
    assert len(every) > 20


@pytest.mark.parametrize("name", CALLS)
def test_failing_in_place_of_any_operation(name, folder):
    every = fail_at_each(name, folder, Operations, lambda seen: range(len(seen)), 1)
    assert every


@pytest.mark.parametrize("there", [False, True], ids=["new folder", "over another"])
def test_interrupted_save(there, tmp_path):
    """The model is what it was, and the folder holds what it held, or all of the new checkpoint."""
    model, other = make_pair(), make_pair()
    move(other, "one", seed=9)

    def save(folder):
        with quiet():
            model.save_pretrained(folder, selected_adapters=["one"])

    if there:
        other.save_pretrained(tmp_path / "whole", selected_adapters=["one"])
    seen = Operations()
    seen.run(save, tmp_path / "whole")
    assert {"os.fsync", "Path.open", "Path.replace"} <= set(seen.seen)
    expected = {name: tunerkit.get_peft_model_state_dict(each, adapter_name="one") for name, each in
                (("old", other), ("new", model))}  # fmt: skip
    held = set()
    for moment in range(len(seen.seen)):
        folder = tmp_path / str(moment)
        if there:
            other.save_pretrained(folder, selected_adapters=["one"])
        before = snapshot(model)
        with pytest.raises(KeyboardInterrupt):
            Operations(moment, KeyboardInterrupt).run(save, folder)
        assert differences(before, model) == []
        if there or (folder / "one").exists():
            found = tunerkit.load_peft_weights(folder / "one")
            now = [
                name for name, state in expected.items() if all(torch.equal(found[key], state[key]) for key in state)
            ]
            assert len(now) == 1
            held |= set(now)
        else:
            held.add("nothing")
    assert held == {"old" if there else "nothing", "new"}


def fail_at_each(name, folder, fault_kind, choose, stride):
    """Let a call fail at each of its moments, check the model after each, and return all that was seen."""
    make, call = CALLS[name]
    with quiet():
        fault_kind().run(call, make(), folder)  # what is cached the first time takes other lines
        whole, seen = make(), fault_kind()
        seen.run(call, whole, folder)
        complete, completed = outcome(whole), 0
        for turn, moment in enumerate(choose(seen.seen)[::stride]):
            model = make()
            before = snapshot(model)
            fault = fault_kind(moment, ERRORS[turn % 2])
            try:
                fault.run(call, model, folder)
            except ERRORS as error:
                # An error of ours may say what could not be read, and keeps what was raised there.
                assert "on purpose" in (str(error), str(error.__cause__))  # noqa: PT017 - the line may not be reached again
            else:
                assert len(fault.seen) <= moment
                continue
            changed = differences(before, model)
            if changed:
                # The last step of all, which ends the call, is taken or not.
                assert outcome(model) == complete, (fault.seen[moment], changed)
                completed += 1
        assert completed <= 12, (
            "a call that is interrupted after its last step is done; that is a moment, not a stretch"
        )
    return seen.seen
