"""Loading: one plugin at a time, when its method is first asked for.

A method that is loaded stays as it is until the process ends. One that cannot be loaded costs only itself: the reason
is kept, and raised whenever that method is asked for.
"""

from __future__ import annotations

import contextlib
import operator
import os
import sys
import threading
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tunerkit.errors import PluginError, PluginWarning, UnknownMethodError
from tunerkit.naming import listing, method_id
from tunerkit.plugins import discovery
from tunerkit.plugins.checks import (
    answered_hooks,
    check_hooks,
    check_method,
    check_sites,
    check_wrappers,
    hook_arguments,
    new_manager,
)
from tunerkit.plugins.choice import choose, conflict, is_same, known
from tunerkit.plugins.discovery import Offer

if TYPE_CHECKING:
    from collections.abc import Callable

    import pluggy

    from tunerkit.plugins.method import Method


@dataclass(frozen=True, eq=False)
class LoadedMethod:
    """A method that is ready for use.

    A copy, and what comes out of a pickle, is the method as loaded in that process.

    Attributes:
        id: The method's id.
        plugin: The plugin: a module, or the object that was registered.
        method: What the plugin declares.
        manager: Holds the plugin, the core's defaults for what it leaves out, and the extensions.
        distribution: The package that offers it; None if the program registered it.
        version: The version of that package.
    """

    id: str
    plugin: object
    method: Method
    manager: pluggy.PluginManager
    distribution: str | None = None
    version: str | None = None

    @property
    def hook(self) -> pluggy.HookRelay:
        """The hooks, to be called with keyword arguments."""
        return self.manager.hook

    def caller(self, name: str) -> Callable[..., Any]:
        """Return a hook as a function that takes all of its arguments by position, for code that calls it often.

        Where one function answers, it is called without pluggy's loop.

        Args:
            name: The hook's name.
        """
        hook: pluggy.HookCaller = getattr(self.manager.hook, name)
        names, answers = hook_arguments()[name], hook.get_hookimpls()
        if len(answers) > 1 or answers[0].wrapper or answers[0].hookwrapper:
            return lambda *arguments: hook(**dict(zip(names, arguments, strict=True)))
        function, places = answers[0].function, [names.index(argument) for argument in answers[0].argnames]
        if len(places) < 2:  # noqa: PLR2004 - an itemgetter of one gives that itself, not a tuple
            return lambda *arguments: function(*[arguments[place] for place in places])
        taken = operator.itemgetter(*places)
        return lambda *arguments: function(*taken(arguments))

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return get_method, (self.id,)


@dataclass(frozen=True)
class Failure:
    """Why a plugin cannot be used.

    Attributes:
        reason: In words.
        cause: What was raised, with its traceback, if something was.
    """

    reason: str
    cause: BaseException | None


@dataclass(frozen=True)
class Extension:
    """An extension, or sites for a library, that were loaded or could not be.

    Attributes:
        offer: Who offers it.
        plugin: The module or object; None after a failure.
        failure: Why it is left out, if it is.
    """

    offer: Offer
    plugin: object
    failure: Failure | None = None


# By method id, for this process; `status` reads them.
registered: dict[str, Offer] = {}
loaded: dict[str, LoadedMethod] = {}
failures: dict[str, Failure] = {}
extensions: list[Extension] = []
sites: list[Extension] = []

_extensions_loaded = False
_failed_modules: set[str] = set()
_loading: list[str] = []

# Held while a plugin is imported. Listing and registering take no lock, so that an import may do both.
_lock = threading.RLock()
if hasattr(os, "register_at_fork"):
    # A child must not find a plugin half imported by a thread that it does not have.
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def get_method(name: str) -> LoadedMethod:
    """Return a method, loading its plugin if need be.

    Args:
        name: Any spelling of the method's name: its id, its `peft_type`, its package.

    Raises:
        UnknownMethodError: No installed package offers the method.
        PluginError: The plugin is broken or not allowed, or two packages offer the method.
        ConfigError: The text is no method's name.
    """
    method = method_id(name)
    found = loaded.get(method)
    if found is None:
        with _lock:
            found = loaded.get(method) or _load(method)
            loaded[method] = found
    return found


def register(name: str, plugin: object) -> None:
    """Offer a method without installing a package: in a notebook, a test, or a program's own code.

    The allow-list `TUNERKIT_PLUGINS` is not asked. Child processes that start afresh must register it again.

    Args:
        name: The method's name.
        plugin: A module or an object (not a class) with an attribute `method` and, if it needs any, hooks.

    Raises:
        PluginError: It is not a plugin, or the name is taken by another one.
        ConfigError: The text is no method's name.
    """
    method = method_id(name)
    offer = Offer("method", method, lambda: plugin)
    installed = [other for other in discovery.scan().allowed("method") if other.id == method]
    if installed and not any(is_same(plugin, other) for other in installed):
        raise PluginError(conflict(method, [*installed, offer]))
    try:
        check_method(method, plugin)
        check_hooks(plugin)
    except PluginError as error:
        msg = f"The plugin for the method {method!r} cannot be registered: {error}"
        raise PluginError(msg) from error.__cause__
    failures.pop(method, None)
    # One step, so of two threads that register different plugins one is told.
    if registered.setdefault(method, offer).load() is not plugin:
        msg = (
            f"Another plugin is registered for the method {method!r}. Register this one under another name, or call "
            f"tunerkit.plugins.unregister({method!r}) first."
        )
        raise PluginError(msg)


def unregister(name: str) -> None:
    """Take back a `register`, as tests and notebooks do; models that use the method keep it.

    Raises:
        UnknownMethodError: No plugin is registered for the method.
        ConfigError: The text is no method's name.
    """
    method = method_id(name)
    if registered.pop(method, None) is None:
        msg = f"No plugin is registered for the method {method!r}; registered are: {listing(registered)}."
        raise UnknownMethodError(msg)
    loaded.pop(method, None)
    failures.pop(method, None)


def refresh() -> None:
    """Look at the installed packages again and forget what failed, after a package was installed or mended.

    A method that is loaded stays as it is: start Python anew to use another version of it.
    """
    global _extensions_loaded  # noqa: PLW0603 - one environment per process
    with _lock:
        # A failed check leaves the module imported, and importing it again would find the old one.
        for name in [name for name in sys.modules if any(f"{name}.".startswith(f"{bad}.") for bad in _failed_modules)]:
            del sys.modules[name]
        _failed_modules.clear()
        failures.clear()
        sites[:] = [taught for taught in sites if taught.failure is None]
        _extensions_loaded = False
        discovery.scan()


def method_ids() -> list[str]:
    """Return the ids of the methods that can be asked for, importing nothing."""
    return known(discovery.last_scan(), registered)


def _load(method: str) -> LoadedMethod:
    if method in _loading:
        msg = f"The plugin of the method {method!r} asks for its own method while it is imported. Ask for it later."
        raise PluginError(msg)
    offer = _find(method)
    if method not in failures:
        load_extensions()
        if method in loaded:  # by an extension that asked for it
            return loaded[method]
        _loading.append(method)
        try:
            return _build(method, offer)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - whatever a plugin does costs only itself
            failures[method] = _failure(offer, error)
        finally:
            _loading.remove(method)
    failure = failures[method]
    msg = f"The method {method!r} of {offer.source} cannot be used: {failure.reason}"
    if offer.package is not None:
        msg += f" Mend or reinstall {offer.package} (in {offer.path}), then start Python anew or call "
        msg += "tunerkit.plugins.refresh()."
    raise PluginError(msg) from failure.cause


def _find(method: str) -> Offer:
    with contextlib.suppress(PluginError, UnknownMethodError):
        return choose(method, discovery.last_scan(), registered)
    # It may have been installed, removed or allowed since.
    return choose(method, discovery.scan(), registered)


def _build(method: str, offer: Offer) -> LoadedMethod:
    plugin = _import(offer)
    declared = check_method(method, plugin)
    check_hooks(plugin)
    manager = new_manager()
    defaults = _default_hooks(method, declared)
    # A hook that returns None has answered; with a default behind it, pluggy would go on to that.
    left = hook_arguments().keys() - answered_hooks(plugin)
    manager.register(SimpleNamespace(**{name: getattr(defaults, name) for name in left}), "tunerkit")
    manager.register(plugin, method)
    for extension in extensions:
        # One module may be a method and an extension, and pluggy takes an object once.
        if extension.failure is None and not manager.is_registered(extension.plugin):
            manager.register(extension.plugin, f"{extension.offer.name} of {extension.offer.source}")
    return LoadedMethod(method, plugin, declared, manager, offer.package, offer.version)


def _default_hooks(method: str, declared: Method) -> object:
    from tunerkit.defaults import DefaultHooks  # noqa: PLC0415 - above this room, and it needs torch

    return DefaultHooks(method, declared)


def load_extensions() -> None:
    """Load the extensions, if that has not been done; it is done before the first method is loaded.

    Warns:
        PluginWarning: An extension cannot be used; the others are.
    """
    global _extensions_loaded  # noqa: PLW0603 - one environment per process
    with _lock:
        if _extensions_loaded:
            return
        # Set first: an extension whose import asks for a method gets that method without the extensions still to come.
        _extensions_loaded = True
        kept = {extension.offer: extension for extension in extensions if extension.failure is None}
        extensions.clear()
        try:
            offers = discovery.last_scan().allowed("extension")
            extensions.extend(kept.get(offer) or _load_extension(offer, check_wrappers) for offer in offers)
        except KeyboardInterrupt:
            _extensions_loaded = False
            raise
        for extension in extensions:
            if extension.failure is not None:
                msg = (
                    f"The extension {extension.offer.name!r} of {extension.offer.source} is left out: "
                    f"{extension.failure.reason} Mend, reinstall or remove the package."
                )
                warnings.warn(msg, PluginWarning, stacklevel=4)


def load_sites(library: str) -> list[Extension]:
    """Return the packages that say what the layers of a library are, each with an attribute `sites`.

    They are imported when the first of these layers is met.

    Args:
        library: The name by which the library is imported.

    Warns:
        PluginWarning: A package cannot be used; the others are.
    """
    with _lock:
        for offer in discovery.last_scan().allowed("sites"):
            if offer.name != library or any(taught.offer == offer for taught in sites):
                continue
            taught = _load_extension(offer, check_sites)
            sites.append(taught)
            if taught.failure is not None:
                msg = (
                    f"What {offer.source} says of the layers of {library!r} is left out: {taught.failure.reason} Mend, "
                    "reinstall or remove the package."
                )
                warnings.warn(msg, PluginWarning, stacklevel=4)
        return [taught for taught in sites if taught.offer.name == library and taught.failure is None]


def _load_extension(offer: Offer, check: Callable[[object], None]) -> Extension:
    try:
        plugin = _import(offer)
        check(plugin)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - whatever a plugin does costs only itself
        return Extension(offer, None, _failure(offer, error))
    return Extension(offer, plugin)


def _import(offer: Offer) -> object:
    try:
        return offer.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # Also SystemExit: a plugin that calls sys.exit() must not end the program.
        msg = f"importing {offer.module} raised {_describe(error)}"
        if isinstance(error, ModuleNotFoundError) and error.name == offer.module:
            msg = f"its module {offer.module} is not there, though the package's metadata is."
        raise PluginError(msg) from error


def _failure(offer: Offer, error: BaseException) -> Failure:
    if offer.module is not None:
        _failed_modules.add(offer.module)
    if isinstance(error, PluginError):
        return Failure(str(error), error.__cause__)
    return Failure(f"loading it raised {_describe(error)}", error)


def _describe(error: BaseException) -> str:
    """Return an error as the end of a sentence, with one full stop, whether its own words end in one or not."""
    words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return words if words.endswith((".", "!", "?")) else f"{words}."
