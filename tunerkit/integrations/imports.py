"""Acting on a module once it is imported, without importing it."""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_waiting: dict[str, Callable[[ModuleType], None]] = {}
_acted_on: dict[str, ModuleType] = {}


def after_import(name: str, act: Callable[[ModuleType], None]) -> None:
    """Call a function with a module: now if it is imported already, otherwise right after it is; never twice.

    Args:
        name: The module's full name.
        act: The function; what it raises comes out of the import.
    """
    module = sys.modules.get(name)
    if module is None:
        _waiting[name] = act
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
    elif _acted_on.get(name) is not module:
        _acted_on[name] = module
        act(module)


class _Finder(MetaPathFinder):
    """Finds the modules that are waited for, where the others find them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _waiting:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(Loader):
    """Loads a module as its own loader does, and then acts on it."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        # The module is to know its own loader: that gives its source and its resources.
        module.__loader__ = self.own
        if module.__spec__ is not None:
            module.__spec__.loader = self.own
        self.own.exec_module(module)
        _acted_on[module.__name__] = module
        _waiting.pop(module.__name__)(module)
