"""Reading the two files of a checkpoint, and finishing a save that was cut between them.

A save writes the config to a temporary whose name carries the save's id, puts the tensors in place, whose metadata
carry the same id, and then the config (see `tunerkit.checkpoint.writing`). If it is cut between the two, the config's
temporary is still there under the id of the tensors beside it: that is the config to use. Without one the two files
belong together, whatever the config says, so that it may be edited by hand.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from tunerkit.checkpoint.folder import check_folder, entries_of, unreadable
from tunerkit.errors import CheckpointError, CheckpointNotFoundError
from tunerkit.naming import listing

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator
    from pathlib import Path

    import torch

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
SAVE_ID_KEY = "tunerkit_save_id"
"""The entry of the tensors' metadata that holds the id of the save that wrote them (32 hexadecimal digits)."""

CARD_NAME = "README.md"

TEMPORARY = re.compile(
    rf"(?:{'|'.join(map(re.escape, (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME)))})\.([0-9a-f]{{32}})\.tmp"
)
"""What the names of a save's temporaries look like; the group is the save's id."""

_PICKLE_NAME = "adapter_model.bin"
_OTHER_FILES = {
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "trainer_state.json",
}
"""What a whole model, or a trainer's checkpoint of one, has among its files."""

_LFS_POINTER = b"version https://git-lfs"


class Checkpoint(NamedTuple):
    """What one checkpoint holds."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


def read_checkpoint(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> Checkpoint:
    """Return the config, the tensors and the metadata of one and the same save, even while another is written.

    Raises:
        CheckpointError: A file is broken, or is not one that can be read (see `read_config`, `read_tensors`).
        CheckpointNotFoundError: The folder or one of the two files is not there.
    """
    path = check_folder(folder)
    while True:
        with _opened_weights(path) as file:
            metadata = file.metadata() or {}
            tensors = _tensors(file)
        config = read_config(path)
        # A save that came in between changed the id, and the config may be the newer one's.
        if read_metadata(path).get(SAVE_ID_KEY) == metadata.get(SAVE_ID_KEY):
            return Checkpoint(config, {name: tensor.to(device) for name, tensor in tensors.items()}, metadata)


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what `adapter_config.json` holds, after finishing a save that was cut.

    Raises:
        CheckpointError: The file cannot be read, is not JSON in UTF-8, holds a key twice, or holds no JSON object.
        CheckpointNotFoundError: The folder or the file is not there.
    """
    folder = check_folder(folder)
    path = folder / CONFIG_NAME
    try:
        finish_save(folder)
    except OSError:
        # Somebody else's folder, or a read-only one: the config is complete all the same, just not under its name.
        path = _pending_config(folder) or path
    try:
        return read_json(path)
    except CheckpointNotFoundError as error:
        if path.name != CONFIG_NAME:  # Another process has finished the save since.
            return read_config(folder)
        raise CheckpointNotFoundError(_missing_file(folder, CONFIG_NAME)) from error.__cause__


def read_json(path: Path) -> dict[str, Any]:
    """Return what a config's file holds, whatever its name.

    Raises:
        CheckpointError: The file cannot be read, is not JSON in UTF-8, holds a key twice, or holds no JSON object.
        CheckpointNotFoundError: The file is not there.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        msg = f"There is no file '{path}'. Check the path."
        raise CheckpointNotFoundError(msg) from error
    except OSError as error:
        raise CheckpointError(unreadable(path, error)) from error
    return _parse(path, data)


def read_tensors(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """Return the tensors of `adapter_model.safetensors` by key.

    On the CPU they lie in the mapped file, privately: they may be written to, and the file stays as it is.

    Args:
        folder: The checkpoint's folder.
        device: Where the tensors shall be.

    Raises:
        CheckpointError: The file is truncated, damaged or no safetensors file, or there is only a pickled one.
        CheckpointNotFoundError: The folder or the file is not there.
    """
    with _opened_weights(check_folder(folder)) as file:
        tensors = _tensors(file)
    # Moved out here, so that a device that is not there is not taken for a damaged file.
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def read_metadata(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Return the metadata of `adapter_model.safetensors`; empty if it has none.

    Raises:
        CheckpointError: As `read_tensors`.
        CheckpointNotFoundError: As `read_tensors`.
    """
    with _opened_weights(check_folder(folder)) as file:
        return dict(file.metadata() or {})


def temporary(name: str, save_id: str) -> str:
    """Return the name under which a save writes one of its two files at first.

    It does not begin with a dot: whoever copies `folder/*` shall copy it too, or a cut save could not be finished
    there.
    """
    return f"{name}.{save_id}.tmp"


def saved_id(folder: Path) -> str | None:
    """Return the id of the save that wrote the tensors in `folder`; none if they carry none or cannot be read."""
    try:
        with safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
            save_id = (file.metadata() or {}).get(SAVE_ID_KEY, "")
    except (OSError, SafetensorError):
        return None
    # It becomes part of a file's name, and a checkpoint from elsewhere may hold any text here.
    return save_id if re.fullmatch("[0-9a-f]{32}", save_id) else None


def finish_save(folder: Path) -> None:
    """Put the config in place whose tensors already are, if there is one.

    Raises:
        OSError: The config cannot be renamed. Loading finds it under its temporary name all the same.
    """
    pending = _pending_config(folder)
    if pending is not None:
        # The one who saves and any who load may do this at the same time, and one of them is first.
        with contextlib.suppress(FileNotFoundError):
            pending.replace(folder / CONFIG_NAME)


def _pending_config(folder: Path) -> Path | None:
    save_id = saved_id(folder)
    pending = folder / temporary(CONFIG_NAME, save_id or "")
    return pending if save_id and pending.exists() else None


def _tensors(file: Any) -> dict[str, torch.Tensor]:
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the opened file is no mapping


@contextlib.contextmanager
def _opened_weights(folder: Path) -> Iterator[Any]:
    path = folder / WEIGHTS_NAME
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(_missing_file(folder, WEIGHTS_NAME)) from error
    except OSError as error:
        raise CheckpointError(unreadable(path, error)) from error
    except SafetensorError as error:
        with path.open("rb") as raw:
            _check_head(path, raw.read(len(_LFS_POINTER)))
        msg = (
            f"'{path}' ({path.stat().st_size} bytes) is not a whole safetensors file ({error}). Most likely a download "
            "or a copy was cut short: fetch or save the checkpoint again."
        )
        raise CheckpointError(msg) from error


def _parse(path: Path, data: bytes) -> dict[str, Any]:
    _check_head(path, data)
    what = f"'{path}' ({len(data)} bytes)"
    mend = "Mend the file, or fetch or save the checkpoint again."
    try:
        # With "-sig": some editors put a byte order mark in front when a config is edited by hand.
        config = json.loads(data.decode("utf-8-sig"), object_pairs_hook=partial(_unique_keys, what))
    except CheckpointError:
        raise
    except UnicodeDecodeError as error:
        msg = f"{what} is not text in UTF-8: byte {error.start} is 0x{data[error.start]:02x} ({error.reason}). {mend}"
        raise CheckpointError(msg) from error
    except json.JSONDecodeError as error:
        msg = f"{what} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}. {mend}"
        raise CheckpointError(msg) from error
    except RecursionError as error:
        msg = f"{what} is nested too deeply for the config of an adapter. {mend}"
        raise CheckpointError(msg) from error
    except ValueError as error:
        msg = f"{what} holds a value that cannot be read ({error}). {mend}"
        raise CheckpointError(msg) from error
    if not isinstance(config, dict):
        found = type(config).__name__
        msg = f'{what} holds a JSON value of type {found}, and a config is an object: {{"peft_type": ...}}. {mend}'
        raise CheckpointError(msg)
    return config


def _unique_keys(what: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    config = dict(pairs)
    if len(config) < len(pairs):
        doubled = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        msg = f"{what} holds more than once: {listing(doubled)}. Which value counts is not clear: keep one of each."
        raise CheckpointError(msg)
    return config


def _check_head(path: Path, head: bytes) -> None:
    if not head:
        msg = (
            f"'{path}' is empty (0 bytes). Most likely a copy was cut short or the disk was full: fetch or save the "
            "checkpoint again."
        )
        raise CheckpointError(msg)
    if head.startswith(_LFS_POINTER):
        msg = (
            f"'{path}' ({path.stat().st_size} bytes) is a pointer of Git LFS, not the file itself: run `git lfs pull` "
            "in the repository it comes from, or download the file."
        )
        raise CheckpointError(msg)


def _missing_file(folder: Path, name: str) -> str:
    entries = entries_of(folder)
    if name == WEIGHTS_NAME and _PICKLE_NAME in entries:
        return (
            f"'{folder}' holds its tensors as '{_PICKLE_NAME}', a pickle, and loading a pickle can run any code, so "
            f"tunerkit reads '{WEIGHTS_NAME}' only. If you trust the file, convert it once: load the checkpoint with "
            "PEFT and write it again with PEFT's `save_pretrained`, which saves safetensors by default."
        )
    inside = [entry for entry in entries if (folder / entry / CONFIG_NAME).is_file()]
    hint = f"Pass a folder that holds both '{CONFIG_NAME}' and '{WEIGHTS_NAME}'."
    if inside:
        hint = f"Checkpoints are in its folders {listing(inside)}: pass one of them."
    elif _OTHER_FILES & set(entries) and not {CONFIG_NAME, WEIGHTS_NAME} & set(entries):
        hint = f"This looks like a whole model or a trainer's checkpoint, not an adapter. {hint}"
    found = f"holds: {listing(entries)}" if entries else "is empty"
    return f"There is no '{name}' in '{folder}', which {found}. {hint}"
