"""Plugins that are wrong, each a few lines away from a right one; `WRONG` is the table of them all."""

from __future__ import annotations

from testing.wrong import files, hooks, layers, maths, routes, state, surroundings, traces
from testing.wrong.table import WRONG, Wrong

__all__ = ["WRONG", "Wrong", "files", "hooks", "layers", "maths", "routes", "state", "surroundings", "traces"]
