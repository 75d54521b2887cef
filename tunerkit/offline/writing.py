"""Writing safetensors files piece by piece, into a folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import uuid
from typing import TYPE_CHECKING

from tunerkit.checkpoint.header import make_header
from tunerkit.checkpoint.writing import sync_folders
from tunerkit.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from tunerkit.offline.tensor_file import Entry

_HERE, _EXCHANGE = -100, 2
"""Linux' `AT_FDCWD` and `RENAME_EXCHANGE`."""


class TensorWriter:
    """A safetensors file whose tensors are written one at a time, in any order.

    Its header is written first, because what will stand where is known beforehand.

    Args:
        path: Where; not there yet.
        entries: What will be written, by key: dtype, shape and size of each. Where they begin is decided here; see
            `make_header`.
        metadata: The text beside them.
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
        self.path = path
        described = ((key, entry.dtype, entry.shape, entry.size) for key, entry in entries.items())
        header, self.starts = make_header(described, metadata)
        self.size = len(header) + sum(entry.size for entry in entries.values())
        with path.open("xb") as file:
            file.write(header)
            file.truncate(self.size)

    def write(self, key: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Write the bytes of one tensor."""
        with self.path.open("r+b") as file:
            file.seek(self.starts[key])
            for chunk in chunks:
                file.write(chunk)

    def finish(self) -> None:
        """See to it that all that was written is on the disk."""
        with self.path.open("r+b") as file:
            os.fsync(file.fileno())


def write_file(path: Path, data: bytes) -> None:
    """Write a small file and see to it that it is on the disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def check_out(out: Path, *, overwrite: bool) -> None:
    """Raise `CheckpointError` if a folder cannot be written at a path."""
    if out.is_symlink() and not out.exists():
        msg = f"'{out}' is a link that leads nowhere: remove it, or choose another path with --out."
        raise CheckpointError(msg)
    if out.exists() and not out.is_dir():
        msg = f"'{out}' is a file, and a model is a folder: choose another path with --out."
        raise CheckpointError(msg)
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        msg = (
            f"'{out}' is there and not empty. Choose another path with --out, or pass --overwrite to replace the whole "
            "folder once the new one is complete."
        )
        raise CheckpointError(msg)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Within the block a folder is filled that then takes the place of `out`; if anything goes wrong, it is removed.

    It stands beside `out` meanwhile, because only within one file system is a rename one step.

    Raises:
        CheckpointError: The disk refuses; what was at `out` is unchanged.
    """
    out = out.absolute()
    made = [parent for parent in out.parents if not parent.exists()]
    work = out.parent / f"{out.name}.{uuid.uuid4().hex}.tmp"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir()
        yield work
        sync_folders([*_folders(work), *(parent.parent for parent in made)])
        _put_in_place(work, out)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            where = f", at '{error.filename}'" if error.filename else ""
            msg = (
                f"The model could not be written to '{out}' ({error.strerror or error}{where}). What was there before "
                "is unchanged: free some space, get access, or choose another folder."
            )
            raise CheckpointError(msg) from error
        raise
    with contextlib.suppress(OSError):
        shutil.rmtree(work, ignore_errors=True)  # what was there before, if anything was


def _folders(work: Path) -> list[Path]:
    return [work, *(path for path in work.rglob("*") if path.is_dir())]


def _put_in_place(work: Path, out: Path) -> None:
    """Let `work` be at `out`, and what was at `out`, if anything was, at `work`."""
    there = out.exists()
    if there:
        _swap(work, out)
    try:
        if not there:
            work.replace(out)
        sync_folders([out.parent])
    except BaseException:
        if there:
            _swap(work, out)
        elif out.exists():
            out.replace(work)
        raise


def _swap(one: Path, other: Path) -> None:
    """Let two folders change places: in one step where the system can, so that a kill leaves one or the other."""
    if _exchange(one, other):
        return
    aside = one.with_name(f"{one.name}.old")
    try:
        other.replace(aside)
        one.replace(other)
    except BaseException:
        # The disk knows best how far it came.
        if aside.exists() and other.exists():
            other.replace(one)
        if aside.exists():
            aside.replace(other)
        raise
    with contextlib.suppress(OSError):  # What was at `other` then keeps a third name, and nothing is lost.
        aside.replace(one)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names as Linux can, and Python has no word for; return whether it was done."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # an older C library, or another system
        return False
    done: int = rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE)
    return done == 0
