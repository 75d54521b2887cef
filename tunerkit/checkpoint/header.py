"""What stands before the tensors of a safetensors file, and what is said of a file that is none."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

from tunerkit.checkpoint.folder import unreadable
from tunerkit.errors import CheckpointError
from tunerkit.naming import listing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

HEADER_SIZE = 8
"""The bytes before the header, which hold its length, little-endian."""

METADATA = "__metadata__"
"""The key of a header that is no tensor's: text that stands beside them."""

_ALIGNMENT = 8
"""Readers that map the file want its tensors to begin at a multiple of this."""

_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

_LFS_POINTER = b"version https://git-lfs"
_ZIP = b"PK\x03\x04"
"""How what `torch.save` writes begins."""

_PICKLE = re.compile(rb"\x80[\x02-\x05].(?!\0\0\0\0\0)", re.DOTALL)
"""How a pickle begins, by the number of its protocol; with only zeros behind it is the length of a header."""

_LARGEST = 2**63 - 1


def make_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Return what stands before the tensors of a file, and where each of them begins in it, in the order of the bytes.

    Those of wide dtypes come first, so that each is aligned to its own; otherwise they are in the order given.

    Args:
        tensors: Of each its key, its dtype as safetensors spells it, its shape and the number of its bytes.
        metadata: The text beside them.
    """
    # Put together by hand: `json.dumps` of it all takes as long as writing what it describes.
    items = [f"{_JSON(METADATA)}:{_JSON(dict(metadata))}"] if metadata else []
    offsets: dict[str, int] = {}
    end = 0
    for key, dtype, shape, size in sorted(tensors, key=_width, reverse=True):
        offsets[key], end = end, end + size
        sizes = ",".join(map(str, shape))
        items.append(f'{_JSON(key)}:{{"dtype":"{dtype}","shape":[{sizes}],"data_offsets":[{offsets[key]},{end}]}}')
    text = f"{{{','.join(items)}}}".encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = len(text).to_bytes(HEADER_SIZE, "little") + text
    return header, {key: len(header) + offset for key, offset in offsets.items()}


def _width(tensor: tuple[str, str, tuple[int, ...], int]) -> int:
    """Return how many bytes one number of a tensor takes."""
    _, _, shape, size = tensor
    return size // max(1, math.prod(shape))


def raw_header(path: Path) -> bytes:
    """Return what stands before the tensors of a file, without the bytes that say how long it is.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(HEADER_SIZE), "little")
        return file.read(min(length, path.stat().st_size))


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a file that safetensors has opened before, and where its tensors begin.

    Raises:
        CheckpointError: A tensor stands in it twice, or has a size that no tensor can have; or the file has been
            changed since.
        OSError: The file cannot be read.
    """
    raw = raw_header(path)
    try:
        header: dict[str, Any] = json.loads(raw, object_pairs_hook=partial(unique_keys, f"The header of '{path}'"))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(broken(path, error)) from error
    large = [key for key, item in header.items() if key != METADATA and max(item["shape"], default=0) > _LARGEST]
    if large:
        raise CheckpointError(broken(path, f"no tensor is as large as {listing(large)} is said to be"))
    return header, HEADER_SIZE + len(raw)


def check_unique(path: Path, raw: bytes, count: int) -> None:
    """Raise `CheckpointError` if the header of a file in which `count` tensors are found has one of them twice.

    safetensors takes the last and says nothing. Reading a long header takes as long as loading its tensors, so the
    places where one says where its bytes lie are counted first.
    """
    if raw.count(b'"data_offsets"') != count or b"\\" in raw:
        read_header(path)


def unique_keys(what: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object as a dict.

    Raises:
        CheckpointError: A key stands in it twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        doubled = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        msg = f"{what} holds more than once: {listing(doubled)}. Which value counts is not clear: keep one of each."
        raise CheckpointError(msg)
    return found


def broken(path: Path, reason: object) -> str:
    """Return the message for a file that is no safetensors file, or no whole one."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(len(_LFS_POINTER))
    except OSError as error:
        return unreadable(path, error)
    if head.startswith(_ZIP) or _PICKLE.match(head):
        return (
            f"'{path}' ({size} bytes) is a pickle under another name, and loading a pickle can run any code, so it is "
            "not read. If you trust it, convert it once: load it where it was made and save it as safetensors."
        )
    why = str(reason).partition("\n")[0]  # torch adds a trace of its own
    return what_it_is(path, head, size) or (
        f"'{path}' ({size} bytes) is not a whole safetensors file ({why}). Most likely a download or a copy was cut "
        "short: fetch or save the checkpoint again."
    )


def what_it_is(path: Path, head: bytes, size: int) -> str | None:
    """Return the message for a file that is empty or stands for another, by how it begins; None if it does neither."""
    if not head:
        return (
            f"'{path}' is empty (0 bytes). Most likely a copy was cut short or the disk was full: fetch or save the "
            "checkpoint again."
        )
    if head.startswith(_LFS_POINTER):
        return (
            f"'{path}' ({size} bytes) is a pointer of Git LFS, not the file itself: run `git lfs pull` in the "
            "repository it comes from, or download the file."
        )
    return None
