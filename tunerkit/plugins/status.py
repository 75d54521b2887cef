"""How every plugin stands, as `tunerkit plugins` shows it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tunerkit.errors import TunerkitError
from tunerkit.plugins import discovery, loader
from tunerkit.plugins.choice import choose, is_same, misnamed, not_allowed

if TYPE_CHECKING:
    from tunerkit.plugins.capabilities import Capabilities
    from tunerkit.plugins.discovery import Kind, Offer, Scan

Status = Literal["not loaded", "loaded", "broken", "not allowed", "conflict"]


@dataclass(frozen=True)
class PluginInfo:
    """A plugin that is installed or registered.

    Attributes:
        method: The method's id, or the name of the extension, or of the library whose layers are taught.
        kind: `"method"`, `"extension"` for hook wrappers that take part in all methods, or `"sites"` for what says what
            the layers of another library are.
        package: The package that offers it; None if the program registered it.
        version: The version of that package.
        path: The folder that the package is in.
        status: How it stands in this process.
        reason: Why it cannot be used, if it cannot.
        capabilities: What the method can do; None of one that is not loaded, and of what is no method.
    """

    method: str
    kind: Kind
    package: str | None
    version: str | None
    path: str | None
    status: Status
    reason: str = ""
    capabilities: Capabilities | None = None


def installed() -> list[PluginInfo]:
    """Return what is known of every plugin, importing none: where it comes from, and whether it can be used.

    Returns:
        For each its `method`, `kind`, `package`, `version` and `path`, its `status` (`"loaded"`, `"not loaded"`,
        `"broken"`, `"not allowed"` or `"conflict"`), and the `reason` if it cannot be used.
    """
    scan = discovery.scan()
    offers = [offer for offer in (*scan.offers, *loader.registered.values()) if not _is_doubled(offer, scan)]
    rows = []
    for offer in sorted(offers, key=lambda offer: (offer.kind != "method", offer.name, offer.source)):
        status, reason = _method_status(offer, scan) if offer.kind == "method" else _extension_status(offer, scan)
        is_loaded = offer.kind == "method" and status == "loaded"
        rows.append(
            PluginInfo(
                offer.name,
                offer.kind,
                offer.package,
                offer.version,
                offer.path,
                status,
                reason,
                loader.loaded[offer.name].method.capabilities if is_loaded else None,
            )
        )
    return rows


def load_all() -> list[PluginInfo]:
    """Try to load every plugin that is allowed, and return how every plugin stands afterwards."""
    loader.load_extensions()
    for method in loader.method_ids():
        with contextlib.suppress(TunerkitError):  # The reason is in the status.
            loader.get_method(method)
    for library in {offer.name for offer in discovery.last_scan().allowed("sites")}:
        loader.load_sites(library)
    return installed()


def _is_doubled(offer: Offer, scan: Scan) -> bool:
    # What is registered may be the module of an installed package, which then stands for both.
    return offer.package is None and any(is_same(offer.load(), other) for other in scan.methods(offer.name))


def _method_status(offer: Offer, scan: Scan) -> tuple[Status, str]:
    if offer.id != offer.name:
        return "broken", misnamed(offer)
    found = loader.loaded.get(offer.name)
    if found is not None and found.distribution == offer.package:
        return "loaded", ""
    if offer.package is not None and not scan.allow_list.allows(offer.name):
        return "not allowed", not_allowed(offer, scan)
    try:
        choose(offer.name, scan, loader.registered)
    except TunerkitError as error:
        return "conflict", str(error)
    if offer.name in loader.failures:
        return "broken", loader.failures[offer.name].reason
    return "not loaded", ""


def _extension_status(offer: Offer, scan: Scan) -> tuple[Status, str]:
    if not scan.allow_list.allows(offer.name):
        return "not allowed", not_allowed(offer, scan)
    for extension in (*loader.extensions, *loader.sites):
        if extension.offer == offer:
            failure = extension.failure
            return ("loaded", "") if failure is None else ("broken", failure.reason)
    return "not loaded", ""
