"""What a plugin must be before it is used; each function raises `PluginError` with the reason alone."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import TYPE_CHECKING, Any

import pluggy

from tunerkit.errors import PluginError
from tunerkit.naming import closest, listing, peft_type_name
from tunerkit.plugins import hooks
from tunerkit.plugins.hooks import API_VERSION, PROJECT
from tunerkit.plugins.method import Method

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_NAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def new_manager() -> pluggy.PluginManager:
    """Return a plugin manager that knows the hooks and holds no plugin."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hooks)
    return manager


def check_method(method: str, plugin: object) -> Method:
    """Return what a plugin declares as its method.

    Args:
        method: The method's id.
        plugin: The module or object.

    Raises:
        PluginError: It is not a plugin, was written for another version, or contradicts the id.
    """
    if inspect.isclass(plugin):
        msg = f"the plugin is the class {plugin.__qualname__}. Give an instance of it, or a module."
        raise PluginError(msg)
    found = getattr(plugin, "method", None)
    if not isinstance(found, Method):
        what = f"is of type {type(found).__name__}" if hasattr(plugin, "method") else "is missing"
        msg = f"its attribute `method` {what}. Declare `method = tunerkit.Method(config=...)` in the plugin."
        raise PluginError(msg)
    _check_api(found.api)
    _check_config(method, found.config)
    if not (found.adapter or found.part or found.tuner or "_create_and_replace" in answered_hooks(plugin)):
        msg = (
            "nothing in it makes an adapter. Give `Method` an `adapter` (or a `part` or a `tuner`), or implement "
            "`_create_and_replace`."
        )
        raise PluginError(msg)
    _check_classes(found)
    return found


def _check_api(api: object) -> None:
    oldest = max(1, API_VERSION - 1)
    if type(api) is not int:
        msg = f"its `Method.api` is {api!r}. Give the version it was written for, an integer; now it is {API_VERSION}."
        raise PluginError(msg)
    if not oldest <= api <= API_VERSION:
        supported = str(API_VERSION) if oldest == API_VERSION else f"{oldest} and {API_VERSION}"
        side = "tunerkit" if api > API_VERSION else "the plugin"
        msg = f"it was written for version {api} of the plugin API and tunerkit has {supported}. Upgrade {side}."
        raise PluginError(msg)


def _check_config(method: str, config: object) -> None:
    from tunerkit.config import PeftConfig  # noqa: PLC0415 - listing plugins does without it

    if not (inspect.isclass(config) and issubclass(config, PeftConfig)):
        msg = f"its `Method.config` is {config!r}. Give a subclass of tunerkit.PeftConfig."
        raise PluginError(msg)
    default = next(field.default for field in dataclasses.fields(config) if field.name == "peft_type")
    wanted = peft_type_name(method)
    if default != wanted:
        found = "no default" if default is dataclasses.MISSING else f"the default {default!r}"
        msg = (
            f"it is offered as {method!r}, and the field `peft_type` of {config.__qualname__} has {found}. Write "
            f"`peft_type: str | None = {wanted!r}` in the class, under the decorator @dataclass, or offer the method "
            "under its own name."
        )
        raise PluginError(msg)


def _check_classes(method: Method) -> None:
    from tunerkit.adapter import Adapter, Part  # noqa: PLC0415 - above this room, and it needs torch

    adapters: tuple[object, ...] = method.adapters
    parts: tuple[object, ...] = () if method.part is None else (method.part,)
    for field, found, wanted in (("adapter", adapters, Adapter), ("part", parts, Part)):
        for one in found:
            if not (inspect.isclass(one) and issubclass(one, wanted)):
                whole = f"{wanted.__module__}.{wanted.__name__}"
                msg = f"its `Method.{field}` is or holds {one!r}. Give a subclass of {whole}."
                raise PluginError(msg)


def check_hooks(plugin: object, *, only_wrappers: bool = False) -> None:
    """Refuse hooks that would never be called, or not as their author meant.

    Args:
        plugin: The module or object.
        only_wrappers: Whether it is an extension, whose hooks must not answer in place of the methods'.

    Raises:
        PluginError: A hook is misspelt, unmarked, or has arguments that it would not get.
    """
    specs = hook_arguments()
    for name, function, options in _hook_functions(plugin):
        label = f"`{function.__name__}`"
        if name not in specs:
            if options["optionalhook"]:
                continue
            near = closest(name, specs, count=1)
            hint = f"Did you mean `{near[0]}`?" if near else f"The hooks are {listing(specs)}."
            msg = f"there is no hook `{name}`, which {label} implements. {hint}"
            raise PluginError(msg)
        _check_arguments(label, function, specs[name])
        wrapper = options["wrapper"] or options["hookwrapper"]
        if only_wrappers and not wrapper:
            msg = f"its hook {label} would answer in place of every method. Mark it with `@hookimpl(wrapper=True)`."
            raise PluginError(msg)
        if not wrapper and (inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function)):
            msg = f"its hook {label} gives a generator or coroutine. Return the result, or mark it as a wrapper."
            raise PluginError(msg)
    for name in specs:
        if hasattr(plugin, name) and new_manager().parse_hookimpl_opts(plugin, name) is None:
            msg = f"its `{name}` is named like a hook but is not marked as one. Put `@tunerkit.hookimpl` above it."
            raise PluginError(msg)
    try:
        new_manager().register(plugin, "plugin")
    except pluggy.PluginValidationError as error:
        msg = f"one of its hooks cannot be used: {' '.join(str(error).split())}."
        raise PluginError(msg) from error


def check_wrappers(plugin: object) -> None:
    """Refuse an extension whose hooks would answer in place of the methods'; see `check_hooks`."""
    check_hooks(plugin, only_wrappers=True)


def check_sites(plugin: object) -> None:
    """Refuse a module that does not say what the layers of a library are."""
    found = getattr(plugin, "sites", None)
    if not isinstance(found, dict) or not all(inspect.isclass(site) for site in found.values()):
        msg = (
            "its attribute `sites` must be a dict from types of layers, or their full names, to classes of "
            f"tunerkit.sites.Site; it is {found!r}."
        )
        raise PluginError(msg)


@functools.cache
def hook_arguments() -> dict[str, list[str]]:
    """Return the hooks and the names of their arguments."""
    relay = vars(new_manager().hook)
    return {name: list(inspect.signature(getattr(hooks, name)).parameters) for name in relay}


def answered_hooks(plugin: object) -> set[str]:
    """Return the names of the hooks that a plugin answers itself; a wrapper leaves the answer to others."""
    return {name for name, _, options in _hook_functions(plugin) if not (options["wrapper"] or options["hookwrapper"])}


def _hook_functions(plugin: object) -> Iterator[tuple[str, Callable[..., Any], Mapping[str, Any]]]:
    manager = new_manager()
    for attribute in dir(plugin):
        options = manager.parse_hookimpl_opts(plugin, attribute)
        if options is not None:
            yield options["specname"] or attribute, getattr(plugin, attribute), options


def _check_arguments(label: str, function: Callable[..., Any], possible: list[str]) -> None:
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in _NAMED:
            # pluggy passes positional arguments only: these would stay empty or at their defaults without a word.
            msg = f"its hook {label} takes `{parameter}` by keyword only or as a rest, which hooks are not given. "
            msg += f"Name the arguments it wants, without `*`: {', '.join(possible)}."
            raise PluginError(msg)
        if parameter.name not in possible:
            near = closest(parameter.name, possible, count=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            msg = f"its hook {label} has the argument {parameter.name!r}. {hint}Possible are: {', '.join(possible)}."
            raise PluginError(msg)
