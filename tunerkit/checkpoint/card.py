"""The model card: the `README.md` beside a checkpoint.

Its head, YAML between two lines `---`, tells sites and tools what the folder holds.

A card that is there already belongs to its author. Only our own entries of its head and our own lines under
"Framework versions" are written; every other line stays as it is, comments and formatting too. That is why the head
is edited line by line and not by a YAML library, which would write all of it anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tunerkit.checkpoint.files import CARD_NAME, temporary
from tunerkit.checkpoint.folder import check_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

LIBRARY = "peft"
"""What the head names as the library: it means the format, by which sites and serving tools find adapters."""

_HEAD = re.compile(r"\A\ufeff?---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
_KEY = re.compile(r"([A-Za-z_][\w-]*)[ \t]*:(?:[ \t]+|$)(.*)")
_COMMENT = re.compile(r"(?:(?<=\s)|^)#.*")
_PLAIN = re.compile(r"[A-Za-z][\w./-]*(?::[\w./-]+)*")
_RESERVED = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}
_VERSIONS = "### Framework versions"


@dataclass(frozen=True)
class Card:
    """What a model card is to say of a checkpoint.

    Attributes:
        title: The heading of a new card.
        text: What a new card says below it.
        base_model: The name of the base model, or None if it has none that means something elsewhere.
        pipeline_tag: What the model is used for; a card that says so already keeps what it says.
        tags: Words by which the model is found, beside those the card has.
        versions: The versions of the packages that wrote the checkpoint.
    """

    title: str
    text: str
    base_model: str | None = None
    pipeline_tag: str | None = None
    tags: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


def write_card(folder: Path, card: Card) -> None:
    """Write a folder's model card, or bring the one that is there up to date, whole or not at all; make the folder.

    Raises:
        OSError: It cannot be read or written.
        UnicodeDecodeError: The one that is there is not text in UTF-8.
    """
    path = folder / CARD_NAME
    if path.exists():
        check_file(path)
    old = path.read_bytes().decode() if path.exists() else None
    # Windows' line ends are kept as they are; inside they would be in everybody's way.
    newline = "\r\n" if old is not None and "\r\n" in old else "\n"
    text = render(card) if old is None else update(old.replace("\r\n", "\n"), card)
    if text.replace("\n", newline) == old:
        return
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / temporary(CARD_NAME, uuid.uuid4().hex)
    try:
        with new.open("xb") as file:
            file.write(text.replace("\n", newline).encode())
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)


def render(card: Card) -> str:
    """Return a new card."""
    return update(f"# {card.title}\n\n{card.text}\n", card)


def update(text: str, card: Card) -> str:
    """Return a card's text brought up to date."""
    found = _HEAD.match(text)
    head = found[1].splitlines() if found else []
    body = text[found.end() :] if found else text.removeprefix("\ufeff")
    head = _with_value(head, "library_name", LIBRARY)
    if card.base_model is not None:
        head = _with_value(head, "base_model", card.base_model)
    if card.pipeline_tag is not None and not _says(head, "pipeline_tag"):
        head = _with_value(head, "pipeline_tag", card.pipeline_tag)
    if card.tags:
        head = _with_items(head, "tags", card.tags)
    gap = "" if found else "\n"
    return "\n".join(["---", *head, "---", ""]) + gap + _with_versions(body, card.versions)


def _with_versions(body: str, versions: Mapping[str, str]) -> str:
    """Put our lines first under the heading of the versions, in place of those from an earlier save."""
    lines = body.splitlines()
    ours = [f"- {package} {version}" for package, version in versions.items()]
    if _VERSIONS not in lines:
        return "\n".join([*lines, *([""] if lines and lines[-1] else []), _VERSIONS, "", *ours, ""])
    start = lines.index(_VERSIONS) + 1
    end = next((n for n in range(start, len(lines)) if lines[n].startswith("#")), len(lines))
    old = re.compile(rf"- (?:{'|'.join(map(re.escape, versions))}) \S+ *")
    rest = [line for line in lines[start:end] if not old.fullmatch(line)]
    while rest and not rest[0]:
        del rest[0]
    return "\n".join([*lines[:start], "", *ours, *rest, *lines[end:], ""])


# The head


def _block(head: list[str], key: str) -> tuple[int, int] | None:
    """Return where an entry of the head begins and where the next one does."""
    for start, line in enumerate(head):
        found = _KEY.match(line)
        if found and found[1] == key:
            end = start + 1
            # Lists, and the bracket that ends one, may stand as far to the left as their key.
            while end < len(head) and (not head[end].strip() or head[end][0] in " \t-#]"):
                end += 1
            while not head[end - 1].strip() or head[end - 1].startswith("#"):
                end -= 1
            return start, end
    return None


def _content(head: list[str], key: str) -> str:
    """Return what follows an entry's key in its line, without a comment."""
    place = _block(head, key)
    found = _KEY.match(head[place[0]]) if place else None
    return _COMMENT.sub("", found[2]).strip() if found else ""


def _says(head: list[str], key: str) -> bool:
    """Return whether the head has an entry that is not empty."""
    place = _block(head, key)
    return place is not None and (place[1] - place[0] > 1 or _content(head, key) not in {"", "null", "~", "[]"})


def _with_value(head: list[str], key: str, value: str) -> list[str]:
    """Set an entry to one value; an entry that holds it already, also among others, stays as it is."""
    line = f"{key}: {_scalar(value)}"
    place = _block(head, key)
    if place is None:
        return [*head, line]
    start, end = place
    if value in _values(head[start:end]):
        return head
    return [*head[:start], line, *head[end:]]


def _with_items(head: list[str], key: str, items: tuple[str, ...]) -> list[str]:
    """Add values to a list, at its end and in the form that it has; one that is no list becomes one."""
    place = _block(head, key)
    if place is None:
        return [*head, f"{key}:", *(f"- {_scalar(item)}" for item in items)]
    start, end = place
    block = head[start:end]
    held = _values(block)
    new = [_scalar(item) for item in items if item not in held]
    if not new:
        return head
    content = _content(head, key)
    if content.startswith("[") and not any("]" in line for line in block):
        return head  # broken as it is, and its author's to mend
    if content.startswith("["):
        return [*head[:start], *_with_flow_items(block, new), *head[end:]]
    dash = next((line for line in block[1:] if line.lstrip().startswith("-")), None)
    indent = dash[: len(dash) - len(dash.lstrip())] if dash is not None else ""
    before = [f"- {content}"] if content and content not in {"null", "~"} else []
    first = f"{key}:" if content else block[0]
    return [*head[:start], first, *before, *block[1:], *(f"{indent}- {item}" for item in new), *head[end:]]


def _with_flow_items(block: list[str], new: list[str]) -> list[str]:
    """Add values to a list in brackets, which may go over several lines."""
    last = next(number for number in reversed(range(len(block))) if "]" in block[number])
    before, _, after = block[last].rpartition("]")
    held = "\n".join([*block[:last], before]).partition("[")[2].strip()
    comma = "" if not held else " " if held.endswith(",") else ", "
    start = before.rstrip() or " "  # at the line's beginning an item would be taken for the next entry
    return [*block[:last], f"{start}{comma}{', '.join(new)}]{after}", *block[last + 1 :]]


def _values(block: list[str]) -> set[str]:
    """Return the texts that an entry holds: its value, or the items of its list."""
    found = _KEY.match(block[0])
    texts = [found[2] if found else "", *block[1:]]
    texts = [_COMMENT.sub("", text).strip() for text in texts]
    joined = " ".join(texts)
    if joined.startswith("["):
        texts = joined.strip("[] ").split(",")
    return {text.strip().removeprefix("- ").strip().strip("\"'") for text in texts}


def _scalar(text: str) -> str:
    """Return a text as YAML; what could be read as something else stands in quotes."""
    if _PLAIN.fullmatch(text) and text.lower() not in _RESERVED:
        return text
    return json.dumps(text, ensure_ascii=False)
