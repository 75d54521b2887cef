"""`SSFConfig`: the settings of an adapter."""

from __future__ import annotations

from dataclasses import dataclass

from tunerkit.config import PeftConfig


@dataclass
class SSFConfig(PeftConfig):
    """What an adapter goes to, and how large it is.

    Attributes:
        target_modules: The modules to adapt: names or their last parts, a regex that fits the whole name, or
            `"all-linear"`.
        exclude_modules: Modules to leave alone though they are targeted: names or their last parts, or a regex.
        modules_to_save: Modules to train and save as a whole, a copy for each adapter: names or their last parts.

    Raises:
        ConfigError: A setting has the wrong type or is out of range.
    """

    peft_type: str | None = "SSF"
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None
