"""Finding names of a class that look like words of the contract and are none."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import TYPE_CHECKING

from tunerkit.naming import closest

if TYPE_CHECKING:
    from tunerkit.adapter import Adapter, Part

_ALIKE = 0.8
_CORE = "tunerkit"


def misspelt(kind: type[Adapter | Part]) -> dict[str, str]:
    """Return the names of a class that look like words of the contract, each with the word.

    What the class's own code uses is a helper of its own. Where there is no source, nothing is found.

    Args:
        kind: A class of adapters or a class of parts.
    """
    core: list[type] = []
    own: list[type] = []
    for one in kind.__mro__:
        if one.__module__.startswith("torch"):
            break
        (core if one.__module__.partition(".")[0] == _CORE else own).append(one)
    words = sorted({name for one in core for name in vars(one) if not name.startswith("_")})
    names = {name for one in own for name in vars(one) if not name.startswith("_") and not hasattr(core[0], name)}
    near = {name: found for name in sorted(names) for found in closest(name, words, count=1, cutoff=_ALIKE)}
    # Their source is read only where something looks wrong.
    used = _used(own) if near else set()
    return {name: word for name, word in near.items() if name not in used}


def _used(kinds: list[type]) -> set[str]:
    """Return the names of all attributes that the code of some classes speaks of."""
    used: set[str] = set()
    for kind in kinds:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
        except (OSError, TypeError):
            return set(dir(kind))
        used.update(node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return used
