"""The three hooks through which a method takes part, and the markers to declare and implement them.

A method's plugin is a module (or any object) that may hold functions of these names marked with `hookimpl`. Only the
plugin of the method that was asked for is called, and the core's defaults answer every hook that it leaves out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import re

    from torch import nn

    from tunerkit.adapter import Adapter
    from tunerkit.config import PeftConfig

PROJECT = "tunerkit"
API_VERSION = 1
"""Version of the hooks and of the contract in `tunerkit.adapter`; plugins of it and of the one before are accepted."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a plugin's function as its answer to the hook of its name; with `wrapper=True`, as what runs around answers."""


@hookspec(firstresult=True)
def _prepare_adapter_config(peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:  # type: ignore[empty-body]
    """Complete a config for a model.

    Called once per adapter, before any module is looked at. The default fills in `target_modules` from the tuner
    class's `target_module_mapping` by the model's `model_type`.

    Args:
        peft_config: A copy of the user's config; it may be changed and returned.
        model_config: The model's own config as a dict; `{"model_type": "custom"}` for a model without one.

    Returns:
        The completed config.
    """


@hookspec(firstresult=True)
def _check_target_module_exists(peft_config: PeftConfig, key: str) -> str | re.Match[str] | bool | None:
    """Say whether the config targets a module.

    Called while planning, once for each module. The default matches names, suffixes and patterns as PEFT does.

    Args:
        peft_config: The completed config.
        key: The module's path in the model.

    Returns:
        Something falsy, or what matched: the entry of `target_modules`, the match of the pattern, or just True.
    """


@hookspec(firstresult=True)
def _create_and_replace(  # type: ignore[empty-body]
    peft_config: PeftConfig,
    adapter_name: str,
    target: nn.Module,
    target_name: str,
    parent: nn.Module,
    current_key: str,
    parameter_name: str | None = None,
) -> Adapter | nn.Module:
    """Make the adapter for one targeted module.

    Called once for each targeted module after planning. The default makes the method's adapter class.

    Args:
        peft_config: The completed config.
        adapter_name: The adapter's name.
        target: The module at that place: the plain layer, or the tuner layer that other adapters put there.
        target_name: Its name in `parent`.
        parent: The module that holds it.
        current_key: Its path in the model.
        parameter_name: The parameter of `target` that is adapted, if it is one parameter rather than the module.

    Returns:
        The adapter, which the core puts in place; or, if the hook replaced the module itself, the new module.
    """
