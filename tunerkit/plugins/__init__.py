"""The door through which methods come in: finding, checking and loading their plugins."""

from __future__ import annotations

from tunerkit.plugins.capabilities import Absence, Capabilities
from tunerkit.plugins.loader import LoadedMethod, get_method, method_ids, refresh, register, unregister
from tunerkit.plugins.status import PluginInfo, installed, load_all

__all__ = [
    "Absence",
    "Capabilities",
    "LoadedMethod",
    "PluginInfo",
    "get_method",
    "installed",
    "load_all",
    "method_ids",
    "refresh",
    "register",
    "unregister",
]
