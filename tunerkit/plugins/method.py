"""What a method's plugin hands to the core."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunerkit.plugins.capabilities import Capabilities

if TYPE_CHECKING:
    from tunerkit.adapter import Adapter, Part
    from tunerkit.config import PeftConfig
    from tunerkit.tuner import BaseTuner


@dataclass(frozen=True)
class Method:
    """One method, as its package declares it in a module-level variable called `method`.

    Attributes:
        config: The method's config class.
        adapter: The method's adapter class, or several, of which each says in `kinds` what it adapts; not needed if the
            plugin makes its layers itself in `_create_and_replace`.
        part: The class of what an adapter of this method has once per model, if anything.
        tags: What a model card is tagged with for an adapter of this method, beside what every card has.
        tuner: The method's tuner class, with PEFT's `target_module_mapping`; plain `BaseTuner` if not given.
        api: The version of the contract the plugin was written for (`tunerkit.plugins.hooks.API_VERSION`).
        conformance: Where the class of checks for `tunerkit check` is, as `"module:Class"`, if the method cannot be
            checked with the default settings of its config.
    """

    config: type[PeftConfig]
    adapter: type[Adapter] | tuple[type[Adapter], ...] | None = None
    part: type[Part] | None = None
    tuner: type[BaseTuner] | None = None
    api: int = 1
    tags: tuple[str, ...] = ()
    conformance: str | None = None

    @functools.cached_property
    def adapters(self) -> tuple[type[Adapter], ...]:
        """The adapter classes; none if the plugin makes its layers itself."""
        if self.adapter is None:
            return ()
        return self.adapter if isinstance(self.adapter, tuple) else (self.adapter,)

    @functools.cached_property
    def capabilities(self) -> Capabilities:
        """What its adapters can do, as their classes declare it."""
        return Capabilities.of(self)

    @functools.cached_property
    def kinds(self) -> frozenset[str]:
        """The kinds of sites that the method adapts."""
        return frozenset(kind for adapter in self.adapters for kind in adapter.kinds)

    @functools.cached_property
    def entries(self) -> tuple[str, ...]:
        """The names of the entries in which its adapters hold their tensors, on any kind of site."""
        return tuple(dict.fromkeys(entry for adapter in self.adapters for entry in adapter.entries))

    def adapter_for(self, kind: str) -> type[Adapter]:
        """Return the adapter class for a kind of site: the first that adapts it.

        Args:
            kind: One of `kinds`.
        """
        return next(adapter for adapter in self.adapters if kind in adapter.kinds)
