"""Settings for single modules: regexes for their paths, with a value for each, as PEFT's `rank_pattern`."""

from __future__ import annotations

import functools
import re
from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from tunerkit.errors import TargetError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tunerkit.config import PeftConfig

Value = TypeVar("Value")
Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")

_DOT = "."
_SPECIAL = frozenset("\\^$*+?{}[]|()\n")
"""What makes a pattern more than text. A dot does not: it stands for one character, whichever."""


class Patterns:
    """Regexes, each of which fits a module's whole path or the end of it after a dot; `^` stands for the path's start.

    A config may have one for each of thousands of modules, and then they are mostly the modules' paths. Those are
    looked up rather than tried: of an end of a path, what has its length and equals it but for the pattern's dots.

    Args:
        entries: The patterns, each once. All of them must be regular expressions.
    """

    def __init__(self, entries: tuple[str, ...]) -> None:
        self._entries = entries
        self._texts: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        self._regexes: list[tuple[int, re.Pattern[str]]] = []
        for number, entry in enumerate(entries):
            if _SPECIAL.isdisjoint(entry):
                dots = tuple(index for index, character in enumerate(entry) if character == _DOT)
                self._texts.setdefault(len(entry), {}).setdefault(dots, {})[entry] = number
            else:
                self._regexes.append((number, _regex(entry)))

    def fitting(self, path: str) -> list[str]:
        """Return the patterns that fit a module's path, in their order."""
        if "\n" in path:  # which a dot does not stand for
            return [entry for entry in self._entries if _regex(entry).match(path)]
        found = [number for number, regex in self._regexes if regex.match(path)]
        dot, end = _DOT, path
        while dot:
            for dots, texts in self._texts.get(len(end), {}).items():
                number = texts.get(_with_dots(end, dots))
                if number is not None:
                    found.append(number)
            _, dot, end = end.partition(_DOT)
        return [self._entries[number] for number in sorted(found)]


def _regex(entry: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({entry})$")


def _with_dots(text: str, dots: tuple[int, ...]) -> str:
    characters = list(text)
    for index in dots:
        characters[index] = _DOT
    return "".join(characters)


_patterns = functools.lru_cache(8)(Patterns)
_HELD: ContextVar[dict[int, tuple[object, Patterns]] | None] = ContextVar("held", default=None)


def hold_settings(call: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Return a function during whose calls no settings change, so that their patterns are compared with them once.

    It runs in a copy of the context, so however it ends, nothing outside has to be put back.
    """

    @functools.wraps(call)
    def held(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        context = copy_context()
        context.run(_HELD.set, {})
        return context.run(call, *args, **kwargs)

    return held


def _patterns_of(settings: Mapping[str, object]) -> Patterns:
    held = _HELD.get()
    if held is None:
        return _patterns(tuple(settings))
    if id(settings) not in held:
        held[id(settings)] = settings, _patterns(tuple(settings))
    return held[id(settings)][1]


def pattern_value(patterns: Mapping[str, Value] | None, path: str, default: Value) -> Value:
    """Return the value of the first pattern that fits a module's path, or else the default.

    A pattern is a regular expression. It fits a path if it matches the whole of it, or the end of it after a dot.

    Args:
        patterns: The values by pattern, such as a config's `rank_pattern`, or None.
        path: The module's path: `Site.settings_name`.
        default: The value where no pattern fits.
    """
    if not patterns:
        return default
    found = _patterns_of(patterns).fitting(path)
    return patterns[found[0]] if found else default


def count_patterns(config: PeftConfig, paths: list[str]) -> dict[str, dict[str, int]]:
    """Return, for each setting of a config by patterns, how many paths each of its entries fits.

    Raises:
        TargetError: An entry is no regular expression.
    """
    counts: dict[str, dict[str, int]] = {}
    for setting in config._patterns:
        entries: Mapping[str, object] = getattr(config, setting) or {}
        for entry in entries:
            _check(setting, entry)
        counts[setting] = dict.fromkeys(entries, 0)
        patterns = _patterns(tuple(entries))
        for path in paths if entries else ():
            for entry in patterns.fitting(path):
                counts[setting][entry] += 1
    return counts


def _check(setting: str, entry: str) -> None:
    if _SPECIAL.isdisjoint(entry):
        return
    try:
        re.compile(entry)  # by itself, so that the message says the right position
        _regex(entry)
    except re.error as error:
        msg = (
            f"{setting} holds {entry!r}, which must be a regular expression for a module's path or the end of it, and "
            f"is a broken one: {error}. Mend it; for text that is meant as it is use re.escape."
        )
        raise TargetError(msg) from error
