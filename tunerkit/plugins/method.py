"""What a method's plugin hands to the core."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tunerkit.adapter import Adapter, Part
    from tunerkit.config import PeftConfig
    from tunerkit.tuner import BaseTuner


@dataclass(frozen=True)
class Method:
    """One method, as its package declares it in a module-level variable called `method`.

    Attributes:
        config: The method's config class.
        adapter: The method's adapter class; not needed if the plugin makes its layers itself in `_create_and_replace`.
        part: What an adapter of this method has once per model, if anything.
        tuner: The method's tuner class, with PEFT's `target_module_mapping`; plain `BaseTuner` if not given.
        api: The version of the contract the plugin was written for (`tunerkit.plugins.hooks.API_VERSION`).
    """

    config: type[PeftConfig]
    adapter: type[Adapter] | None = None
    part: type[Part] | None = None
    tuner: type[BaseTuner] | None = None
    api: int = 1
