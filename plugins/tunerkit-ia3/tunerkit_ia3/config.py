"""`IA3Config`: the settings of an (IA)³ adapter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeGuard

from tunerkit.config import PeftConfig
from tunerkit.errors import ConfigError
from tunerkit.naming import listing, shown

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass
class IA3Config(PeftConfig):
    """What an (IA)³ adapter rescales: a layer's outputs, or its inputs where the layer is a feed-forward one.

    All fields of PEFT's class are here, so that its files can be read.

    Attributes:
        target_modules: The modules to adapt: names or their last parts, a regex that fits the whole name, or
            `"all-linear"`. If not given, what the type of a transformers model calls for.
        exclude_modules: Modules to leave alone though they are targeted: names or their last parts, or a regex.
        feedforward_modules: Those of the targeted modules whose input is rescaled rather than the output: names or
            their endings, or a regex. If not given, what the type of a transformers model calls for. If this and
            `target_modules` are lists, each entry must be able to mean a targeted module.
        fan_in_fan_out: Whether the weights are stored in x out. The layer knows; a value that is wrong for the targeted
            layers is corrected in the completed config, with a `ConfigWarning`.
        modules_to_save: Modules to train and save as a whole, a copy for each adapter: names or their last parts.
        init_ia3_weights: Whether the factors start at one, so that training starts from the base model; otherwise they
            are drawn from a normal distribution, for tests.

    Raises:
        ConfigError: A setting has the wrong type, or a feed-forward module is not among the targeted ones.
    """

    peft_type: str | None = "IA3"
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    feedforward_modules: list[str] | set[str] | str | None = None
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_ia3_weights: bool = True

    _sets: ClassVar[tuple[str, ...]] = ("target_modules", "exclude_modules", "feedforward_modules")

    def check(self) -> None:
        """Check every field, and that feed-forward modules can mean targeted ones; see `PeftConfig.check`.

        Raises:
            ConfigError: A setting has the wrong type, or a feed-forward module is not among the targeted ones.
        """
        super().check()
        if isinstance(self.feedforward_modules, str):
            try:
                re.compile(self.feedforward_modules)
            except re.error as error:
                msg = (
                    f"IA3Config.feedforward_modules={shown(self.feedforward_modules)} must be a pattern for a module's "
                    f"path, and is a broken one: {error}. Mend it, or pass a list of names."
                )
                raise ConfigError(msg) from error
        if not (isinstance(self.target_modules, set) and isinstance(self.feedforward_modules, set)):
            return
        stray = self.feedforward_modules - among(self.target_modules, self.feedforward_modules)
        if stray:
            msg = (
                f"IA3Config.feedforward_modules holds {listing(sorted(stray))}, which can mean none of target_modules: "
                f"{listing(sorted(self.target_modules))}. Add the modules to target_modules, or leave them out here."
            )
            raise ConfigError(msg)

    def is_feedforward(self, name: str) -> bool:
        """Return whether a module is a feed-forward layer, by its path."""
        entries = self.feedforward_modules
        if isinstance(entries, str):
            return re.fullmatch(entries, name) is not None
        return name.endswith(tuple(entries or ()))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> IA3Config:
        """Make a config from a checkpoint's values, without feed-forward modules that mean no targeted module.

        Raises:
            ConfigError: A setting is wrong, or is unknown and matters.
        """
        targets, feedforward = values.get("target_modules"), values.get("feedforward_modules")
        if _are_names(targets) and _are_names(feedforward):
            # PEFT adds those of the model's type, targeted or not, and then refuses to read the file it wrote.
            values = {**values, "feedforward_modules": among(targets, feedforward)}
        return super().from_dict(values)


def _are_names(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def among(targets: Iterable[str], entries: Iterable[str]) -> set[str]:
    """Return those entries that can mean a targeted module: `mlp.down_proj` and `proj` can, if `down_proj` is one."""
    targets = tuple(targets)
    return {entry for entry in entries if entry.endswith(targets) or any(target.endswith(entry) for target in targets)}
