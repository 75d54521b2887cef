"""Which modules an adapter is to go to, and why: decided before anything is touched."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from tunerkit.advice import closest_to, nothing_matched
from tunerkit.config import PeftConfig
from tunerkit.errors import NoMatchingPeftModuleError, PluginError, TargetError, UnsupportedSiteError
from tunerkit.modules_to_save import WholeModules
from tunerkit.naming import listing
from tunerkit.sites import make_site, site_class
from tunerkit.targeting import (
    ALL_LINEAR,
    all_linear,
    bare,
    endings,
    is_linear,
    is_transposed,
    keys_in_state,
    match_name,
    match_pattern,
    parameter_places,
    place_of_parameter,
    places,
    wants_all_linear,
)

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import nn

    from tunerkit.modules_to_save import WholeModule
    from tunerkit.sites import Site
    from tunerkit.targeting import Place

Verdict = Literal["adapted", "excluded", "copied", "not matched"]


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
        patterns: For each setting that gives single modules values by patterns (`rank_pattern`), how many of the
            adapted modules each of its entries fits.
        corrections: What was corrected in the config, in words.
        targets: The modules to adapt.
        copies: The modules of which the adapter gets copies that are trained and saved as a whole.
        unsaved: The entries of `modules_to_save` that matched nothing.
    """

    config: PeftConfig
    decisions: tuple[Decision, ...]
    entries: dict[str, int]
    exclusions: dict[str, int]
    patterns: dict[str, dict[str, int]]
    corrections: tuple[str, ...]
    targets: tuple[Target, ...] = field(repr=False)
    copies: tuple[WholeModule, ...] = field(repr=False)
    unsaved: tuple[str, ...]

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
        left += [("modules_to_save", entry) for entry in self.unsaved]
        sentences = [f"{entry!r} in {where} matches nothing{closest_to(entry, names)}" for where, entry in left]
        adapted = [_settings_name(target) for target in self.targets]
        return sentences + [
            f"{entry!r} in {where} fits no adapted module{closest_to(entry, adapted)}"
            for where, counts in self.patterns.items()
            for entry, count in counts.items()
            if not count
        ]

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
        copied = sum(item.verdict == "copied" for item in self.decisions)
        saved = f", {copied} copied" if copied else ""
        total = f"{len(self.adapted)} of {len(self.decisions)} modules adapted{saved}, {left} not matched"
        return "\n".join([*lines, total, *self.unmatched(), *self.corrections])


def make_plan(
    model: nn.Module,
    config: PeftConfig,
    chooser: Chooser,
    model_config: dict[str, Any],
    state_keys: Collection[str] | None = None,
    entries: Collection[str] = (),
    prefix: str = "",
    kinds: Collection[str] = (),
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
        kinds: The kinds of sites that the method adapts, if it leaves making the layers to the core.

    Raises:
        UnsupportedSiteError: A layer is targeted that can only be adapted along with another.
        NoMatchingPeftModuleError: Nothing is matched.
        TargetError: The config does not say what to target, says it in two ways, or holds a broken pattern.
        ConfigError: A setting that was changed since the config was made is wrong.
        PluginError: The method completes the config to something else.
    """
    config = _prepared(chooser, config, model_config)
    if wants_all_linear(config):
        config.target_modules = _all_linear(model, config)  # type: ignore[attr-defined]
    whole = WholeModules(model, config)
    matcher = _Matcher(config, chooser, whole)
    if state_keys is not None:
        _refuse_target_parameters(config)
        matcher.only_in(keys_in_state(model, state_keys, entries, prefix))
    targets: dict[tuple[int, str | None], Target] = {}
    decisions: list[Decision] = []
    modules = ((*place, None) for place in places(model))
    parameters = parameter_places(model) if getattr(config, "target_parameters", None) else ()
    along: dict[int, str] = {}
    for key, module, parent, name, parameter in itertools.chain(modules, parameters):
        base = bare(module)
        verdict, reason = matcher.decide(key, parameter)
        if verdict == "not matched" and parameter is None and id(base) in along:
            verdict, reason = "adapted", along[id(base)]
        found = [(module, parent, name, parameter)]
        if verdict == "adapted" and parameter is None and (kind := _site_class(base, kinds)) is not None:
            why_not = None if id(base) in along else kind.alone(base)
            if why_not is not None:
                msg = f"The module {key!r} ({type(base).__name__}) cannot be adapted: {why_not}."
                raise UnsupportedSiteError(msg)
            along.update({id(bare(base._modules[child])): f"with {key!r}" for child in kind.along})  # type: ignore[arg-type]
            found = [place_of_parameter(module, parent, name, own) for own in kind.parameters_of(base)] or found
        if verdict == "adapted":
            whole.check_free(key)
        for target in found:
            _note(targets, decisions, key, target, (verdict, reason))
    plan = Plan(
        config,
        tuple(decisions),
        dict(matcher.entries),
        dict(matcher.exclusions),
        _count_patterns(config, [_settings_name(target) for target in targets.values()]),
        _correct_orientation(config, list(targets.values())),
        tuple(targets.values()),
        whole.modules,
        tuple(whole.unmatched()),
    )
    if not targets:
        raise NoMatchingPeftModuleError(nothing_matched(model, plan, state_keys is not None))
    return plan


def _site_class(module: nn.Module, kinds: Collection[str]) -> type[Site] | None:
    """Return the class of site that a module is, if it is one that the method adapts."""
    kind = site_class(type(module))
    return kind if kind is not None and kind.kind in kinds else None


def _settings_name(target: Target) -> str:
    site = make_site(bare(target.module), target.name, target.parameter_name)
    return target.name if site is None else site.settings_name


def _note(
    targets: dict[tuple[int, str | None], Target],
    decisions: list[Decision],
    key: str,
    place: Place,
    decided: tuple[Verdict, str],
) -> None:
    """Note what was decided for a module, or for a parameter, at one of its places."""
    module, parent, name, parameter = place
    spot = id(bare(module)), parameter
    verdict, reason = decided
    if spot in targets:
        # What stands at several places gets one adapter, put at those of its places that are meant.
        known = targets[spot]
        if verdict == "adapted" and (parent, name) not in known.places:
            targets[spot] = dataclasses.replace(known, places=(*known.places, (parent, name)))
        return
    if verdict == "adapted":
        targets[spot] = Target(key, module, ((parent, name),), parameter)
    if parameter is None:
        decisions.append(Decision(key, type(bare(module)).__name__, verdict, reason))
    elif verdict == "adapted":
        decisions.append(Decision(f"{key}.{parameter}", "Parameter", verdict, reason))


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


def _count_patterns(config: PeftConfig, paths: list[str]) -> dict[str, dict[str, int]]:
    """Return for each setting by patterns how many paths each of its entries fits."""
    return {
        setting: {entry: _count_fits(setting, entry, paths) for entry in getattr(config, setting) or ()}
        for setting in config._patterns
    }


def _count_fits(setting: str, entry: str, paths: list[str]) -> int:
    try:
        return sum(match_pattern(entry, path) for path in paths)
    except re.error as error:
        msg = (
            f"{setting} holds {entry!r}, which must be a regular expression for a module's path or the end of it, and "
            f"is a broken one: {error}. Mend it; for text that is meant as it is use re.escape."
        )
        raise TargetError(msg) from error


def _correct_orientation(config: PeftConfig, targets: list[Target]) -> tuple[str, ...]:
    """Let a config that says how linear layers store their weights say it right; of a mixture the last one counts."""
    says = getattr(config, "fan_in_fan_out", None)
    linear = [] if says is None else [target for target in targets if is_linear(target.module)]
    if not linear or (is_so := is_transposed(linear[-1].module)) == says:
        return ()
    config.fan_in_fan_out = is_so  # type: ignore[attr-defined]
    kind = type(bare(linear[-1].module)).__name__
    stored = "in x out" if is_so else "out x in"
    return (f"fan_in_fan_out={says} does not hold for the targeted {kind}, which stores its weight {stored}",)


def _check_pattern(setting: str, wanted: str) -> None:
    try:
        re.compile(wanted)
    except re.error as error:
        msg = (
            f"{setting}={wanted!r} is text, so it is a regular expression for whole paths, and a broken one: {error}. "
            f"Mend it; for the name of a module pass a list, [{wanted!r}]."
        )
        raise TargetError(msg) from error


def _refuse_target_parameters(config: PeftConfig) -> None:
    if getattr(config, "target_parameters", None):
        msg = "target_parameters cannot be found from the keys of a state dict; attach by the config instead."
        raise TargetError(msg)


class _Matcher:
    """Asks the method about each module and counts what its entries matched."""

    def __init__(self, config: PeftConfig, chooser: Chooser, whole: WholeModules) -> None:
        self.config = config
        self.chooser = chooser
        self.whole = whole
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

    def only_in(self, paths: set[str]) -> None:
        """Decide by these paths alone, whatever the config says."""
        self.only = paths
        self.entries.clear()
        self.exclusions.clear()

    def decide(self, key: str, parameter: str | None) -> tuple[Verdict, str]:
        """Say whether a module is adapted, or one parameter of it, and why."""
        holder = self.whole.holder(key)
        if parameter is not None:
            key = f"{key}.{parameter}"
            named = match_name(self.parameters, key)
            reason = self._count(self.entries, named, key) if named else ""
            if named and holder:
                return "excluded", f"in {holder!r}, which is copied"
            return ("adapted" if named else "not matched"), reason
        if holder is not None:
            meant = self.only is None and match_name(getattr(self.config, "target_modules", None), key)
            if meant:
                self._count(self.entries, meant, key)
            if holder == key:
                return "copied", "modules_to_save"
            return ("excluded", f"in {holder!r}, which is copied") if meant else ("not matched", "")
        if self.only is not None:
            return ("adapted", "in the state dict") if key in self.only else ("not matched", "")
        found = self.chooser._check_target_module_exists(self.config, key)
        if found:
            return "adapted", self._count(self.entries, found, key)
        excluded = self.excluded and match_name(self.excluded, key)
        if excluded:
            # What is excluded was matched all the same: the entry is not one that means nothing.
            meant = match_name(getattr(self.config, "target_modules", None), key)
            if meant:
                self._count(self.entries, meant, key)
            return "excluded", self._count(self.exclusions, excluded, key)
        return "not matched", ""

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
