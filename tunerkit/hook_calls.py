"""The three methods of a tuner that call its method's hooks, and whether a class overrides them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunerkit.layer import MethodMeta
from tunerkit.plugins import LoadedMethod, get_method

if TYPE_CHECKING:
    import re
    from collections.abc import Callable

    from torch import nn

    from tunerkit.adapter import Adapter
    from tunerkit.config import PeftConfig


class HookCalls:
    """What a tuner asks a method, each by a method that a method's own class may override."""

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        answer = self._method_of(peft_config).caller("_prepare_adapter_config")
        return answer(peft_config, model_config)  # type: ignore[no-any-return]

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> str | re.Match[str] | bool | None:
        answer = self._method_of(peft_config).caller("_check_target_module_exists")
        return answer(peft_config, key)  # type: ignore[no-any-return]

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> Adapter | nn.Module | bool | None:
        answer = self._method_of(peft_config).caller("_create_and_replace")
        return answer(  # type: ignore[no-any-return]
            peft_config, adapter_name, target, target_name, parent, current_key, parameter_name
        )

    def caller(self, name: str, config: PeftConfig) -> Callable[..., Any]:
        """Return what answers for a config's method under a hook's name, to be called for each module of a model.

        It takes the hook's arguments in their order.
        """
        if getattr(type(self), name) is not _OWN[name]:
            return getattr(self, name)  # type: ignore[no-any-return]
        return self._method_of(config).caller(name)

    def _method_of(self, config: PeftConfig) -> LoadedMethod:
        return get_method(str(config.peft_type))


_HOOKS = ("_prepare_adapter_config", "_check_target_module_exists", "_create_and_replace")
_OWN = {name: vars(HookCalls)[name] for name in _HOOKS}
"""The methods as they are here: what replaces one of them in this class is called too."""


def declared_method(kind: type) -> str | None:
    """Return the id of the method whose class a tuner's class is or comes from."""
    return next((base._method for base in kind.__mro__ if isinstance(base, MethodMeta) and base._method), None)


def overrides_hooks(kind: type) -> bool:
    """Return whether a tuner's class overrides one of the methods that call the hooks."""
    return any(getattr(kind, name) is not getattr(HookCalls, name) for name in _HOOKS)
