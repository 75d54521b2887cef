"""The allow-list: the environment variable `TUNERKIT_PLUGINS`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunerkit.naming import closest, listing

if TYPE_CHECKING:
    from collections.abc import Iterable

VARIABLE = "TUNERKIT_PLUGINS"


@dataclass(frozen=True)
class AllowList:
    """The installed plugins that may be imported.

    It guards against code that happens to be installed. A plugin that the program itself registers is the program's
    own code and is not asked about.

    Attributes:
        text: The variable as it was found; None if it is not set, which allows everything, and empty to allow nothing.
    """

    text: str | None

    @classmethod
    def read(cls) -> AllowList:
        """Return the allow-list that the environment holds now."""
        return cls(os.environ.get(VARIABLE))

    @property
    def names(self) -> list[str]:
        """The names on the list, as they are written there."""
        return [name.strip() for name in (self.text or "").split(",") if name.strip()]

    def allows(self, name: str) -> bool:
        """Say whether the installed plugin of that name may be imported."""
        return self.text is None or _fold(name) in map(_fold, self.names)

    def extended(self, name: str) -> str:
        """Return the setting that allows a plugin too, for a message."""
        return f"{VARIABLE}={','.join([*self.names, name])}"

    def unmatched(self, installed: Iterable[str]) -> dict[str, str]:
        """Return the names on the list that are not installed, each with a message.

        Args:
            installed: The names of all installed plugins.
        """
        known = {_fold(name): name for name in installed}
        messages = {}
        for name in self.names:
            if _fold(name) not in known:
                near = [known[key] for key in closest(_fold(name), known)]
                hint = f"Did you mean {listing(near)}?" if near else f"Installed: {listing(known.values())}."
                messages[name] = f"{VARIABLE} names {name!r}, and no installed plugin is called that. {hint}"
        return messages


def _fold(name: str) -> str:
    # Looser than naming.method_id, because extensions may be called anything.
    return name.strip().lower().replace("_", "-").removeprefix("tunerkit-")
