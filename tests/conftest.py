"""What tests of several rooms share."""

from __future__ import annotations

import sys

import importlib_metadata
import pytest

from tunerkit.plugins import discovery, hooks, loader

PLUGIN = """
from dataclasses import dataclass
from tunerkit.adapter import Adapter
from tunerkit.config import PeftConfig
from tunerkit.plugins.hooks import hookimpl
from tunerkit.plugins.method import Method

@dataclass
class Config(PeftConfig):
    peft_type: str | None = "{peft_type}"

method = Method(config=Config, adapter=Adapter)
"""


class DefaultHooks:
    """Stands in for the core's defaults, which need torch."""

    def __init__(self, method, declared):
        self.method = method

    @hooks.hookimpl(trylast=True)
    def _prepare_adapter_config(self, peft_config, model_config):
        return ["core", self.method]

    @hooks.hookimpl(trylast=True)
    def _check_target_module_exists(self, peft_config, key):
        return ["core", key]

    @hooks.hookimpl(trylast=True)
    def _create_and_replace(self, parameter_name):
        return ["core", parameter_name]


class Environment:
    """A folder on `sys.path` into which packages are installed: a module and its metadata."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()

    def install(self, package, source=None, *, version="1.0", name=None, entries=None, before="", after=""):
        """Install a package and return the name of its module.

        Without `source` it is a working plugin for the method that the package's name says, with some source `before`
        and `after`; `name` and `entries` change what its entry points say.
        """
        module = package.replace("-", "_")
        method = package.removeprefix("tunerkit-")
        if source is None:
            source = before + PLUGIN.replace("{peft_type}", method.replace("-", "_").upper()) + after
        (self.folder / f"{module}.py").write_text(source, encoding="utf-8")
        self.describe(package, version=version, entries=entries or f"[tunerkit]\n{name or method} = {module}\n")
        return module

    def describe(self, package, *, entries, version="1.0"):
        """Write the metadata of a package alone."""
        info = self.folder / f"{package.replace('-', '_')}-{version}.dist-info"
        info.mkdir(exist_ok=True)
        text = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        (info / "METADATA").write_text(text, encoding="utf-8")
        (info / "entry_points.txt").write_text(entries, encoding="utf-8")


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """An environment of its own, in which nothing is installed, and a loader that has loaded nothing."""
    place = Environment(tmp_path / "site")
    everything = importlib_metadata.distributions
    monkeypatch.setattr(importlib_metadata, "distributions", lambda: everything(path=[str(place.folder)]))
    monkeypatch.setattr(sys, "path", [str(place.folder), *sys.path])
    monkeypatch.delenv("TUNERKIT_PLUGINS", raising=False)
    for name in ("registered", "loaded", "failures"):
        monkeypatch.setattr(loader, name, {})
    monkeypatch.setattr(loader, "extensions", [])
    monkeypatch.setattr(loader, "sites", [])
    monkeypatch.setattr(loader, "_extensions_loaded", False)
    monkeypatch.setattr(loader, "_failed_modules", set())
    monkeypatch.setattr(loader, "_default_hooks", DefaultHooks)
    monkeypatch.setattr(discovery, "_last", None)
    monkeypatch.setattr(discovery, "_warned", set())
    before = set(sys.modules)
    yield place
    for name in set(sys.modules) - before:
        if str(place.folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
