"""A transformers model as a folder: its config, its safetensors files, and what else there is."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunerkit.checkpoint.files import CONFIG_NAME
from tunerkit.checkpoint.folder import check_folder, entries_of, unreadable
from tunerkit.errors import CheckpointError, CheckpointNotFoundError
from tunerkit.naming import listing
from tunerkit.offline.tensor_file import TensorFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

MODEL_CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_OTHER_WEIGHTS = {".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".safetensors"}
"""Endings of files that hold the model's weights once more, without the adapter."""

_OTHER_FOLDERS = {".cache", ".git", "onnx", "openvino"}
"""Folders that do so, or that belong to where the model was fetched from."""


@dataclass(frozen=True)
class ModelFolder:
    """A model's folder of which the configs and headers have been read, and no tensor.

    Attributes:
        path: The folder.
        config: What `config.json` holds.
        index: What the index of a sharded model holds; None for a model in one file.
        files: The safetensors files, in the order of their names.
    """

    path: Path
    config: dict[str, Any]
    index: dict[str, Any] | None
    files: tuple[TensorFile, ...]

    @classmethod
    def open(cls, folder: Path) -> ModelFolder:
        """Read a model's folder.

        Raises:
            CheckpointError: The folder holds no model in safetensors, or one that is quantised, or a broken file.
        """
        path = check_folder(folder)
        config = read_model_config(path)
        if config.get("quantization_config"):
            msg = (
                f"The model in '{path}' is quantised (its config has a quantization_config), and an adapter can only "
                "be folded into full weights. Pass the folder of the model before it was quantised."
            )
            raise CheckpointError(msg)
        if (path / CONFIG_NAME).exists():
            msg = (
                f"'{path}' holds a model and also '{CONFIG_NAME}', and transformers would load that adapter on top of "
                "what is merged. Move the adapter's files to a folder of their own."
            )
            raise CheckpointError(msg)
        return cls(path, config, *open_weights(path))

    @property
    def where(self) -> dict[str, TensorFile]:
        """The file that holds each tensor, by key."""
        return files_by_key(self.files)

    def others(self) -> tuple[list[Path], list[Path]]:
        """Return what else is in the folder, as paths below it: what belongs to the model, and what is left out.

        Left out are weights in other formats, which would be those without the adapter.
        """
        own = {MODEL_CONFIG, INDEX, *(file.path.name for file in self.files)}
        kept: list[Path] = []
        left: list[Path] = []
        for entry in sorted(self.path.iterdir()):
            if entry.name in own:
                continue
            weights = entry.suffix in _OTHER_WEIGHTS or entry.name.endswith(
                (".bin.index.json", ".safetensors.index.json")
            )
            out = entry.name in _OTHER_FOLDERS if entry.is_dir() else weights
            (left if out else kept).append(entry.relative_to(self.path))
        return kept, left


def open_weights(path: Path) -> tuple[dict[str, Any] | None, tuple[TensorFile, ...]]:
    """Read the headers of the safetensors files in a model's folder, and no tensor.

    Returns:
        What the index of a sharded model holds, None for a model in one file, and the files in the order of their
        names.

    Raises:
        CheckpointError: The folder holds no model in safetensors, or a broken file.
    """
    index = None
    if (path / WEIGHTS).is_file():
        names = [WEIGHTS]
    elif (path / INDEX).is_file():
        index = _read_json(path / INDEX)
        names = _shards(path / INDEX, index)
    else:
        raise CheckpointNotFoundError(_no_weights(path))
    files = tuple(TensorFile.open(path / name) for name in names)
    if index is not None:
        _check_index(path / INDEX, index, files)
    return index, files


def files_by_key(files: Iterable[TensorFile]) -> dict[str, TensorFile]:
    """Return the file that holds each tensor, by key."""
    return {key: file for file in files for key in file.entries}


def read_model_config(path: Path) -> dict[str, Any]:
    """Return what a model's `config.json` holds.

    Raises:
        CheckpointError: It is not there or broken.
    """
    if not (path / MODEL_CONFIG).is_file():
        entries = entries_of(path)
        found = f"holds: {listing(entries)}" if entries else "is empty"
        adapter = f"'{CONFIG_NAME}' is there, so this is an adapter. " if CONFIG_NAME in entries else ""
        msg = (
            f"There is no '{MODEL_CONFIG}' in '{path}', which {found}. {adapter}The base is the folder of a "
            "transformers model."
        )
        raise CheckpointNotFoundError(msg)
    return _read_json(path / MODEL_CONFIG)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(unreadable(path, error)) from error
    except (RecursionError, ValueError) as error:
        msg = f"'{path}' is not valid JSON in UTF-8: {error}. Fetch or save the model again."
        raise CheckpointError(msg) from error
    if not isinstance(values, dict):
        msg = f"'{path}' holds a JSON {type(values).__name__}, not an object. Fetch or save the model again."
        raise CheckpointError(msg)
    return values


def _shards(path: Path, index: Mapping[str, Any]) -> list[str]:
    found = index.get("weight_map")
    places: dict[str, Any] = found if isinstance(found, dict) else {}
    # An index may come from elsewhere, and must not lead out of its folder.
    if not places or not all(isinstance(name, str) and Path(name).name == name for name in places.values()):
        msg = f"'{path}' has no weight_map that names a file beside it for each tensor. Fetch or save the model again."
        raise CheckpointError(msg)
    names = sorted(set(places.values()))
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        msg = f"'{path}' names files that are not there: {listing(missing, 4)}. Fetch the whole model."
        raise CheckpointNotFoundError(msg)
    return names


def _check_index(path: Path, index: Mapping[str, Any], files: tuple[TensorFile, ...]) -> None:
    held = [(key, file.path.name) for file in files for key in file.entries]
    lacking = sorted(key for key, name in set(index["weight_map"].items()) - set(held))
    if lacking:
        msg = f"'{path}' names tensors that its files lack: {listing(lacking, 4)}. Fetch or save the model again."
        raise CheckpointError(msg)
    doubled = sorted(key for key, count in Counter(key for key, _ in held).items() if count > 1)
    if doubled:
        msg = f"Several files beside '{path}' hold the same tensors: {listing(doubled, 4)}. Save the model again."
        raise CheckpointError(msg)


def _no_weights(path: Path) -> str:
    pickles = [name for name in _PICKLES if (path / name).exists()]
    if pickles:
        return (
            f"'{path}' holds its tensors as '{pickles[0]}', a pickle, and loading a pickle can run any code, so "
            "tunerkit reads safetensors only. If you trust the file, convert it once: load the model with transformers "
            "and write it again with its `save_pretrained`."
        )
    return (
        f"There is neither '{WEIGHTS}' nor '{INDEX}' in '{path}', which holds: {listing(entries_of(path))}. The base "
        "is the folder of a transformers model in safetensors."
    )
