"""Which modules an adapter is to go to, and why: decided before anything is touched."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from tunerkit.advice import closest_to, nothing_matched
from tunerkit.config import PeftConfig
from tunerkit.errors import NoMatchingPeftModuleError, PluginError, TargetError, UnsupportedSiteError
from tunerkit.fast_path import ENCODERS
from tunerkit.layer import is_layer, stack_at
from tunerkit.matching import Chooser, Matcher, Verdict
from tunerkit.modules_to_save import WholeModules, tied_copies
from tunerkit.naming import listing
from tunerkit.patterns import count_patterns
from tunerkit.sites import make_site, site_class
from tunerkit.targeting import (
    ALL_LINEAR,
    all_linear,
    bare,
    correct_orientation,
    keys_in_state,
    parameter_places,
    place_of_parameter,
    places,
    places_and_bases,
    wants_all_linear,
)
from tunerkit.tying import modules_that_share, remarks_on_ties

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import nn

    from tunerkit.layer import BaseTunerLayer
    from tunerkit.modules_to_save import WholeModule
    from tunerkit.sites import Site
    from tunerkit.targeting import ModulePlace, Place
    from tunerkit.tying import Shared


class Decision(NamedTuple):
    """What was decided for one module, or for one parameter of it."""

    name: str
    module_type: str
    verdict: Verdict
    reason: str


class Target(NamedTuple):
    """A module that is to be adapted, with every place at which it stands.

    `tied_to` is the name of the target, earlier in the plan, with whose adapter its own is to share the tensors.
    """

    name: str
    module: nn.Module
    places: tuple[tuple[nn.Module, str], ...]
    parameter_name: str | None = None
    tied_to: str | None = None


@dataclass(frozen=True)
class Plan:
    """What attaching an adapter would do. Printed, it is a table.

    Attributes:
        config: The completed config.
        decisions: What was decided for each module, in the model's order.
        entries: For each entry of `target_modules` and `target_parameters`, how many modules it matched.
        exclusions: For each entry of `exclude_modules`, how many modules it matched.
        layers: For each number in `layers_to_transform` and each entry of `layers_pattern`, how many targeted modules
            are in such a layer.
        patterns: For each setting that gives single modules values by patterns (`rank_pattern`), how many of the
            adapted modules each of its entries fits.
        corrections: What was corrected in the config, in words.
        targets: The modules to adapt.
        copies: The modules of which the adapter gets copies that are trained and saved as a whole.
        unsaved: The entries of `modules_to_save` that matched nothing.
        ties: What is to be known of weights that modules share, in words.
        there: The layers with adapters that the model has already.
        encoders: Those of the modules that are torch's encoders.
    """

    config: PeftConfig
    decisions: tuple[Decision, ...]
    entries: dict[str, int]
    exclusions: dict[str, int]
    layers: dict[int | str, int]
    patterns: dict[str, dict[str, int]]
    corrections: tuple[str, ...]
    targets: tuple[Target, ...] = field(repr=False)
    copies: tuple[WholeModule, ...] = field(repr=False)
    unsaved: tuple[str, ...]
    ties: tuple[str, ...] = ()
    there: tuple[BaseTunerLayer, ...] = field(default=(), repr=False)
    encoders: tuple[nn.Module, ...] = field(default=(), repr=False)

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
        for layer in (entry for entry, count in self.layers.items() if not count):
            where = "layers_pattern" if isinstance(layer, str) else "layers_to_transform"
            sentences.append(f"{layer!r} in {where} matches no layer with targeted modules")
        unused = [
            (where, entry) for where, counts in self.patterns.items() for entry, count in counts.items() if not count
        ]
        adapted = [_settings_name(target) for target in self.targets] if unused else []
        return sentences + [
            f"{entry!r} in {where} fits no adapted module{closest_to(entry, adapted)}" for where, entry in unused
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
        return "\n".join([*lines, total, *self.unmatched(), *self.corrections, *self.ties])


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
    here, bases = places_and_bases(model)
    whole = WholeModules(here, config)
    matcher = Matcher(config, chooser, whole)
    if state_keys is not None:
        _refuse_target_parameters(config)
        matcher.only_in(keys_in_state(model, state_keys, entries, prefix))
    targets: dict[tuple[int, str | None], Target] = {}
    decisions: list[Decision] = []
    modules = ((*place, None, base) for place, base in zip(here, bases, strict=True))
    parameters = parameter_places(model) if getattr(config, "target_parameters", None) else ()
    along: dict[int, str] = {}
    within = ((*place, bare(place[1])) for place in parameters)
    for key, module, parent, name, parameter, base in itertools.chain(modules, within):
        verdict, reason = matcher.decide(key, parameter)
        if verdict == "not matched" and parameter is None and id(base) in along:
            verdict, reason = "adapted", along[id(base)]
        found = [(module, parent, name, parameter)]
        if verdict == "adapted" and parameter is None and (kind := _site_class(base, kinds)) is not None:
            _take_along(kind, base, key, along)
            found = [place_of_parameter(module, parent, name, own) for own in kind.parameters_of(base)] or found
        if verdict == "adapted":
            whole.check_free(key)
        for target in found:
            _note(targets, decisions, key, base, target, (verdict, reason))
    ties = _tied(here, bases, config, targets, decisions, whole)
    by_pattern = any(getattr(config, setting) for setting in config._patterns)
    plan = Plan(
        config,
        tuple(decisions),
        dict(matcher.entries),
        dict(matcher.exclusions),
        dict(matcher.layers),
        count_patterns(config, [_settings_name(target) for target in targets.values()] if by_pattern else []),
        correct_orientation(config, [target.module for target in targets.values() if target.parameter_name is None]),
        tuple(targets.values()),
        whole.modules,
        tuple(whole.unmatched()),
        tuple(ties),
        tuple(_layers_at(here, bases)),
        tuple(base for base in bases if base._modules and isinstance(base, ENCODERS)),
    )
    if not targets:
        raise NoMatchingPeftModuleError(nothing_matched(model, plan, state_keys is not None))
    return plan


def _layers_at(here: Sequence[ModulePlace], bases: Sequence[nn.Module]) -> list[BaseTunerLayer]:
    found: list[BaseTunerLayer] = []
    for (_, module, _, _), base in zip(here, bases, strict=True):
        if is_layer(module):
            # Most stand alone on their base layer, and to see that costs less than to walk down.
            alone = module._modules.get(module.base_name) is base
            found += (module,) if alone else stack_at(module)
    return found


def _site_class(module: nn.Module, kinds: Collection[str]) -> type[Site] | None:
    """Return the class of site that a module is, if it is one that the method adapts."""
    kind = site_class(type(module))
    return kind if kind is not None and kind.kind in kinds else None


def _take_along(kind: type[Site], module: nn.Module, key: str, along: dict[int, str]) -> None:
    """Note the children that are adapted along with a module, by their ids, with why.

    Raises:
        UnsupportedSiteError: The module is such a child itself, of one that is not adapted.
    """
    why_not = None if id(module) in along else kind.alone(module)
    if why_not is not None:
        msg = f"The module {key!r} ({type(module).__name__}) cannot be adapted: {why_not}."
        raise UnsupportedSiteError(msg)
    for child in kind.along:
        along[id(bare(module._modules[child]))] = f"with {key!r}"  # type: ignore[arg-type]


def _settings_name(target: Target) -> str:
    site = make_site(bare(target.module), target.name, target.parameter_name)
    return target.name if site is None else site.settings_name


def _note(
    targets: dict[tuple[int, str | None], Target],
    decisions: list[Decision],
    key: str,
    base: nn.Module,
    place: Place,
    decided: tuple[Verdict, str],
) -> None:
    """Note what was decided for a module, or for a parameter, at one of its places."""
    module, parent, name, parameter = place
    spot = id(base), parameter
    verdict, reason = decided
    if spot in targets:
        # What stands at several places gets one adapter, put at those of its places that are meant.
        known = targets[spot]
        if verdict == "adapted" and (parent, name) not in known.places:
            targets[spot] = known._replace(places=(*known.places, (parent, name)))
        return
    if verdict == "adapted":
        targets[spot] = Target(key, module, ((parent, name),), parameter)
    if parameter is None:
        decisions.append(Decision(key, type(base).__name__, verdict, reason))
    elif verdict == "adapted":
        decisions.append(Decision(f"{key}.{parameter}", "Parameter", verdict, reason))


def _tied(
    here: Sequence[ModulePlace],
    bases: Sequence[nn.Module],
    config: PeftConfig,
    targets: dict[tuple[int, str | None], Target],
    decisions: list[Decision],
    whole: WholeModules,
) -> list[str]:
    """Tie the targets that share a weight if the config asks for it; return what is to be known of such weights."""
    if not hasattr(config, "ensure_weight_tying"):
        return []
    shared = modules_that_share(here, bases)
    changed = {base for base, _ in targets} | {id(bare(one.module)) for one in whole.modules}
    for group in shared if tied_copies(config) else ():
        _tie(targets, decisions, group, whole)
    return remarks_on_ties(shared, changed, tied=tied_copies(config))


def _tie(
    targets: dict[tuple[int, str | None], Target], decisions: list[Decision], group: Shared, whole: WholeModules
) -> None:
    """Adapt all modules of a group if one of them is targeted, and tie them to the first."""
    first, *others = dict.fromkeys((id(bare(module)), None) for _, module, _, _ in group)
    if targets.keys().isdisjoint([first, *others]):
        return
    for key, module, parent, name in group:
        if (id(bare(module)), None) not in targets:
            whole.check_free(key)
            reason = f"shares its weight with {listing(other for other, _, _, _ in group if other != key)}"
            found = next(index for index, one in enumerate(decisions) if one.name == key)
            decisions[found] = decisions[found]._replace(verdict="adapted", reason=reason)
            targets[id(bare(module)), None] = Target(key, module, ((parent, name),))
    for spot in others:  # after what they are tied to
        targets[spot] = targets.pop(spot)._replace(tied_to=targets[first].name)


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


def _refuse_target_parameters(config: PeftConfig) -> None:
    if getattr(config, "target_parameters", None):
        msg = "target_parameters cannot be found from the keys of a state dict; attach by the config instead."
        raise TargetError(msg)
