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
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from tunerkit.checkpoint.folder import check_file, check_folder, entries_of, unreadable
from tunerkit.checkpoint.header import broken, check_unique, raw_header, unique_keys, what_it_is
from tunerkit.checkpoint.mapping import Mapped, map_tensors
from tunerkit.errors import CheckpointError, CheckpointNotFoundError
from tunerkit.naming import listing

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence
    from pathlib import Path

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
SAVE_ID_KEY = "tunerkit_save_id"
"""The entry of the tensors' metadata that holds the id of the save that wrote them (32 hexadecimal digits)."""

CARD_NAME = "README.md"

TEMPORARY = re.compile(
    rf"(?:{'|'.join(map(re.escape, (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME)))})\.([0-9a-f]{{32}})\.tmp"
)
"""What the names of a save's temporaries look like; the group is the save's id."""

_PICKLE_NAMES = [f"adapter_model{ending}" for ending in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
_OTHER_FILES = {
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "trainer_state.json",
}
"""What a whole model, or a trainer's checkpoint of one, has among its files."""

_LARGEST_CONFIG = 16 << 20
"""Bytes. The config of an adapter that names every module of a large model has a tenth of it."""

_DEEPEST_CONFIG = 50
"""How deep a config may be nested, as when it is saved: what copies it goes down as deep."""


class Checkpoint(NamedTuple):
    """What one checkpoint holds."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


def read_checkpoint(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> Checkpoint:
    """Return the config, the tensors and the metadata of one and the same save, even while another is written.

    On the CPU the tensors lie in the mapped file, as those of `read_tensors` do, but mostly all in one storage, so they
    are to be copied to where they belong.

    Raises:
        CheckpointError: A file is broken, or is not one that can be read (see `read_config`, `read_tensors`).
        CheckpointNotFoundError: The folder or one of the two files is not there.
    """
    path = check_folder(folder)
    while True:
        with _reading_weights(path) as weights:
            mapped = map_tensors(weights) or _read_each(weights)
        config = read_config(path)
        with _reading_weights(path) as weights:
            unchanged = raw_header(weights) == mapped.header
        # A save that came in between changed the id, and the config may be the newer one's.
        if unchanged:
            return Checkpoint(config, _moved(mapped.tensors, device), mapped.metadata)


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what `adapter_config.json` holds, after finishing a save that was cut.

    Raises:
        CheckpointError: The file cannot be read, is not JSON in UTF-8, holds a key twice, or holds no JSON object.
        CheckpointNotFoundError: The folder or the file is not there.
    """
    folder = check_folder(folder)
    path = folder / CONFIG_NAME
    try:
        if _any_pending(folder) and path.is_symlink():
            path = _pending_config(folder) or path  # a store of links, as the hub's cache is: nothing is moved there
        elif _any_pending(folder):
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
        CheckpointError: The file cannot be read, is not JSON in UTF-8, holds a key twice, holds no JSON object, or is
            larger or deeper than any config of an adapter.
        CheckpointNotFoundError: The file is not there.
    """
    try:
        check_file(path)
        size = path.stat().st_size
        data = path.read_bytes() if size <= _LARGEST_CONFIG else None
    except FileNotFoundError as error:
        msg = f"There is no file '{path}'. Check the path."
        raise CheckpointNotFoundError(msg) from error
    except OSError as error:
        raise CheckpointError(unreadable(path, error)) from error
    if data is None:
        msg = f"'{path}' ({size} bytes) is too large for the config of an adapter. Fetch or save the checkpoint again."
        raise CheckpointError(msg)
    return _parse(path, data)


def read_tensors(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """Return the tensors of `adapter_model.safetensors` by key.

    On the CPU they lie in the mapped file, privately: they may be written to, and the file stays as it is. Each has a
    storage of its own.

    Args:
        folder: The checkpoint's folder.
        device: Where the tensors shall be.

    Raises:
        CheckpointError: The file is truncated, damaged or no safetensors file, or there is only a pickled one.
        CheckpointNotFoundError: The folder or the file is not there.
    """
    with _reading_weights(check_folder(folder)) as weights:
        tensors = _read_each(weights).tensors
    # Moved out here, so that a device that is not there is not taken for a damaged file.
    return _moved(tensors, device)


def read_metadata(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Return the metadata of `adapter_model.safetensors`; empty if it has none.

    Raises:
        CheckpointError: As `read_tensors`.
        CheckpointNotFoundError: As `read_tensors`.
    """
    with _reading_weights(check_folder(folder)) as weights, safe_open(weights, framework="pt") as file:
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
        check_file(folder / WEIGHTS_NAME)
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


def _any_pending(folder: Path) -> bool:
    """Return whether a config may wait to be put in place, told without reading what the tensors' file says of itself.

    Raises:
        OSError: The folder may be entered and not listed.
    """
    return any(entry.name.startswith(f"{CONFIG_NAME}.") for entry in folder.iterdir())


def _pending_config(folder: Path) -> Path | None:
    save_id = saved_id(folder)
    pending = folder / temporary(CONFIG_NAME, save_id or "")
    return pending if save_id and pending.exists() else None


def _read_each(path: Path) -> Mapped:
    """Return what a file holds, with a storage for each tensor."""
    header = raw_header(path)
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        check_unique(path, header, len(names))
        try:
            tensors = {name: file.get_tensor(name) for name in names}
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            # A header that safetensors accepts may say what torch cannot make: a dtype it lacks, a size too large.
            raise CheckpointError(broken(path, error)) from error
        return Mapped(tensors, file.metadata() or {}, header)


def _moved(tensors: dict[str, torch.Tensor], device: str | torch.device) -> dict[str, torch.Tensor]:
    if torch.device(device).type == "cpu":
        return tensors
    return {name: tensor.to(device) for name, tensor in tensors.items()}


@contextlib.contextmanager
def _reading_weights(folder: Path) -> Iterator[Path]:
    """Give the path of a checkpoint's tensors to a block, and say what is wrong where it cannot read them."""
    path = folder / WEIGHTS_NAME
    try:
        check_file(path)
        yield path
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(_missing_file(folder, WEIGHTS_NAME)) from error
    except OSError as error:
        raise CheckpointError(unreadable(path, error)) from error
    except SafetensorError as error:
        raise CheckpointError(broken(path, error)) from error


def _parse(path: Path, data: bytes) -> dict[str, Any]:
    if other := what_it_is(path, data, len(data)):
        raise CheckpointError(other)
    what = f"'{path}' ({len(data)} bytes)"
    mend = "Mend the file, or fetch or save the checkpoint again."
    deep = f"{what} is nested too deeply for the config of an adapter. {mend}"
    try:
        # With "-sig": some editors put a byte order mark in front when a config is edited by hand.
        config = json.loads(data.decode("utf-8-sig"), object_pairs_hook=partial(unique_keys, what))
    except CheckpointError:
        raise
    except UnicodeDecodeError as error:
        msg = f"{what} is not text in UTF-8: byte {error.start} is 0x{data[error.start]:02x} ({error.reason}). {mend}"
        raise CheckpointError(msg) from error
    except json.JSONDecodeError as error:
        msg = f"{what} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}. {mend}"
        raise CheckpointError(msg) from error
    except RecursionError as error:
        raise CheckpointError(deep) from error
    except ValueError as error:
        msg = f"{what} holds a value that cannot be read ({error}). {mend}"
        raise CheckpointError(msg) from error
    if not isinstance(config, dict):
        found = type(config).__name__
        msg = f'{what} holds a JSON value of type {found}, and a config is an object: {{"peft_type": ...}}. {mend}'
        raise CheckpointError(msg)
    if _depth(config) > _DEEPEST_CONFIG:
        raise CheckpointError(deep)
    return config


def _depth(value: Any) -> int:
    """Return how many lists and objects lie in one another at most, counted without going down by calls."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        level = [item for held in level for item in (held.values() if isinstance(held, dict) else held)]
    return depth


def _missing_file(folder: Path, name: str) -> str:
    entries = entries_of(folder)
    inside = [entry for entry in entries if (folder / entry / CONFIG_NAME).is_file()]
    return missing_file(f"'{folder}'", name, entries, inside)


def missing_file(place: str, name: str, entries: Sequence[str], inside: Sequence[str]) -> str:
    """Return the message for a checkpoint that lacks one of its files.

    Args:
        place: What was looked into: a folder in quotes, or a repository.
        name: The file.
        entries: The names there, sorted.
        inside: Those of folders there that hold a checkpoint.
    """
    pickles = [entry for entry in _PICKLE_NAMES if entry in entries]
    if name == WEIGHTS_NAME and pickles:
        return (
            f"{place} holds its tensors as '{pickles[0]}', a pickle, and loading a pickle can run any code, so "
            f"tunerkit reads '{WEIGHTS_NAME}' only. If you trust the file, convert it once: load the checkpoint with "
            "PEFT and write it again with PEFT's `save_pretrained`, which saves safetensors by default."
        )
    hint = f"Pass a folder that holds both '{CONFIG_NAME}' and '{WEIGHTS_NAME}'."
    if inside:
        hint = f"Checkpoints are in its folders {listing(inside)}: pass one of them."
    elif _OTHER_FILES & set(entries) and not {CONFIG_NAME, WEIGHTS_NAME} & set(entries):
        hint = f"This looks like a whole model or a trainer's checkpoint, not an adapter. {hint}"
    found = f"holds: {listing(entries)}" if entries else "is empty"
    return f"There is no '{name}' in {place}, which {found}. {hint}"
