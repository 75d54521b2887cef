"""What attaching and switching have to cost at least: the bounds for `attach.*` and `switching.*`.

The floor of the suite has two bare parameters a layer and undoes nothing. These loops do, over lists that are ready and
without a check, only what tunerkit's promises ask for at each of 4,800 layers: an adapter of three modules, so that its
tensors have PEFT's names and may have hooks; a note of what was there, so that an error leaves the model as it was; one
decision by name; and every tensor of every adapter asked whether it trains, for a script may have set that itself. Run
it with `python benchmarks/bounds/attach.py`; it prints medians of CPU time in microseconds a layer.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import math
import statistics
from typing import Any, NamedTuple

import torch
from timing import timed
from torch import Tensor, nn

LAYERS, WIDTH, RANK = 4800, 16, 8
TARGETS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
HELD = ("_parameters", "_buffers", "_modules")
WIDE = {torch.float32, torch.float64}
BOUND = 1 / math.sqrt(WIDTH)

torch.set_num_threads(1)


class Floor(nn.Module):
    """The floor's layer: two bare parameters."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        a = torch.empty(RANK, WIDTH)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        self.a, self.b = nn.Parameter(a), nn.Parameter(torch.zeros(WIDTH, RANK))


class Lean(nn.Module):
    """A module that holds what it has, and no containers for hooks yet."""

    def __init__(self) -> None:
        state = self.__dict__
        state["training"] = True
        for name in HELD:
            state[name] = {}


def base_model() -> list[tuple[str, nn.Module, nn.Linear]]:
    """Return the layers with their paths and parents, three to a parent as the experts of a mixture have."""
    places = []
    for number in range(LAYERS // 3):
        parent = nn.Module()
        for child in ("gate_proj", "up_proj", "down_proj"):
            layer = nn.Linear(WIDTH, WIDTH, bias=False)
            parent.add_module(child, layer)
            places.append((f"layers.{number // 32}.experts.{number % 32}.{child}", parent, layer))
    return places


def floor(places: list[tuple[str, nn.Module, nn.Linear]]) -> None:
    """Attach as the floor does."""
    for path, parent, layer in places:
        setattr(parent, path.rpartition(".")[2], Floor(layer))


def new_adapter() -> Lean:
    """Return an adapter of two factors, each in a module of its own."""
    adapter = Lean()
    factors = torch.empty(RANK, WIDTH).uniform_(-BOUND, BOUND), torch.zeros(WIDTH, RANK)
    for name, factor in zip(("lora_A", "lora_B"), factors, strict=True):
        held = Lean()
        held._parameters["weight"] = nn.Parameter(factor)
        adapter._modules[name] = held
    return adapter


def note(notes: list[Any], module: nn.Module) -> None:
    """Note what a module is, so that it can be put back."""
    state = module.__dict__
    notes.append((module, state.copy(), [(held, held.copy()) for name in HELD if (held := state[name])]))


def attach(places: list[tuple[str, nn.Module, nn.Linear]]) -> list[nn.Module]:
    """Attach a first adapter."""
    notes: list[Any] = []
    layers = []
    for path, parent, base in places:
        child = path.rpartition(".")[2]
        if child in TARGETS:
            note(notes, parent)
            note(notes, base)
            layer = nn.Module()
            layer._modules["base_layer"] = base
            layer.__dict__["adapters"] = {"default": new_adapter()}
            for entry in ("lora_A", "lora_B"):
                layer._modules[entry] = Lean()
            parent._modules[child] = layer
            layers.append(layer)
    return layers


def attach_second(places: list[tuple[str, nn.Module, nn.Linear]], layers: list[nn.Module]) -> None:
    """Attach another one beside it, frozen."""
    notes: list[Any] = []
    for (path, _, base), layer in zip(places, layers, strict=True):
        if path.rpartition(".")[2] in TARGETS:
            note(notes, layer)
            note(notes, base)
            adapter = new_adapter()
            for held in adapter._modules.values():
                held._parameters["weight"].requires_grad = False
            layer.__dict__["adapters"]["second"] = adapter


class Decision(NamedTuple):
    """What was decided for a module."""

    path: str
    kind: str
    verdict: str
    reason: str


class Site:
    """A layer as a method sees it."""

    __slots__ = ("module", "path")

    def __init__(self, module: nn.Linear, path: str) -> None:
        self.module = module
        self.path = path


def tree(places: list[tuple[str, nn.Module, nn.Linear]]) -> nn.Module:
    """Return a model in which the parents stand at their paths."""
    root = nn.Module()
    for path, parent, _ in places:
        above = root
        *upper, last, _ = path.split(".")
        for name in upper:
            if name not in above._modules:
                above.add_module(name, nn.Module())
            above = above._modules[name]
        above._modules[last] = parent
    return root


def find_targets(
    module: nn.Module, prefix: str, decisions: list[Decision], targets: list[tuple[str, nn.Module, nn.Module]]
) -> None:
    """Walk a model, not into layers with adapters, and decide by the names of modules."""
    for name, child in module._modules.items():
        if child is None:
            continue
        path = prefix + name
        if name in TARGETS:
            decisions.append(Decision(path, type(child).__name__, "adapted", repr(name)))
            targets.append((path, module, child))
        else:
            decisions.append(Decision(path, type(child).__name__, "not matched", ""))
        if child._modules and "adapters" not in child.__dict__:
            find_targets(child, f"{path}.", decisions, targets)


def create(site: Site, ranks: dict[str, int]) -> Lean:
    """Return an adapter for a layer, as the plugin of a method does, with the settings that a config has for it."""
    weight = site.module._parameters["weight"]
    rank = ranks.get(site.path, RANK)
    adapter = Lean()
    adapter.__dict__["scaling"] = 16 / rank
    factors = (
        weight.new_empty((rank, weight.shape[1])).uniform_(-BOUND, BOUND),
        weight.new_zeros((weight.shape[0], rank)),
    )
    for name, factor in zip(("lora_A", "lora_B"), factors, strict=True):
        held = Lean()
        held.__dict__["out_features"], held.__dict__["in_features"] = factor.shape
        held._parameters["weight"] = nn.Parameter(factor)
        adapter._modules[name] = held
    return adapter


def plan_and_attach_second(model: nn.Module) -> None:
    """Attach another one beside it, frozen, where a walk over the model finds that it goes, by way of a plugin."""
    notes: list[Any] = []
    noted: set[int] = set()
    decisions: list[Decision] = []
    targets: list[tuple[str, nn.Module, nn.Module]] = []
    find_targets(model, "", decisions, targets)
    for path, parent, layer in targets:
        base: nn.Linear = layer._modules["base_layer"]
        for module in (parent, layer, base):
            if id(module) not in noted:
                noted.add(id(module))
                note(notes, module)
        site = Site(base, path)
        adapter = create(site, {})
        device = base._parameters["weight"].device
        adapter.__dict__["training"] = layer.training
        for entry, held in adapter._modules.items():
            if entry not in layer._modules:
                msg = f"{entry} is not declared."
                raise ValueError(msg)
            held.__dict__["training"] = layer.training
            for parameter in held._parameters.values():
                if parameter.device != device:
                    parameter.data = parameter.data.to(device)
                if parameter.dtype not in WIDE:
                    parameter.data = parameter.data.float()
                parameter.requires_grad = False
        layer.__dict__["adapters"]["second"] = adapter


def switch(layers: list[nn.Module], name: str) -> None:
    """Make one of the adapters active and trainable, and freeze the others."""
    notes: list[Any] = []
    changed: list[tuple[Tensor, bool]] = []
    for layer in layers:
        state = layer.__dict__
        notes.append((layer, state.get("active")))
        for known, adapter in state["adapters"].items():
            trains = known == name
            for held in adapter._modules.values():
                for parameter in held._parameters.values():
                    if parameter.requires_grad is not trains:
                        changed.append((parameter, not trains))
                        parameter.requires_grad = trains
        state["active"] = name


def switch_off_and_on(layers: list[nn.Module]) -> None:
    """Freeze what trains and remember it, as `disable_adapter()` does, and let it train again."""
    notes: list[Any] = []
    changed: list[tuple[Tensor, bool]] = []
    for layer in layers:
        state = layer.__dict__
        notes.append((layer, state.get("trained")))
        parameters = [
            parameter
            for adapter in state["adapters"].values()
            for held in adapter._modules.values()
            for parameter in held._parameters.values()
        ]
        state["trained"] = trained = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in trained:
            changed.append((parameter, True))
            parameter.requires_grad = False
    for layer in layers:
        notes.append((layer, layer.__dict__["trained"]))
        for parameter in layer.__dict__["trained"]:
            changed.append((parameter, False))
            parameter.requires_grad = True


def main() -> None:
    """Print the medians."""
    figures: dict[str, list[float]] = {}
    for _ in range(7):
        by_hand, places = base_model(), base_model()
        figures.setdefault("floor, attach", []).append(timed(lambda by_hand=by_hand: floor(by_hand), LAYERS)[0])
        model = tree(places)
        took, layers = timed(lambda places=places: attach(places), LAYERS)
        figures.setdefault("bound, attach", []).append(took)
        took, _ = timed(lambda places=places, layers=layers: attach_second(places, layers), LAYERS)
        figures.setdefault("bound, second", []).append(took)
        for layer in layers:
            del layer.__dict__["adapters"]["second"]
        took, _ = timed(lambda model=model: plan_and_attach_second(model), LAYERS)
        figures.setdefault("bound, second, planned", []).append(took)
        took, _ = timed(lambda layers=layers: switch(layers, "second"), LAYERS)
        figures.setdefault("bound, set_adapter", []).append(took)
        took, _ = timed(lambda layers=layers: switch_off_and_on(layers), LAYERS)
        figures.setdefault("bound, disable", []).append(took)
    for what, taken in figures.items():
        print(f"{what:24} {statistics.median(taken):6.1f} us")


if __name__ == "__main__":
    main()
