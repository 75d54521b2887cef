"""Packages that say what the layers of another library are: entry points of the group `tunerkit.sites`."""

import sys

import pytest
from torch import nn

from tunerkit import plugins, sites
from tunerkit.errors import PluginError, PluginWarning
from tunerkit.plugins import load_all
from tunerkit.sites import LinearSite, make_site, register_site, site_class

LIBRARY = """
from torch import nn
class Layer(nn.Module): pass
class Sub(Layer): pass
class Other(nn.Module): pass
"""
TEACHER = """
import acme
from tunerkit.sites import LinearSite
class LayerSite(LinearSite): pass
sites = {acme.Layer: LayerSite, "acme.Other": LayerSite}
"""


@pytest.fixture
def acme(environment, monkeypatch):
    """A library with layers, imported."""
    for name in ("_SITES", "_TAUGHT", "_FOUND"):
        monkeypatch.setattr(sites, name, dict(getattr(sites, name)) if name == "_SITES" else {})
    environment.install("acme", LIBRARY, entries="[other]\nx = acme\n")
    return __import__("acme")


def install(environment, package="acme-sites", source=TEACHER):
    return environment.install(package, source, entries=f"[tunerkit.sites]\nacme = {package.replace('-', '_')}\n")


def row(name="acme"):
    (info,) = [info for info in plugins.installed() if info.method == name]
    return info.kind, info.status, info.reason


def test_imported_when_a_layer_of_the_library_is_met(environment, acme):
    install(environment)
    assert site_class(nn.Linear) is LinearSite
    assert row() == ("sites", "not loaded", "")
    assert "acme_sites" not in sys.modules
    assert [site_class(kind).__name__ for kind in (acme.Layer, acme.Sub, acme.Other)] == ["LayerSite"] * 3
    assert row() == ("sites", "loaded", "")
    assert make_site(acme.Layer(), "path").name == "path"


def test_without_a_package(environment, acme):
    assert site_class(acme.Layer) is None


def test_found_when_it_is_installed_later(environment, acme):
    assert site_class(acme.Layer) is None
    install(environment)
    plugins.refresh()
    assert site_class(acme.Layer).__name__ == "LayerSite"


def test_what_the_program_says_comes_first(environment, acme):
    install(environment)
    register_site(acme.Layer, LinearSite)
    assert site_class(acme.Sub) is LinearSite


def test_a_broken_one_warns_once_and_costs_only_itself(environment, acme):
    install(environment, source="1 / 0")
    with pytest.warns(PluginWarning, match=r"What acme-sites 1\.0 says of the layers of 'acme' is left out: importing"):
        assert site_class(acme.Layer) is None
    assert site_class(acme.Other) is None
    assert row()[:2] == ("sites", "broken")
    install(environment)
    plugins.refresh()
    assert site_class(acme.Layer).__name__ == "LayerSite"


@pytest.mark.parametrize("source", ["", "sites = [1]", "sites = {'acme.Layer': 'LinearSite'}"])
def test_one_that_says_nothing(environment, acme, source):
    install(environment, source=source)
    with pytest.warns(PluginWarning, match="its attribute `sites` must be a dict from types of layers, or their full"):
        assert site_class(acme.Layer) is None


def test_two_that_say_what_one_type_is(environment, acme):
    install(environment)
    other = "from tunerkit.sites import LinearSite\nsites = {'acme.Other': LinearSite}"
    install(environment, "acme-more", other)
    assert site_class(acme.Layer).__name__ == "LayerSite"
    with pytest.raises(PluginError, match=r"^acme-more 1\.0 and acme-sites 1\.0 both say what a Other is\. Uni"):
        site_class(acme.Other)


def test_allow_list(environment, acme, monkeypatch):
    install(environment)
    monkeypatch.setenv("TUNERKIT_PLUGINS", "")
    assert site_class(acme.Layer) is None
    assert row()[1] == "not allowed"


def test_loaded_with_all_others(environment, acme):
    install(environment)
    assert [(info.method, info.status) for info in load_all()] == [("acme", "loaded")]
