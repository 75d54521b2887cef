"""What is installed, read from the metadata of the environment's packages without importing any of them."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from tunerkit.errors import ConfigError, PluginWarning
from tunerkit.naming import method_id
from tunerkit.plugins.allowlist import AllowList

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Kind = Literal["method", "extension", "sites"]

_GROUPS: dict[str, Kind] = {"tunerkit": "method", "tunerkit.extensions": "extension", "tunerkit.sites": "sites"}


@dataclass(frozen=True)
class Offer:
    """One plugin that somebody offers: a package by an entry point, or the program itself.

    Attributes:
        kind: Whether it is a method, an extension (hook wrappers for all methods) or sites (what the layers of another
            library are).
        name: The name it is offered under; of a method, its id; of sites, the name by which the library is imported.
        package: The package and its version and folder; None if the program registered the plugin.
        version: See `package`.
        path: See `package`.
        module: The module to import; None if the program registered the plugin.
        load: Imports the module and returns the plugin.
        requires: What the package asks for, as its metadata spells it.
    """

    kind: Kind
    name: str
    load: Callable[[], object] = field(compare=False)
    package: str | None = None
    version: str | None = None
    path: str | None = None
    module: str | None = None
    requires: tuple[str, ...] = field(default=(), compare=False)

    @property
    def source(self) -> str:
        """Who offers it, for messages: `tunerkit-ln-tuning 1.0`."""
        return "the program (tunerkit.register)" if self.package is None else f"{self.package} {self.version}"

    @property
    def id(self) -> str | None:
        """The method's id that the name spells, or None if it is no method's name."""
        try:
            return method_id(self.name)
        except ConfigError:
            return None


@dataclass(frozen=True)
class Scan:
    """What one look at the environment found."""

    offers: tuple[Offer, ...]
    allow_list: AllowList

    def methods(self, method: str) -> list[Offer]:
        """Return the offers of one method; more than one is a conflict."""
        return [offer for offer in self.offers if offer.kind == "method" and offer.id == method]

    def allowed(self, kind: Kind) -> list[Offer]:
        """Return the offers of a kind that the allow-list lets in."""
        return [offer for offer in self.offers if offer.kind == kind and self.allow_list.allows(offer.name)]


_last: Scan | None = None
_warned: set[str] = set()


def last_scan() -> Scan:
    """Return what the last scan found, scanning if there was none."""
    return _last or scan()


def scan() -> Scan:
    """Look at the metadata of all installed packages, and at the allow-list.

    Takes no lock, so a module may ask for the installed methods while it is imported.

    Warns:
        PluginWarning: The metadata of a package cannot be read, or the allow-list names what is not installed; once
            in a process for each folder or name.
    """
    global _last  # noqa: PLW0603 - one environment per process
    # A package installed a moment ago may not change a folder's time stamp, which the caches go by.
    importlib.invalidate_caches()
    unreadable: dict[str, str] = {}
    # The same package found twice on the path (an editable install, a stale .dist-info) is one package.
    offers = {(offer.kind, offer.package, offer.name): offer for offer in reversed(list(read_offers(unreadable)))}
    _last = Scan(tuple(sorted(offers.values(), key=lambda offer: (offer.name, str(offer.package)))), AllowList.read())
    messages = unreadable | _last.allow_list.unmatched(offer.name for offer in _last.offers)
    new = [msg for key, msg in messages.items() if key not in _warned]
    _warned.update(messages)
    for msg in new:
        warnings.warn(msg, PluginWarning, stacklevel=2)
    return _last


def read_offers(unreadable: dict[str, str]) -> Iterator[Offer]:
    """Yield every offer of every package on the path, in the path's order, also of further copies of one package.

    Args:
        unreadable: Takes a message for each package whose metadata cannot be read, by its folder.
    """
    import importlib_metadata  # noqa: PLC0415 - slow, and not needed to import tunerkit

    for distribution in importlib_metadata.distributions():
        try:
            text = distribution.read_text("entry_points.txt")
            if not text or "tunerkit" not in text:
                continue
            package = distribution.metadata["Name"].lower().replace("_", "-")
            path = str(distribution.locate_file(""))
            offers = [
                Offer(
                    kind=_GROUPS[entry_point.group],
                    name=entry_point.name,
                    load=entry_point.load,
                    package=package,
                    version=distribution.version,
                    path=path,
                    module=entry_point.module,
                    requires=tuple(distribution.requires or ()),
                )
                for entry_point in distribution.entry_points
                if entry_point.group in _GROUPS
            ]
        except Exception as error:  # noqa: BLE001 - the metadata is anybody's, and must not cost the other plugins
            path = str(distribution.locate_file(""))
            unreadable[path] = (
                f"The metadata of a package in {path} cannot be read ({type(error).__name__}: {error}), so its "
                "tunerkit plugins are not found. Reinstall the package."
            )
        else:
            yield from offers
