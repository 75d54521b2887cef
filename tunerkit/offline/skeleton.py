"""The skeleton of a transformers model: all modules and no tensor data, made from the model's config alone.

This is the only module of the core that speaks to transformers, and it is imported only when a command needs it.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tunerkit.errors import CheckpointError, TunerkitError
from tunerkit.naming import listing
from tunerkit.offline.model_folder import MODEL_CONFIG, read_model_config
from tunerkit.peft_types import AUTO_CLASSES

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from torch import nn

_EXTRA = "Install with: pip install 'tunerkit[merge]'"


@dataclass(frozen=True)
class Names:
    """What the parameters of a model are called, in the model and in files.

    Attributes:
        parameter: Says into which parameter transformers loads a file's tensor: takes its key, and returns the
            parameter's name, which the model may not have, and whether the parameter is computed from the tensor rather
            than equal to it.
        aliases: For each parameter and saved buffer the names of all that are the same tensor, its own among them.
        places: For each module, by its `id`, the paths at which it stands.
    """

    parameter: Callable[[str], tuple[str, bool]]
    aliases: Mapping[str, tuple[str, ...]]
    places: Mapping[int, tuple[str, ...]]


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device.

    Attributes:
        model: The model, a transformers `PreTrainedModel`.
        config: Its config.
    """

    model: nn.Module
    config: Any

    def names(self) -> Names:
        """Return what the model's parameters are called, as long as no adapter stands between them."""
        places: dict[int, list[str]] = {}
        for name, module in self.model.named_modules(remove_duplicate=False):
            places.setdefault(id(module), []).append(name)
        groups: dict[int, list[str]] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            groups.setdefault(id(tensor), []).append(name)
        aliases = {name: tuple(names) for names in groups.values() for name in names}
        return Names(self._renamer(), aliases, {key: tuple(paths) for key, paths in places.items()})

    def _renamer(self) -> Callable[[str], tuple[str, bool]]:
        from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415 - an extra
        from transformers.core_model_loading import (  # noqa: PLC0415 - the same
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )

        mapping = get_model_conversion_mapping(self.model)  # type: ignore[arg-type]
        renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
        converters = [item for item in mapping if isinstance(item, WeightConverter)]
        known = self.model.state_dict()
        prefix: Any = self.model.base_model_prefix

        def parameter(key: str) -> tuple[str, bool]:
            name, pattern = rename_source_key(key, renamings, converters, prefix, known)
            if name not in known and key in known:
                name, pattern = rename_source_key(key, [], [], prefix, known)
            return name, pattern is not None

        return parameter

    def untied(self, config: Mapping[str, Any]) -> Skeleton:
        """Return the skeleton of the same class for a config that says that no embeddings are tied.

        Args:
            config: What `config.json` is to hold.

        Raises:
            CheckpointError: The config cannot be read, or changes more than the ties.
        """
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, MODEL_CONFIG).write_text(json.dumps(config), encoding="utf-8")
            other = _read_config(Path(folder))
        ours, theirs = _values(self.config), _values(other)
        differing = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key) and not key.startswith("_")]
        changed = sorted(key for key in differing if key != "tie_word_embeddings" and not _only_ties(ours, theirs, key))
        if changed:
            msg = (
                f"With tie_word_embeddings=false, {type(other).__name__} also changes {listing(changed)}, so the "
                "merged model would compute something else. Load the model, call merge_and_unload() and save that."
            )
            raise CheckpointError(msg)
        return _build(type(self.model), other)


def open_skeleton(folder: Path, adapter: Mapping[str, Any], paths: Collection[str]) -> Skeleton:
    """Return the skeleton of the model in a folder, of the class that an adapter was made for.

    The config's own class need not be that: an adapter may have been trained on the model without its head, or with
    another. The first class that has all of the adapter's modules is taken.

    Args:
        folder: The model's folder; only its config is read.
        adapter: The adapter's config, which may name a class or a task.
        paths: The paths of the modules that the adapter's tensors belong to.

    Raises:
        TunerkitError: transformers is not installed.
        CheckpointError: transformers cannot make the model.
    """
    own = read_model_config(folder)
    check_transformers()
    config = _read_config(folder)
    found = []
    for kind in _classes(own, adapter, config):
        skeleton = _build(kind, config)
        if set(paths) <= {name for name, _ in skeleton.model.named_modules(remove_duplicate=False)}:
            return skeleton
        found.append(skeleton)
    if not found:
        names = listing(own.get("architectures") or ())
        msg = f"transformers has no model class for '{folder / MODEL_CONFIG}' (architectures: {names})."
        raise CheckpointError(msg)
    # None fits. What is missing is said of the class that has the most.
    return max(found, key=lambda one: _fitting(one, paths))


def check_transformers() -> None:
    """Raise `TunerkitError` if transformers is not installed, or too old to say how it renames what it loads."""
    if find_spec("transformers") is None:
        msg = f"To know a base model from its folder, tunerkit needs transformers, which is not installed. {_EXTRA}"
        raise TunerkitError(msg)
    # Read when transformers is first imported: all files are local, so no network may be asked.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if find_spec("transformers.core_model_loading") is None:
        msg = f"tunerkit needs transformers 5 or newer, which can say how it renames what it loads. {_EXTRA}"
        raise TunerkitError(msg)


def _read_config(folder: Path) -> Any:
    from transformers import AutoConfig  # noqa: PLC0415 - an extra, and slow

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a value makes a config's checks raise
        msg = (
            f"transformers cannot read '{folder / MODEL_CONFIG}': {error}\nCode that a model brings along is not run. "
            "For such a model load it yourself and call merge_and_unload()."
        )
        raise CheckpointError(msg) from error


def _classes(own: Mapping[str, Any], adapter: Mapping[str, Any], config: Any) -> Iterator[type[nn.Module]]:
    """Go through the classes that the model may be of, each once: what the adapter says, the folder, the bare model."""
    import transformers  # noqa: PLC0415 - an extra, and slow

    auto = adapter.get("auto_mapping")
    named = [auto.get("base_model_class")] if isinstance(auto, dict) else []
    seen: set[type[nn.Module]] = set()
    for name in (*named, *(own.get("architectures") or ())):
        kind = getattr(transformers, name, None) if isinstance(name, str) else None
        fits = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
        if fits and kind.config_class in (None, type(config)) and kind not in seen:  # type: ignore[union-attr]
            seen.add(kind)  # type: ignore[arg-type]
            yield kind  # type: ignore[misc]
    task = adapter.get("task_type")
    for name in (AUTO_CLASSES.get(task) if isinstance(task, str) else None, "AutoModel"):
        kind = None if name is None else getattr(transformers, name)._model_mapping.get(type(config), None)
        for one in kind if isinstance(kind, (list, tuple)) else (kind,):
            if one is not None and one not in seen:
                seen.add(one)
                yield one


def _build(kind: type[nn.Module], config: Any) -> Skeleton:
    try:
        with torch.device("meta"):
            model = kind(copy.deepcopy(config))
    except Exception as error:  # whatever a config makes a model's constructor raise
        msg = (
            f"transformers cannot make a {kind.__name__} from the base model's config: {type(error).__name__}: {error}"
        )
        raise CheckpointError(msg) from error
    return Skeleton(model.eval(), config)


def _fitting(skeleton: Skeleton, paths: Collection[str]) -> int:
    return len(set(paths) & {name for name, _ in skeleton.model.named_modules(remove_duplicate=False)})


def _values(config: Any) -> dict[str, Any]:
    """Return all that a config says, also what it derives from its file and does not save."""
    return {key: value.to_dict() if hasattr(value, "to_dict") else value for key, value in vars(config).items()}


def _only_ties(ours: Mapping[str, Any], theirs: Mapping[str, Any], key: str) -> bool:
    """Return whether two values are configs within the config that differ in their ties only."""
    mine, other = ours.get(key), theirs.get(key)
    if not isinstance(mine, dict) or not isinstance(other, dict):
        return False
    return {**mine, "tie_word_embeddings": None} == {**other, "tie_word_embeddings": None}
