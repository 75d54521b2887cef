"""Asking a method about each module of a model, and counting what the entries of its config matched."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal, Protocol

from tunerkit.errors import TargetError
from tunerkit.targeting import LayerChoice, endings, match_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from tunerkit.config import PeftConfig
    from tunerkit.modules_to_save import WholeModules

Verdict = Literal["adapted", "excluded", "copied", "not matched"]


class Chooser(Protocol):
    """Who answers for a method: the tuner whose hooks or overriding methods are asked."""

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig: ...

    def caller(self, name: str, config: PeftConfig) -> Callable[..., Any]:
        """Return what answers under a hook's name, as a function of the hook's arguments in their order."""


class Matcher:
    """Asks the method about each module and counts what its entries matched."""

    def __init__(self, config: PeftConfig, chooser: Chooser, whole: WholeModules) -> None:
        self.config = config
        self.check = chooser.caller("_check_target_module_exists", config)
        self.whole = whole
        self.only: set[str] | None = None
        self.excluded = getattr(config, "exclude_modules", None)
        self.parameters = frozenset(getattr(config, "target_parameters", None) or ())
        self.entries: Counter[str] = Counter()
        self.exclusions: Counter[str] = Counter()
        for counter, setting in ((self.entries, "target_modules"), (self.exclusions, "exclude_modules")):
            wanted = getattr(config, setting, None)
            if isinstance(wanted, str):
                _check_pattern(setting, wanted)
            counter.update(dict.fromkeys([wanted] if isinstance(wanted, str) else sorted(wanted or ()), 0))
        self.entries.update(dict.fromkeys(sorted(self.parameters), 0))
        self.has_paths = any("." in entry for entry in (*self.entries, *self.exclusions))
        self.choice = LayerChoice.of(config)
        self.layers: Counter[int | str] = Counter()
        if self.choice is not None:
            _check_layer_patterns(self.choice)
            self.layers.update(dict.fromkeys((*self.choice.numbers, *self.choice.patterns), 0))

    def only_in(self, paths: set[str]) -> None:
        """Decide by these paths alone, whatever the config says."""
        self.only = paths
        self.entries.clear()
        self.exclusions.clear()
        self.layers.clear()

    def decide(self, key: str, parameter: str | None) -> tuple[Verdict, str]:
        """Say whether a module is adapted, or one parameter of it, and why."""
        holder = self.whole.holder(key)
        if parameter is not None:
            key = f"{key}.{parameter}"
            named = match_name(self.parameters, key)
            reason = self._count(self.entries, named, key) if named else ""
            if named and holder:
                return "excluded", f"in {holder!r}, which is copied"
            return ("adapted" if named else "not matched"), reason
        if holder is not None:
            meant = self.only is None and match_name(getattr(self.config, "target_modules", None), key)
            if meant:
                self._count(self.entries, meant, key)
            if holder == key:
                return "copied", "modules_to_save"
            return ("excluded", f"in {holder!r}, which is copied") if meant else ("not matched", "")
        if self.only is not None:
            return ("adapted", "in the state dict") if key in self.only else ("not matched", "")
        found = self.check(self.config, key)
        if found:
            self._count_layer(key)
            return "adapted", self._count(self.entries, found, key)
        return self._left_out(key)

    def _left_out(self, key: str) -> tuple[Verdict, str]:
        """Say why the method does not adapt a module."""
        excluded = self.excluded and match_name(self.excluded, key)
        if not excluded and self.choice is None:
            return "not matched", ""
        # What is excluded was matched all the same: the entry is not one that means nothing.
        meant = match_name(getattr(self.config, "target_modules", None), key)
        if meant:
            self._count(self.entries, meant, key)
            self._count_layer(key)
        if excluded:
            return "excluded", self._count(self.exclusions, excluded, key)
        return ("excluded", "layers_to_transform") if meant else ("not matched", "")

    def _count_layer(self, key: str) -> None:
        """Count the layer in which a targeted module is."""
        if self.choice is not None:
            self.layers.update(name for name in self.choice.find(key) or () if name in self.layers)

    def _count(self, counter: Counter[str], found: str | re.Match[str] | bool, key: str) -> str:
        if isinstance(found, bool):
            counter.clear()  # an overriding method that only says yes leaves nothing to count
            return "matched"
        entry = found if isinstance(found, str) else found.re.pattern
        counter[entry] += 1
        # What was found is one of the entries that mean the module; the others have not matched nothing.
        for ending in endings(key) if self.has_paths else (key.rpartition(".")[2],):
            if ending in counter and ending != entry:
                counter[ending] += 1
        return repr(entry)


def _check_pattern(setting: str, wanted: str) -> None:
    try:
        re.compile(wanted)
    except re.error as error:
        msg = (
            f"{setting}={wanted!r} is text, so it is a regular expression for whole paths, and a broken one: {error}. "
            f"Mend it; for the name of a module pass a list, [{wanted!r}]."
        )
        raise TargetError(msg) from error


def _check_layer_patterns(choice: LayerChoice) -> None:
    try:
        choice.find("")
    except re.error as error:
        msg = (
            f"layers_pattern={list(choice.patterns)} holds a broken regular expression for the name before a layer's "
            f"number: {error}. Mend it; mostly it is just that name, such as 'layers'."
        )
        raise TargetError(msg) from error
