"""Which offer of a method is the one to use, or why there is none."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from tunerkit.errors import PluginError, UnknownMethodError
from tunerkit.naming import closest, listing, package_name, peft_type_name
from tunerkit.plugins.allowlist import VARIABLE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunerkit.plugins.discovery import Offer, Scan


def choose(method: str, scan: Scan, registered: Mapping[str, Offer]) -> Offer:
    """Return the one offer of a method.

    Args:
        method: The method's id.
        scan: What is installed.
        registered: What the program registered, by id; the allow-list does not concern it.

    Raises:
        UnknownMethodError: Nobody offers it.
        PluginError: Several do, or the allow-list leaves it out, or its package spells its name in another way.
    """
    installed = scan.methods(method)
    offers = [offer for offer in installed if scan.allow_list.allows(offer.name)]
    own = registered.get(method)
    if own is not None and not any(is_same(own.load(), offer) for offer in offers):
        offers.append(own)
    if len(offers) > 1:
        raise PluginError(conflict(method, offers))
    if not offers and installed:
        raise PluginError(not_allowed(installed[0], scan))
    if not offers:
        raise UnknownMethodError(_unknown(method, known(scan, registered)))
    if offers[0].name != method:
        raise PluginError(misnamed(offers[0]))
    return offers[0]


def known(scan: Scan, registered: Mapping[str, Offer]) -> list[str]:
    """Return the ids of the methods that can be asked for."""
    return sorted({offer.id for offer in scan.allowed("method") if offer.id} | registered.keys())


def is_same(plugin: object, offer: Offer) -> bool:
    """Say whether a plugin is the module that a package offers."""
    return offer.module is not None and sys.modules.get(offer.module) is plugin


def conflict(method: str, offers: list[Offer]) -> str:
    """Return the message for a method that several offer."""
    sources = " and ".join(offer.source for offer in offers)
    way = f"Uninstall one of them, for example with `pip uninstall {offers[-1].package}`."
    if offers[-1].package is None:
        way = f"Register yours under another name, or run `pip uninstall {offers[0].package}`."
    return f"The method {method!r} is offered by {sources}. {way}"


def not_allowed(offer: Offer, scan: Scan) -> str:
    """Return the message for a plugin that the allow-list leaves out."""
    allow_list = scan.allow_list
    return (
        f"The {offer.kind} {offer.name!r} is installed ({offer.source}), but {VARIABLE}={allow_list.text!r} leaves it "
        f"out. Set {allow_list.extended(offer.name)} to allow it."
    )


def misnamed(offer: Offer) -> str:
    """Return the message for an entry point whose name is not a method's id."""
    wanted = f"write {offer.id!r}" if offer.id else "use small letters, digits and single hyphens"
    return (
        f"{offer.source} offers a method as {offer.name!r} in its entry points, which is not a method's id: {wanted} "
        "there, and reinstall the package."
    )


def _unknown(method: str, possible: list[str]) -> str:
    near = closest(method, possible)
    hint = f" Did you mean {listing(near)}?" if near else ""
    return (
        f"No installed package offers the method {method!r} (peft_type {peft_type_name(method)!r}). Install the one "
        f"that does, by convention {package_name(method)}, or offer it yourself with tunerkit.register({method!r}, "
        f"plugin). Installed methods: {listing(possible)}.{hint}"
    )
