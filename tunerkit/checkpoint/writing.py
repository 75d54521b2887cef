"""Writing a checkpoint so that whatever cuts the save, the folder loads as the old checkpoint or as the new one.

The steps, each on the disk before the next begins: both files under temporary names that carry the id of this save; the
tensors, whose metadata carry the id too, renamed over the old ones; the config renamed over the old one. Cut before the
first rename, the old pair stands. Cut after it, the tensors' id leads to the config that still has its temporary name,
and whoever loads finishes the save (`tunerkit.checkpoint.files.finish_save`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from tunerkit.checkpoint.encoding import config_text, encode_tensors
from tunerkit.checkpoint.files import (
    CONFIG_NAME,
    SAVE_ID_KEY,
    TEMPORARY,
    WEIGHTS_NAME,
    finish_save,
    saved_id,
    temporary,
)
from tunerkit.checkpoint.folder import as_path
from tunerkit.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import torch

_STALE_AFTER = 3600.0
"""Seconds without a write after which a save's temporaries are taken for those of a save that was killed."""

_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM}
"""How a system says that it cannot sync folders, or that this one may not be opened: no reason not to save."""


def write_checkpoint(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, both or neither.

    Args:
        folder: Where to; made if it is missing, with its parents.
        config: The JSON's content. Sets become sorted lists, enums their values.
        tensors: The tensors by key, of any dtype that safetensors knows, on any device but meta; each is written in
            full, also where several share their memory.
        metadata: What the tensors' file shall say beside the format and the save's id.

    Raises:
        CheckpointError: The config or a tensor cannot be written, the path is a file, or the disk refuses (read-only,
            full). The message says which checkpoint the folder holds then.
    """
    path = as_path(folder)
    save_id = uuid.uuid4().hex
    text = config_text(config)
    content = encode_tensors(tensors, {**metadata, "format": "pt", SAVE_ID_KEY: save_id})
    new_weights, new_config = (path / temporary(name, save_id) for name in (WEIGHTS_NAME, CONFIG_NAME))
    made: list[Path] = []
    try:
        _check_target(path)
        made += [parent for parent in (path, *path.parents) if not parent.exists()]
        path.mkdir(parents=True, exist_ok=True)
        _write(new_weights, content)
        # After the tensors, so that the config is always the younger: see `_remove_stale`.
        _write(new_config, [text.encode()])
        sync_folders([path, *(parent.parent for parent in made)])
        # Another save may have been cut just before its second rename: once its tensors are gone, nobody would know.
        finish_save(path)
        new_weights.replace(path / WEIGHTS_NAME)
        sync_folders([path])
        finish_save(path)
        sync_folders([path])
        _remove_stale(path)
    except BaseException as error:
        stands = _settle(path, save_id, made)
        if isinstance(error, OSError):
            raise CheckpointError(_refused(path, error, stands=stands)) from error
        raise


def write_config(folder: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
    """Write `adapter_config.json` alone, whole or not at all; tensors beside it stay as they are.

    Args:
        folder: Where to; made if it is missing, with its parents.
        config: The JSON's content, as for `write_checkpoint`.

    Raises:
        CheckpointError: As `write_checkpoint`.
    """
    path = as_path(folder)
    # An id of its own: readers take a temporary under the tensors' id for the config of those tensors.
    save_id = uuid.uuid4().hex
    text = config_text(config)
    made: list[Path] = []
    try:
        _check_target(path)
        made += [parent for parent in (path, *path.parents) if not parent.exists()]
        path.mkdir(parents=True, exist_ok=True)
        new_config = path / temporary(CONFIG_NAME, save_id)
        _write(new_config, [text.encode()])
        # A config that a cut save still has to put in place must not come over this one later.
        finish_save(path)
        new_config.replace(path / CONFIG_NAME)
        sync_folders([path, *(parent.parent for parent in made)])
    except BaseException as error:
        _settle(path, save_id, made)
        if isinstance(error, OSError):
            raise CheckpointError(_refused(path, error, stands=False)) from error
        raise


def _check_target(path: Path) -> None:
    if path.exists() and not path.is_dir():
        msg = f"'{path}' is a file, and a checkpoint is a folder with two files: choose another path."
        raise CheckpointError(msg)
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        if (path / name).is_dir():
            msg = f"'{path / name}' is a folder where a file is to be written: remove it or choose another path."
            raise CheckpointError(msg)


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    with path.open("xb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def sync_folders(folders: Iterable[Path]) -> None:
    """Make the names in the folders last through a power cut."""
    if os.name == "nt":  # Windows cannot open a folder, and its file system keeps the order of renames itself.
        return
    for folder in folders:
        _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def _settle(folder: Path, save_id: str, made: list[Path]) -> bool:
    """Leave a folder whole after a save that failed; return whether it now holds the new checkpoint."""
    # The disk knows best how far the save came: an interrupt may hit between a step and any note of it.
    if saved_id(folder) == save_id:
        with contextlib.suppress(OSError):
            finish_save(folder)
        return True
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        with contextlib.suppress(OSError):
            (folder / temporary(name, save_id)).unlink(missing_ok=True)
    for parent in made:
        with contextlib.suppress(OSError):
            parent.rmdir()
    return False


def _refused(folder: Path, error: OSError, *, stands: bool) -> str:
    reason = error.strerror or error
    if stands:
        return (
            f"The checkpoint is in '{folder}' and loads, but the save did not end well ({reason}) and may not outlast "
            "a power cut: check the disk and save again."
        )
    return (
        f"The checkpoint could not be written to '{folder}' ({reason}). What was there before is unchanged: free some "
        "space, get write access, or choose another folder."
    )


def _remove_stale(folder: Path) -> None:
    """Remove what saves that were killed have left, and nothing of a save that is still running.

    A save is taken for dead when neither of its temporaries has been written to for an hour. Ages count from the
    tensors just written, so that the clock is the file system's own. A process may still have slept for an hour in the
    middle of a save: its tensors go first, so that its rename then fails. Where they are not there to remove, it has
    passed that rename and needs its config, which stays.
    """
    with contextlib.suppress(OSError):
        now = (folder / WEIGHTS_NAME).stat().st_mtime
        saves = defaultdict(list)
        for entry in sorted(folder.iterdir(), reverse=True):  # "adapter_model..." before "adapter_config..."
            if match := TEMPORARY.fullmatch(entry.name):
                saves[match[1]].append(entry)
        for save_id, entries in saves.items():
            with contextlib.suppress(OSError):
                old = all(now - entry.stat().st_mtime > _STALE_AFTER for entry in entries)
                if old and save_id != saved_id(folder):
                    for entry in entries:
                        entry.unlink()
