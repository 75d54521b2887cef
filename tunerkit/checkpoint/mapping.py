"""The tensors of a safetensors file as views of the mapped file, for a tenth of what safetensors takes for many.

Only a file about which there is no doubt is read so. Any other is left to safetensors, which says what is wrong.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from tunerkit.checkpoint.encoding import NAMES
from tunerkit.checkpoint.header import HEADER_SIZE, METADATA

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

_DTYPES = {name: dtype for dtype, name in NAMES.items()}
_LARGEST_HEADER = 100_000_000
"""Bytes; safetensors reads none that is larger."""

_ONCE = (b'"dtype"', b'"shape"', b'"data_offsets"')
"""What a header says of each tensor; it holds each as often as there are tensors, or it is not clear which counts."""


class Mapped(NamedTuple):
    """A mapped file.

    Attributes:
        tensors: Views of the mapping by key, in the order of the keys. It is private, and there as long as they are.
        metadata: The text beside them.
        header: All that the file says of both, as it stands there: two saves differ in it.
    """

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]
    header: bytes


def map_tensors(path: Path) -> Mapped | None:
    """Return what a file holds, or None if it is for safetensors to say that.

    That is so for a file that is broken, or holds a dtype for which torch has no name, a tensor without numbers or not
    where its dtype can be read, or a name with characters that JSON escapes.

    Raises:
        OSError: The file cannot be read.
    """
    try:
        content = np.memmap(path, np.uint8, mode="c")  # what is written to it does not reach the file
    except ValueError:  # it is empty
        return None
    size = int.from_bytes(content[:HEADER_SIZE].tobytes(), "little")
    raw = content[HEADER_SIZE : HEADER_SIZE + size].tobytes() if size <= _LARGEST_HEADER else b""
    if len(raw) < size or not raw.startswith(b"{") or b"\\" in raw or sys.byteorder == "big":
        return None
    try:
        header = json.loads(raw.decode())
        metadata = header.pop(METADATA, {})
        if any(raw.count(word) != len(header) for word in _ONCE) or raw.count(f'"{METADATA}"'.encode()) > 1:
            return None
        tensors = _views(content, HEADER_SIZE + size, header)
    except (LookupError, RecursionError, TypeError, ValueError):
        return None
    if tensors is None or not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        return None
    return Mapped(dict(sorted(tensors.items())), metadata, raw)


def _views(content: npt.NDArray[np.uint8], start: int, header: dict[str, Any]) -> dict[str, torch.Tensor] | None:
    """Return the tensors that a header describes if they lie one after the other and fill the rest of the file."""
    whole: dict[str, tuple[torch.Tensor, int]] = {}
    tensors: dict[str, torch.Tensor] = {}
    end = start
    for key, item in sorted(header.items(), key=_beginning):
        name, shape, (first, last) = item["dtype"], item["shape"], item["data_offsets"]
        if name not in whole:
            dtype = _DTYPES[name]
            whole[name] = torch.frombuffer(content, dtype=dtype, count=len(content) // dtype.itemsize), dtype.itemsize
        flat, width = whole[name]
        strides, count = [], 1
        for length in reversed(shape):
            if type(length) is not int or length < 1:
                return None
            strides.append(count)
            count *= length
        strides.reverse()
        if type(first) is not int or type(last) is not int or len(item) != len(_ONCE) or end % width:
            return None
        if start + first != end or last - first != count * width or start + last > len(content):
            return None
        tensors[key] = flat.as_strided(shape, strides, end // width)
        end = start + last
    return tensors if end == len(content) else None


def _beginning(item: tuple[str, Any]) -> Any:
    return item[1]["data_offsets"]
