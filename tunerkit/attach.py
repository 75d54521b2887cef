"""Carrying out a plan: every adapter is made by its method and put in place, and every step is noted in the journal."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunerkit.adapted_layer import AdaptedLayer
from tunerkit.adapter import Adapter, Part
from tunerkit.defaults import site_of
from tunerkit.errors import PluginError, UnsupportedSiteError
from tunerkit.layer import BaseTunerLayer, is_layer
from tunerkit.modules import frozen_keys, modules_in, tensors_in
from tunerkit.names import withdraw
from tunerkit.naming import method_id
from tunerkit.patterns import hold_settings
from tunerkit.sites import make_on_meta, make_site

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from tunerkit.journal import Journal
    from tunerkit.plan import Plan, Target
    from tunerkit.route import Owner


@dataclass(frozen=True, slots=True)
class Newcomer:
    """An adapter that is being put into a model: what is the same at each of its targets.

    Attributes:
        name: Its name.
        method: The id of its method.
        layer_class: The method's layer class.
        owner: Stands for the model in the layers.
        part: What it has once per model, if its method has that.
        meta: Whether its tensors are made on the meta device.
        upcast: Whether those of lower precision are made float32.
        trains: Whether it trains.
    """

    name: str
    method: str
    layer_class: type[BaseTunerLayer]
    owner: Owner
    part: Part | None
    meta: bool
    upcast: bool
    trains: bool


@hold_settings
def attach(
    create: Callable[..., object], plan: Plan, newcomer: Newcomer, journal: Journal, *, via_hook: bool
) -> tuple[list[AdaptedLayer], list[BaseTunerLayer]]:
    """Make an adapter at each target of a plan and put it in place; it is not active yet.

    Args:
        create: Makes the adapter for one target: the `_create_and_replace` of the method's tuner.
        plan: What goes where.
        newcomer: The adapter.
        journal: Where every step is noted before it is taken.
        via_hook: Whether `create` asks the method's hook, which must return what it did; an override need not.

    Returns:
        The layers that hold the adapter now: those on which all is settled, and those whose adapter may hold tensors of
        low precision or of which the method has said itself whether they train: of other classes than the core's own,
        or joined with a part.
    """
    make = functools.partial(_attach, create, plan, newcomer, journal, via_hook=via_hook)
    return make_on_meta(make) if newcomer.meta else make()


def _attach(
    create: Callable[..., object], plan: Plan, newcomer: Newcomer, journal: Journal, *, via_hook: bool
) -> tuple[list[AdaptedLayer], list[BaseTunerLayer]]:
    name, part = newcomer.name, newcomer.part
    layers: list[AdaptedLayer] = []
    others: list[BaseTunerLayer] = []
    adapters: dict[str, object] = {}
    for planned in plan.targets:
        target = planned if planned.parameter_name is None else _as_it_stands(planned)
        parent, child = target.places[0]
        journal.note_module(parent)
        _note_reachable(target.module, name, journal)
        made = create(plan.config, name, target.module, child, parent, target.name, target.parameter_name)
        adapters[target.name] = made
        if isinstance(made, Adapter):
            if target.tied_to is not None:
                made.tie(adapters[target.tied_to])
            layer = _put_in_place(made, target, newcomer)
            if part is not None:
                made.join(part)
        else:
            layer = _find_what_was_done(made, target, newcomer, via_hook=via_hook)
        for other_parent, other_child in target.places[1:]:
            journal.note_module(other_parent)
            other_parent._modules[other_child] = layer  # type: ignore[assignment]
        if isinstance(made, Adapter) and part is None and type(layer) is AdaptedLayer:
            layers.append(layer)
        else:
            others.append(layer)
    return layers, others


def _as_it_stands(target: Target) -> Target:
    """Return a target with what is at its place now: for a parameter, the layer that adapts another of its module."""
    parent, child = target.places[0]
    now = parent._modules[child]
    return target if now is None else target._replace(module=now)


def _note_reachable(module: nn.Module, name: str, journal: Journal) -> None:
    """Note what a method may change at a target; the core's own layers keep the adapters apart from it."""
    while module._modules and isinstance(module, AdaptedLayer):
        # Undone last, when the adapters are those of before: the entries name those that have buffers unsaved.
        journal.note(withdraw, module, module._adapters)
        # Not all its adapters: there may be a thousand, and all that comes is one.
        journal.note_module(module, apart=module._adapters)
        journal.note_item(module._adapters, name)
        module = module._modules["base_layer"]  # type: ignore[assignment]
    for one in modules_in(module) if module._modules else (module,):
        journal.note_module(one)


def make_part(kind: type[Part], plan: Plan, kinds: frozenset[str], *, meta: bool) -> Part:
    """Make what an adapter has once per model, from all the sites of its plan."""
    method = method_id(str(plan.config.peft_type))
    sites = [site_of(target.module, target.name, target.parameter_name, kinds, method) for target in plan.targets]
    make = functools.partial(kind, sites, plan.config)
    part = make_on_meta(make) if meta else make()
    part.__dict__["_frozen"] = frozen_keys(part, tensors_in(part))
    return part


def _put_in_place(adapter: Adapter, target: Target, newcomer: Newcomer) -> BaseTunerLayer:
    parent, child = target.places[0]
    if parent._modules.get(child) is not target.module:
        msg = (
            f"The plugin of {newcomer.method!r} replaced the module {target.name!r} and also returned an Adapter for "
            "it, so it would be wrapped twice. Return the new module, or leave the replacing to the core."
        )
        raise PluginError(msg)
    layer = target.module
    # What has no children is none, and that needs no answer in Python.
    if not layer._modules or not isinstance(layer, AdaptedLayer) or layer.parameter_name != target.parameter_name:
        site = make_site(layer, target.name, target.parameter_name)
        if site is None:
            msg = (
                f"The module {target.name!r} is a {type(layer).__name__}, for which there is no site, so an Adapter "
                "cannot stand on it. Teach one with tunerkit.sites.register_site, or replace the module in "
                "_create_and_replace."
            )
            raise UnsupportedSiteError(msg)
        layer = AdaptedLayer(site, newcomer.owner)
    if layer.site.read and adapter.unfoldable is not None:
        msg = (
            f"{target.name!r} cannot be adapted by {newcomer.method!r}: its parameters are read by the code around it, "
            f"so an adapter must have a merged form, and this one has none ({adapter.unfoldable})."
        )
        raise UnsupportedSiteError(msg)
    layer.add_adapter(
        newcomer.name,
        adapter,
        newcomer.method,
        newcomer.layer_class,
        upcast=newcomer.upcast,
        trains=newcomer.trains,
    )
    parent._modules[child] = layer
    return layer


def _find_what_was_done(made: object, target: Target, newcomer: Newcomer, *, via_hook: bool) -> BaseTunerLayer:
    name, method = newcomer.name, newcomer.method
    parent, child = target.places[0]
    now: object = parent._modules.get(child)
    replaced = now is not target.module
    if is_layer(now) and now.holds(name):
        if not via_hook or made is now:
            return now
        msg = (
            f"The hook _create_and_replace of {method!r} replaced the module {target.name!r} and returned {made!r}. "
            "Return the new module, so that the core knows the replacing was meant."
        )
        raise PluginError(msg)
    done = f"replaced it by a {type(now).__name__} without an adapter {name!r}" if replaced else "replaced nothing"
    msg = (
        f"_create_and_replace of {method!r} returned {made!r} for the module {target.name!r} and {done}. It must "
        "return an Adapter, or put a layer that is a BaseTunerLayer and holds the adapter in the module's place and "
        "return that."
    )
    raise PluginError(msg)
