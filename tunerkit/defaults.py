"""What a method does where its plugin does not say otherwise: the core's answers to the three hooks."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from tunerkit.adapted_layer import AdaptedLayer
from tunerkit.errors import TargetError, UnsupportedSiteError
from tunerkit.naming import listing, method_id
from tunerkit.plugins.hooks import hookimpl
from tunerkit.sites import Site, in_words, make_site, site_class
from tunerkit.targeting import bare, match_target, places

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Iterable, Mapping

    from torch import nn

    from tunerkit.adapter import Adapter
    from tunerkit.config import Config, PeftConfig
    from tunerkit.plugins.method import Method


class DefaultHooks:
    """The core's implementations of the hooks for one method.

    Only those are registered that the method's plugin does not implement itself; a plugin that wants to build on them
    calls them.

    Args:
        method_id: The id of the method.
        method: What its plugin declares.
    """

    def __init__(self, method_id: str, method: Method) -> None:
        self.method_id = method_id
        self.method = method

    @hookimpl(trylast=True)
    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        """Fill in the target modules by the model's type."""
        mapping = self.method.tuner.target_module_mapping if self.method.tuner is not None else {}
        return fill_target_modules(peft_config, model_config, mapping, self.method_id)

    @hookimpl(trylast=True)
    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> str | re.Match[str] | None:
        """Match names, suffixes and patterns as PEFT does."""
        return match_target(peft_config, key)

    @hookimpl(trylast=True)
    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        target: nn.Module,
        current_key: str,
        parameter_name: str | None,
    ) -> Adapter:
        """Make the method's adapter for the site."""
        if not self.method.adapters:
            msg = f"The plugin of {self.method_id!r} declares no adapter class and no _create_and_replace of its own."
            raise UnsupportedSiteError(msg)
        site = find_site(self.method, peft_config, target, current_key, parameter_name)
        return self.method.adapter_for(site.kind)(site, peft_config)


def fill_target_modules(
    peft_config: Config, model_config: dict[str, Any], mapping: Mapping[str, Iterable[str] | str], method_id: str
) -> Config:
    """Set a config's target modules by the model's type, if the config does not say what to target.

    Args:
        peft_config: The config; it is changed and returned.
        model_config: The model's own config.
        mapping: The default target modules by the model's type.
        method_id: The id of the method, for the message.

    Raises:
        TargetError: Nothing is targeted, and there is no default for the model's type.
    """
    chosen = any(getattr(peft_config, name, None) is not None for name in ("target_modules", "target_parameters"))
    if chosen or not hasattr(peft_config, "target_modules"):
        return peft_config
    model_type: Any = model_config.get("model_type")
    if model_type not in mapping:
        msg = (
            f"target_modules is not set, and {method_id!r} has no default for models of the type {model_type!r} "
            f"(it has for {listing(sorted(mapping))}). Set target_modules to names of modules, a pattern, or "
            "'all-linear'."
        )
        raise TargetError(msg)
    targets = mapping[model_type]
    peft_config.target_modules = targets if isinstance(targets, str) else set(targets)
    return peft_config


def find_site(
    method: Method, peft_config: PeftConfig, target: nn.Module, current_key: str, parameter_name: str | None
) -> Site:
    """Return the site for which `_create_and_replace` is to make an adapter, from what it is called with.

    Args:
        method: What the plugin declares.
        peft_config: The completed config.
        target: The module at that place; it may be a layer with adapters.
        current_key: Its path in the model.
        parameter_name: The parameter that is adapted, if it is not the whole module.

    Returns:
        The bare layer's site, of one of `method.kinds`.

    Raises:
        UnsupportedSiteError: The module is of a kind that the method does not adapt, or cannot be adapted at all.
    """
    name = method_id(str(peft_config.peft_type))
    by_default = functools.partial(_targets_by_default, method, peft_config)
    return site_of(target, current_key, parameter_name, method.kinds, name, by_default=by_default)


def _targets_by_default(method: Method, peft_config: PeftConfig) -> bool:
    """Return whether what a config targets is what the method targets by default in some model."""
    mapping = method.tuner.target_module_mapping if method.tuner is not None else {}
    chosen = getattr(peft_config, "target_modules", None)
    return any(chosen == (names if isinstance(names, str) else set(names)) for names in mapping.values())


def site_of(
    target: nn.Module,
    key: str,
    parameter_name: str | None,
    kinds: frozenset[str],
    method_id: str,
    *,
    by_default: Callable[[], bool] = lambda: False,
) -> Site:
    """Return the bare site at a place, or say why a method cannot adapt it.

    Args:
        target: The module that is there; it may be a layer with adapters.
        key: Its path.
        parameter_name: The parameter to adapt, if it is not the whole module.
        kinds: The kinds of sites that the method adapts.
        method_id: The id of the method, for the message.
        by_default: Says whether it is the method's default targets that name the module, for the message.

    Raises:
        UnsupportedSiteError: The module is of a kind that the method does not adapt, or cannot be adapted at all.
    """
    base = target
    if isinstance(target, AdaptedLayer):
        if target.parameter_name == parameter_name and target.site.kind in kinds:
            return target.bare_site
        if parameter_name is None:
            base = target.get_base_layer()
    site = make_site(base, key, parameter_name)
    if site is not None and site.kind in kinds:
        reason = type(site).takes(base)
        if reason is None and parameter_name is None and base is not target:
            reason = f"its parameter {target.parameter_name!r} is adapted by itself"
        if reason is None:
            return site
        msg = f"The module {key!r} ({type(base).__name__}) cannot be adapted: {reason}."
        raise UnsupportedSiteError(msg)
    inside = [
        path
        for path, child, _, _ in places(base, key)
        if (kind := site_class(type(bare(child)))) is not None and kind.kind in kinds
    ]
    hint = "Remove it from target_modules, or exclude it."
    if inside:
        hint = f"It contains {listing(inside, 4)}: target those."
    elif by_default():
        hint = (
            f"It is one of the default targets of {method_id!r} for models of this type, which this version cannot "
            "adapt yet. Set target_modules to other modules, if the model has any that can be adapted."
        )
    modules = in_words(kinds - {"parameter"} or kinds) if parameter_name is None else in_words(kinds)
    msg = f"The module {key!r} is a {type(base).__name__}, and {method_id!r} adapts {modules} only. {hint}"
    raise UnsupportedSiteError(msg)
