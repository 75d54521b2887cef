"""Reading a safetensors file piece by piece: its header, one tensor, or a tensor's bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from tunerkit.checkpoint.encoding import NAMES
from tunerkit.checkpoint.folder import check_file, unreadable
from tunerkit.checkpoint.header import METADATA, broken, read_header
from tunerkit.errors import CheckpointError
from tunerkit.sums import rows_at_once

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

CHUNK = 4 << 20
"""How many bytes are copied at once."""

FLOATS = {NAMES[dtype]: dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
"""What can be folded into, by safetensors' names."""

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
DTYPES = {**FLOATS, **{NAMES[dtype]: dtype for dtype in _WHOLE}}
"""What can be written in place of a tensor. Those of other dtypes are copied as bytes, so nothing needs to know them.
"""


@dataclass(frozen=True)
class Entry:
    """What a header says of a tensor.

    Attributes:
        dtype: The dtype as safetensors spells it.
        shape: The shape.
        start: Where its bytes begin in the file.
        size: How many bytes it has.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def count(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file of which only the header has been read.

    Attributes:
        path: Where it is.
        entries: Its tensors by key, in the order of their bytes.
        metadata: The text that stands beside them.
    """

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Read the header of a file.

        Raises:
            CheckpointError: The file cannot be read, is cut short, or is no safetensors file.
        """
        try:
            check_file(path)
            with safe_open(path, framework="pt"):  # checks the header against the file's size
                pass
            header, start = read_header(path)
        except OSError as error:
            raise CheckpointError(unreadable(path, error)) from error
        except SafetensorError as error:
            raise CheckpointError(broken(path, error)) from error
        metadata = header.pop(METADATA, None) or {}
        entries = {
            key: Entry(
                dtype=item["dtype"],
                shape=tuple(item["shape"]),
                start=start + item["data_offsets"][0],
                size=item["data_offsets"][1] - item["data_offsets"][0],
            )
            for key, item in header.items()
        }
        return cls(path, dict(sorted(entries.items(), key=lambda item: item[1].start)), metadata)

    def read(self, key: str) -> torch.Tensor:
        """Return one tensor. It lies in the mapped file, privately: only what is touched takes memory.

        The mapping lasts as long as the tensor, so dropping the tensor gives the memory back.

        Raises:
            CheckpointError: The file cannot be read any more.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(key)
        except OSError as error:
            raise CheckpointError(unreadable(self.path, error)) from error
        except SafetensorError as error:
            raise CheckpointError(broken(self.path, error)) from error
        return tensor

    def rows(self, key: str) -> Iterator[torch.Tensor]:
        """Go through a tensor in the blocks of `tunerkit.sums.split_rows`, none of which is kept.

        Raises:
            CheckpointError: The file cannot be read any more.
        """
        entry = self.entries[key]
        dtype = DTYPES[entry.dtype]
        size = rows_at_once(entry.shape) * math.prod(entry.shape[1:]) * dtype.itemsize
        for chunk in self.chunks(key, size):
            yield torch.frombuffer(bytearray(chunk), dtype=dtype).reshape(-1, *entry.shape[1:])

    def chunks(self, key: str, size: int | None = None) -> Iterator[bytes]:
        """Go through the bytes of a tensor.

        Args:
            key: The tensor.
            size: How many are read at once.

        Raises:
            CheckpointError: The file cannot be read any more.
        """
        entry = self.entries[key]
        left = entry.size
        try:
            with self.path.open("rb") as file:
                file.seek(entry.start)
                while left:
                    chunk = file.read(min(left, size or CHUNK))
                    if not chunk:
                        raise CheckpointError(broken(self.path, "it became shorter while it was read"))
                    left -= len(chunk)
                    yield chunk
        except OSError as error:
            raise CheckpointError(unreadable(self.path, error)) from error
