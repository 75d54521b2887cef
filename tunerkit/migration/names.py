"""Where PEFT's names are in tunerkit, as `names.ini` says."""

from __future__ import annotations

import configparser
import functools
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

UNKNOWN = "no public name of PEFT's"


class Entry(NamedTuple):
    """What the table says of one name.

    Attributes:
        module: PEFT's module, such as `"peft.utils"`.
        name: The name there; `"*"` for all names.
        place: The module of tunerkit that has it; empty if there is none.
        now: Its name there.
        reason: Why it is not here; empty if it is.
    """

    module: str
    name: str
    place: str = ""
    now: str = ""
    reason: str = ""


@functools.cache
def table() -> dict[tuple[str, str], Entry]:
    """Return the whole table, by module and name."""
    file = configparser.ConfigParser(delimiters=("=",), interpolation=None)
    file.optionxform = str  # type: ignore[assignment,method-assign]  # names keep their case
    file.read_string((Path(__file__).parent / "names.ini").read_text(encoding="utf-8"))
    entries = (
        _entry(section, module, word)
        for section in file.sections()
        for module, words in file[section].items()
        for word in words.split()
    )
    return {(entry.module, entry.name): entry for entry in entries}


def _entry(section: str, module: str, word: str) -> Entry:
    name, _, now = word.partition(">")
    if " " in section:
        return Entry(module, name, reason=section)
    return Entry(module, name, section, now or name)


@functools.cache
def modules() -> frozenset[str]:
    """Return the modules of PEFT's that the table knows."""
    named = {module for module, _ in table()}
    return frozenset(above for module in named for above in (module, *_above(module)))


def find(module: str, name: str) -> Entry:
    """Return what is known of a name in one of PEFT's modules.

    What the table does not know is of unknown reason: an entry without a place.
    """
    known = table()
    for package in (module, *_above(module)):
        for entry in (known.get((package, name)), known.get((package, "*"))):
            if entry is not None:
                return entry
    return Entry(module, name, reason=UNKNOWN)


def find_path(parts: Sequence[str]) -> tuple[int, Entry | None]:
    """Return how many parts of a dotted path name a thing, and what is known of it.

    Of `peft.tuners.lora.LoraLayer.forward` it is four. The entry is None if the whole path names a module.
    """
    for count in range(2, len(parts) + 1):
        entry = find(".".join(parts[: count - 1]), parts[count - 1])
        if entry.reason != UNKNOWN:
            return count, entry
    paths = [".".join(parts[: count + 1]) for count in range(len(parts))]
    known = sum(path in modules() for path in paths)
    if known == len(parts):
        return known, None
    return known + 1, Entry(paths[known - 1], parts[known], reason=UNKNOWN)


def _above(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]
