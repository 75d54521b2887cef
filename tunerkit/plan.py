"""Which modules an adapter is to go to, and why: decided before anything is touched."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from tunerkit.config import PeftConfig
from tunerkit.errors import NoMatchingPeftModuleError, PluginError, TargetError
from tunerkit.layer import BaseTunerLayer
from tunerkit.naming import closest, listing
from tunerkit.targeting import (
    ALL_LINEAR,
    LayerChoice,
    all_linear,
    bare,
    endings,
    is_linear,
    keys_in_state,
    match_name,
    modules_outside_adapters,
    places,
    wants_all_linear,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from torch import nn

Verdict = Literal["adapted", "excluded", "not matched"]


class Chooser(Protocol):
    """Who answers for a method: the tuner whose hooks or overriding methods are asked."""

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig: ...

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> str | re.Match[str] | bool | None: ...


@dataclass(frozen=True)
class Decision:
    """What was decided for one module, or for one parameter of it."""

    name: str
    module_type: str
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class Target:
    """A module that is to be adapted, with every place at which it stands."""

    name: str
    module: nn.Module
    places: tuple[tuple[nn.Module, str], ...]
    parameter_name: str | None = None


@dataclass(frozen=True)
class Plan:
    """What attaching an adapter would do. Printed, it is a table.

    Attributes:
        config: The completed config.
        decisions: What was decided for each module, in the model's order.
        entries: For each entry of `target_modules` and `target_parameters`, how many modules it matched.
        exclusions: For each entry of `exclude_modules`, how many modules it matched.
        targets: The modules to adapt.
        layers: For each number in `layers_to_transform` and each entry of `layers_pattern`, how many targeted modules
            are in such a layer.
    """

    config: PeftConfig
    decisions: tuple[Decision, ...]
    entries: dict[str, int]
    exclusions: dict[str, int]
    targets: tuple[Target, ...] = field(repr=False)
    layers: dict[int | str, int] = field(default_factory=dict)

    @property
    def adapted(self) -> list[str]:
        """The paths of the modules and parameters that are adapted."""
        return [decision.name for decision in self.decisions if decision.verdict == "adapted"]

    def unmatched(self) -> list[str]:
        """Return a sentence for each entry of the config that matched nothing, with the closest names."""
        names = [decision.name for decision in self.decisions]
        parameters = getattr(self.config, "target_parameters", None) or ()
        wanted = [("target_parameters" if entry in parameters else "target_modules", entry) for entry in self.entries]
        left = [(where, entry) for where, entry in wanted if not self.entries[entry]]
        left += [("exclude_modules", entry) for entry, count in self.exclusions.items() if not count]
        said = [f"{entry!r} in {where} matches nothing{_hint(entry, names)}" for where, entry in left]
        for entry in (entry for entry, count in self.layers.items() if not count):
            where = "layers_pattern" if isinstance(entry, str) else "layers_to_transform"
            said.append(f"{entry!r} in {where} matches no layer with targeted modules")
        return said

    def __str__(self) -> str:
        groups: Counter[tuple[str, str, str, str]] = Counter()
        for item in self.decisions:
            if item.verdict != "not matched":
                groups[re.sub(r"\b\d+\b", "*", item.name), item.module_type, item.verdict, item.reason] += 1
        rows = [("module", "type", "decision", "why", "count")]
        rows += [(*group, str(count)) for group, count in groups.items()]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        left = sum(item.verdict == "not matched" for item in self.decisions)
        total = f"{len(self.adapted)} of {len(self.decisions)} modules adapted, {left} not matched"
        return "\n".join([*lines, total, *self.unmatched()])


def make_plan(
    model: nn.Module,
    config: PeftConfig,
    chooser: Chooser,
    model_config: dict[str, Any],
    state_keys: Collection[str] | None = None,
    entries: Collection[str] = (),
    prefix: str = "",
) -> Plan:
    """Decide which modules of a model an adapter goes to. Neither the model nor the config is changed.

    Args:
        model: The base model; other adapters may be attached to it.
        config: The adapter's config.
        chooser: Who answers the method's hooks.
        model_config: The model's own config.
        state_keys: The keys of a checkpoint, to go where its tensors say rather than where the config says.
        entries: The names of the entries in which the method's adapters hold their tensors.
        prefix: What those names start with, if they are not known.

    Raises:
        NoMatchingPeftModuleError: Nothing is matched.
        TargetError: The config does not say what to target, says it in two ways, or holds a broken pattern.
        ConfigError: A setting that was changed since the config was made is wrong.
        PluginError: The method completes the config to something else.
    """
    config = _prepared(chooser, config, model_config)
    if wants_all_linear(config):
        config.target_modules = _all_linear(model, config)  # type: ignore[attr-defined]
    matcher = _Matcher(config, chooser)
    if state_keys is not None:
        _refuse_target_parameters(config)
        matcher.only_in(keys_in_state(model, state_keys, entries, prefix))
    targets: dict[tuple[int, str | None], Target] = {}
    decisions: list[Decision] = []
    modules = ((*place, None) for place in places(model))
    for key, module, parent, name, parameter in itertools.chain(modules, _parameters(model, config)):
        spot = id(bare(module)), parameter
        verdict, reason = matcher.decide(key, parameter)
        if spot in targets:
            # What stands at several places gets one adapter, put at those of its places that are meant.
            if verdict == "adapted":
                known = targets[spot]
                targets[spot] = dataclasses.replace(known, places=(*known.places, (parent, name)))
            continue
        if verdict == "adapted":
            targets[spot] = Target(key, module, ((parent, name),), parameter)
        if parameter is None:
            decisions.append(Decision(key, type(bare(module)).__name__, verdict, reason))
        elif verdict == "adapted":
            decisions.append(Decision(f"{key}.{parameter}", "Parameter", verdict, reason))
    plan = Plan(
        config,
        tuple(decisions),
        dict(matcher.entries),
        dict(matcher.exclusions),
        tuple(targets.values()),
        dict(matcher.layers),
    )
    if not targets:
        raise NoMatchingPeftModuleError(_nothing_matched(model, plan, state_keys is not None))
    return plan


def _prepared(chooser: Chooser, config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
    copied = config.copy()
    copied.check()  # A field may have been set since the config was made.
    prepared: object = chooser._prepare_adapter_config(copied, model_config)
    if not isinstance(prepared, PeftConfig):
        msg = (
            f"_prepare_adapter_config of {str(config.peft_type)!r} returned {prepared!r} for its "
            f"{type(config).__name__}. It must return the completed config."
        )
        raise PluginError(msg)
    return prepared


def _all_linear(model: nn.Module, config: PeftConfig) -> set[str]:
    found = all_linear(model, config)
    if not found:
        types = dict.fromkeys(type(module).__name__ for _, module, _, _ in places(model))
        msg = (
            f"target_modules={ALL_LINEAR!r} finds no linear layer that can be adapted (the output layer is left out); "
            f"the model ({type(model).__name__}) holds modules of the types {listing(types)}. Name those to adapt."
        )
        raise NoMatchingPeftModuleError(msg)
    return found


def _check_pattern(setting: str, wanted: str) -> None:
    try:
        re.compile(wanted)
    except re.error as error:
        msg = (
            f"{setting}={wanted!r} is text, so it is a regular expression for whole paths, and a broken one: {error}. "
            f"Mend it; for the name of a module pass a list, [{wanted!r}]."
        )
        raise TargetError(msg) from error


def _check_layer_patterns(choice: LayerChoice) -> None:
    try:
        choice.find("")
    except re.error as error:
        msg = (
            f"layers_pattern={list(choice.patterns)} holds a broken regular expression for the name before a layer's "
            f"number: {error}. Mend it; mostly it is just that name, such as 'layers'."
        )
        raise TargetError(msg) from error


def _refuse_target_parameters(config: PeftConfig) -> None:
    if getattr(config, "target_parameters", None):
        msg = "target_parameters cannot be found from the keys of a state dict; attach by the config instead."
        raise TargetError(msg)


class _Matcher:
    """Asks the method about each module and counts what its entries matched."""

    def __init__(self, config: PeftConfig, chooser: Chooser) -> None:
        self.config = config
        self.chooser = chooser
        self.only: set[str] | None = None
        self.excluded = getattr(config, "exclude_modules", None)
        self.parameters = frozenset(getattr(config, "target_parameters", None) or ())
        self.entries: Counter[str] = Counter()
        self.exclusions: Counter[str] = Counter()
        for counter, setting in ((self.entries, "target_modules"), (self.exclusions, "exclude_modules")):
            wanted = getattr(config, setting, None)
            if isinstance(wanted, str):
                _check_pattern(setting, wanted)
            counter.update(dict.fromkeys([wanted] if isinstance(wanted, str) else sorted(wanted or ()), 0))
        self.entries.update(dict.fromkeys(sorted(self.parameters), 0))
        self.choice = LayerChoice.of(config)
        self.layers: Counter[int | str] = Counter()
        if self.choice is not None:
            _check_layer_patterns(self.choice)
            self.layers.update(dict.fromkeys((*self.choice.numbers, *self.choice.patterns), 0))

    def only_in(self, paths: set[str]) -> None:
        """Decide by these paths alone, whatever the config says."""
        self.only = paths
        self.entries.clear()
        self.exclusions.clear()
        self.layers.clear()

    def decide(self, key: str, parameter: str | None) -> tuple[Verdict, str]:
        """Say whether a module is adapted, or one parameter of it, and why."""
        if parameter is not None:
            key = f"{key}.{parameter}"
            named = match_name(self.parameters, key)
            return ("adapted", self._count(self.entries, named, key)) if named else ("not matched", "")
        if self.only is not None:
            return ("adapted", "in the state dict") if key in self.only else ("not matched", "")
        found = self.chooser._check_target_module_exists(self.config, key)
        if found:
            self._count_layer(key)
            return "adapted", self._count(self.entries, found, key)
        excluded = self.excluded and match_name(self.excluded, key)
        if not excluded and self.choice is None:
            return "not matched", ""
        # What is excluded was matched all the same: the entry is not one that means nothing.
        meant = match_name(getattr(self.config, "target_modules", None), key)
        if meant:
            self._count(self.entries, meant, key)
            self._count_layer(key)
        if excluded:
            return "excluded", self._count(self.exclusions, excluded, key)
        return ("excluded", "layers_to_transform") if meant else ("not matched", "")

    def _count_layer(self, key: str) -> None:
        """Count the layer in which a targeted module is."""
        found = None if self.choice is None else self.choice.find(key)
        self.layers.update(name for name in found or () if name in self.layers)

    @staticmethod
    def _count(counter: Counter[str], found: str | re.Match[str] | bool, key: str) -> str:
        if isinstance(found, bool):
            counter.clear()  # an overriding method that only says yes leaves nothing to count
            return "matched"
        entry = found if isinstance(found, str) else found.re.pattern
        counter[entry] += 1
        # What was found is one of the entries that mean the module; the others have not matched nothing.
        counter.update(ending for ending in endings(key) if ending in counter and ending != entry)
        return repr(entry)


def _parameters(model: nn.Module, config: PeftConfig) -> Iterable[tuple[str, nn.Module, nn.Module, str, str]]:
    """Go through the parameters that could be targets: path, module, its parent, its name in it, the parameter."""
    if not getattr(config, "target_parameters", None):
        return
    for key, module, parent, name in places(model):
        spot, holder, child = module, parent, name
        base = bare(module)
        for parameter in base._parameters:
            # A layer that adapts this very parameter may stand below layers that adapt others of the module.
            found, found_parent, found_name = spot, holder, child
            layer: nn.Module = spot
            upper, upper_name = holder, child
            while isinstance(layer, BaseTunerLayer):
                if getattr(layer, "parameter_name", None) == parameter:
                    found, found_parent, found_name = layer, upper, upper_name
                    break
                upper, upper_name, layer = layer, "base_layer", layer.base_layer
            yield key, found, found_parent, found_name, parameter


def _nothing_matched(model: nn.Module, plan: Plan, from_state: bool) -> str:
    names = [decision.name for decision in plan.decisions]
    if from_state:
        return (
            f"No key of the state dict belongs to a module of the model, which has {listing(names)}. Pass the tensors "
            "of an adapter that was made for this model."
        )
    wanted = list(plan.entries)
    if not wanted:
        return f"The config targets nothing: set target_modules to names of modules, a pattern, or {ALL_LINEAR!r}."
    where = "target_modules" if getattr(plan.config, "target_modules", None) else "target_parameters"
    target = f"{where}={_shown(getattr(plan.config, where))}"
    if any(plan.entries.values()) and any(item.reason == "layers_to_transform" for item in plan.decisions):
        settings = {name: getattr(plan.config, name, None) for name in ("layers_to_transform", "layers_pattern")}
        chosen = ", ".join(f"{name}={value!r}" for name, value in settings.items() if value is not None)
        first = next(item.name for item in plan.decisions if item.reason == "layers_to_transform")
        return (
            f"{target} matches modules such as {first!r}, and none that is in a layer which {chosen} means. A layer's "
            "number stands in the path after a name, which layers_pattern can give."
        )
    if any(plan.entries.values()):
        return (
            f"{target} matches {sum(plan.entries.values())} modules, and all of them are excluded by "
            f"exclude_modules={_shown(getattr(plan.config, 'exclude_modules', None))}. Exclude fewer, or target others."
        )
    return f"{target} matches nothing in the model. {_advice(model, plan, wanted, names)}"


def _advice(model: nn.Module, plan: Plan, wanted: list[str], names: list[str]) -> str:
    text = isinstance(getattr(plan.config, "target_modules", None), str)
    if any(re.sub(r"[\W_]", "", entry.lower()) == ALL_LINEAR.replace("-", "") for entry in wanted):
        return f"Did you mean {ALL_LINEAR!r}?" if text else f"For all linear layers pass the text, {ALL_LINEAR!r}."
    if text and any(match_name(wanted, name) for name in names):
        return (
            f"{wanted[0]!r} is text, so it is a pattern for whole paths. For modules of that name pass a list: "
            f"target_modules={wanted}."
        )
    near = [name for entry in wanted for name in _near(entry, names)]
    linear = dict.fromkeys(
        key.rpartition(".")[2] for key, module in modules_outside_adapters(model) if is_linear(module)
    )
    hint = f"The model has {listing(names)}."
    if near:
        hint = f"Closest names: {listing(dict.fromkeys(near))}."
    elif linear:
        hint = f"The names of its linear layers end in {listing(linear)}."
    return (
        f"{hint} An entry is a whole path or its end after a dot; text that is not in a list is a pattern for the "
        f"whole path; {ALL_LINEAR!r} means all linear layers."
    )


def _shown(entries: Collection[str] | str | None) -> str:
    return repr(entries) if isinstance(entries, str) else f"[{listing(sorted(entries or ()))}]"


def _hint(entry: str, names: list[str]) -> str:
    near = _near(entry, names)
    return f"; closest: {listing(near)}" if near else ""


def _near(entry: str, names: list[str]) -> list[str]:
    depth = entry.count(".") + 1
    return closest(entry, [*(".".join(name.split(".")[-depth:]) for name in names), *names])
