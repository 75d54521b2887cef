"""What is installed, what is wrong with it and what to do, as `tunerkit doctor` shows it."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunerkit.errors import ConfigError, PluginError, PluginWarning
from tunerkit.plugins import discovery, get_method, load_all
from tunerkit.plugins.allowlist import VARIABLE, AllowList

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tunerkit.plugins import PluginInfo
    from tunerkit.plugins.discovery import Kind, Offer

_PACKAGES = ("tunerkit", "torch", "safetensors", "transformers", "peft")


@dataclass(frozen=True)
class Candidate:
    """One copy of a package that offers a plugin.

    Attributes:
        kind: Whether the plugin is a method, an extension, or sites for a library's layers.
        name: The name in the package's entry points.
        package: The package.
        version: Its version.
        path: The folder that its metadata is in.
        module: The module that its entry point names.
        imported_from: The file that the module's outermost package comes from; None if there is none.
    """

    kind: Kind
    name: str
    package: str | None
    version: str | None
    path: str | None
    module: str | None
    imported_from: str | None


@dataclass(frozen=True)
class Diagnosis:
    """What one look at everything found.

    Attributes:
        versions: Of Python and the packages that matter here; None for one that is not installed.
        candidates: Every copy of every package that offers a plugin, in the order of the path.
        environment: The settings that matter here, each with what it is and does.
        devices: The devices that PyTorch sees.
        problems: What is wrong, each with what to do.
    """

    versions: dict[str, str | None]
    candidates: list[Candidate]
    environment: dict[str, str]
    devices: list[str]
    problems: list[str]


def diagnose() -> Diagnosis:
    """Look at everything that decides which methods there are, and load every plugin that is allowed."""
    unreadable: dict[str, str] = {}
    offers = list(discovery.read_offers(unreadable))
    with warnings.catch_warnings():
        # Said below, and also where the process has warned of it before.
        warnings.simplefilter("ignore", PluginWarning)
        rows = load_all()
    packages = dict.fromkeys([*_PACKAGES, *(offer.package for offer in offers if offer.package)])
    versions: dict[str, str | None] = {"Python": platform.python_version()}
    versions |= {package: _version(package) for package in packages}
    problems = [
        *unreadable.values(),
        *AllowList.read().unmatched(offer.name for offer in offers).values(),
        *_unusable(rows),
        *_copies(offers),
        *_unsatisfied(offers, versions["tunerkit"]),
    ]
    return Diagnosis(
        versions=versions,
        candidates=[_candidate(offer) for offer in offers],
        environment=_environment(),
        devices=_devices(),
        problems=list(dict.fromkeys(problems)),
    )


def _version(package: str) -> str | None:
    import importlib_metadata  # noqa: PLC0415 - slow, as in `discovery`

    try:
        return importlib_metadata.version(package)
    except importlib_metadata.PackageNotFoundError:
        return None


def _candidate(offer: Offer) -> Candidate:
    imported_from = None if offer.module is None else _origin(offer.module.partition(".")[0])
    return Candidate(offer.kind, offer.name, offer.package, offer.version, offer.path, offer.module, imported_from)


def _origin(module: str) -> str | None:
    try:
        spec = importlib.util.find_spec(module)
    except ValueError:  # an imported module that says nothing of where it comes from
        return None
    return None if spec is None else spec.origin


def _unusable(rows: Iterable[PluginInfo]) -> Iterator[str]:
    for row in rows:
        if row.status not in {"broken", "conflict"}:
            continue
        if row.kind != "method":
            what = f"The extension {row.method!r}" if row.kind == "extension" else f"What is said of {row.method!r}"
            yield f"{what} is left out: {row.reason} Mend, reinstall or remove {row.package}."
            continue
        try:
            get_method(row.method)
        except PluginError as error:  # which says what to do beside the reason
            yield str(error)
        except ConfigError:  # the name is none that could be asked for
            yield row.reason


def _copies(offers: Iterable[Offer]) -> Iterator[str]:
    copies: dict[str, dict[str, str]] = {}
    for offer in offers:
        copies.setdefault(str(offer.package), {}).setdefault(str(offer.version), str(offer.path))
    for package, paths in copies.items():
        if len(paths) > 1:
            found = " and ".join(f"{version} in {path}" for version, path in paths.items())
            yield (
                f"{package} is there in several versions, {found}, and what is imported may be another than what is "
                f"listed. Run `pip uninstall {package}` until none is left (in a folder of PYTHONPATH, remove it by "
                "hand), then install one."
            )


def _unsatisfied(offers: Iterable[Offer], version: str | None) -> Iterator[str]:
    from packaging.requirements import InvalidRequirement, Requirement  # noqa: PLC0415 - only this needs it

    for offer in offers:
        for text in offer.requires:
            try:
                wanted = Requirement(text)
            except InvalidRequirement:
                yield f"{offer.source} (in {offer.path}) requires {text!r}, which is no requirement. Reinstall it."
                continue
            if wanted.name.lower() != "tunerkit" or not (wanted.marker is None or wanted.marker.evaluate()):
                continue
            if version is not None and not wanted.specifier.contains(version, prereleases=True):
                yield (
                    f"{offer.source} (in {offer.path}) requires tunerkit{wanted.specifier}, and tunerkit {version} is "
                    f"installed. Run `pip install --upgrade {offer.package} tunerkit`, which finds versions that go "
                    "together if there are any."
                )


def _environment() -> dict[str, str]:
    listed = AllowList.read()
    found = {
        "virtual environment": sys.prefix if sys.prefix != sys.base_prefix else f"none: {sys.prefix} is the system's",
        "PYTHONPATH": os.environ.get("PYTHONPATH") or "not set",
        VARIABLE: f"{listed.text!r}: only these may be imported: {', '.join(listed.names) or 'none'}",
    }
    if listed.text is None:
        found[VARIABLE] = "not set: every installed method may be imported"
    others = {name for name in os.environ if name.startswith("TUNERKIT_")} - found.keys()
    return found | {name: f"{os.environ[name]!r}: tunerkit does not read it" for name in sorted(others)}


def _devices() -> list[str]:
    import torch  # noqa: PLC0415 - slow, and all else here does without it

    devices = ["cpu"]
    for kind, there in (("cuda", torch.cuda), ("xpu", torch.xpu)):
        devices += [f"{kind}:{number} {there.get_device_name(number)}" for number in range(there.device_count())]
    return [*devices, "mps"] if torch.backends.mps.is_available() else devices
