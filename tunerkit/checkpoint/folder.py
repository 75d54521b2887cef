"""The folder of a checkpoint: what a path may be, and what stands where none is found."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

from tunerkit.errors import CheckpointError, CheckpointNotFoundError
from tunerkit.naming import closest, listing

_HUB_ID = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*", re.ASCII)


def is_id(name: object) -> bool:
    """Return whether what was passed for a folder can only be the id of a repository, `user/name` or `name`.

    An id is text: a path object is a folder's, and so is text that begins with a dot, a slash or a tilde, or goes into
    a folder that is there.
    """
    if not isinstance(name, str) or not _HUB_ID.fullmatch(name) or os.path.lexists(name):
        return False
    namespace = name.rpartition("/")[0]
    return not namespace or not os.path.lexists(namespace)


def check_folder(folder: str | os.PathLike[str]) -> Path:
    """Return the path of a folder to load from.

    Raises:
        CheckpointError: The path is a file, or cannot be looked at.
        CheckpointNotFoundError: There is no such folder; what looks like an id of the Hugging Face Hub is named so.
            Calls that take ids ask `tunerkit.checkpoint.hub.fetched` first.
    """
    path = as_path(folder)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        if is_id(os.fspath(folder)) and "/" in str(folder):
            msg = (
                f"There is no folder {str(folder)!r} here, and it looks like the id of a repository on the Hugging "
                "Face Hub. Here only a folder will do: download it first, for example with "
                f"`huggingface_hub.snapshot_download({str(folder)!r})`, and pass the folder that this returns."
            )
            raise CheckpointNotFoundError(msg) from error
        raise CheckpointNotFoundError(_missing_folder(path)) from error
    except OSError as error:
        raise CheckpointError(unreadable(path, error)) from error
    if not stat.S_ISDIR(mode):
        msg = f"'{path}' is a file; a checkpoint is loaded from its folder: pass '{path.parent}'."
        raise CheckpointError(msg)
    return path


def as_path(folder: object) -> Path:
    """Return the path that a caller means.

    Raises:
        CheckpointError: It is not text or a path, is empty, or holds a null character.
    """
    if not isinstance(folder, (str, os.PathLike)) or not isinstance(os.fspath(folder), str):
        msg = f"A checkpoint's folder is a path (str or os.PathLike); {folder!r} is of type {type(folder).__name__}."
        raise CheckpointError(msg)
    text = os.fspath(folder)
    if not text or "\0" in text:
        msg = f"{text!r} is not the path of a checkpoint's folder; for the current folder pass '.'."
        raise CheckpointError(msg)
    return Path(text)


def check_file(path: Path) -> None:
    """Raise `OSError` unless a path leads to a regular file: a pipe or a device could be read for ever."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))


def entries_of(folder: Path) -> list[str]:
    """Return the names in a folder, sorted; none if it cannot be read."""
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError:  # They are for a message, which does without.
        return []


def unreadable(path: Path, error: OSError) -> str:
    """Return the message for a path that the system does not let us read."""
    return f"'{path}' cannot be read: {error.strerror or error}. Check that it is what it should be and may be read."


def _missing_folder(path: Path) -> str:
    found = path.absolute().parent
    while not found.is_dir():
        found = found.parent
    names = [name for name in entries_of(found) if (found / name).is_dir()]
    if found == path.absolute().parent and (near := closest(path.name, names)):
        return f"There is no folder '{path}'. Similar folders in '{found}': {listing(near)}. Check the path."
    return (
        f"There is no folder '{path}'. What exists of its path is '{found}', with the folders: {listing(names)}. Check "
        "the path."
    )
