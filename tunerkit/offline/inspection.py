"""What a checkpoint holds, read from its config and the header of its tensors; no tensor's data are touched."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tunerkit.checkpoint.files import WEIGHTS_NAME, read_config, read_metadata
from tunerkit.checkpoint.folder import check_folder
from tunerkit.config import PeftConfig
from tunerkit.errors import TunerkitError
from tunerkit.naming import method_id, package_name
from tunerkit.offline.fitting import Fit, match
from tunerkit.offline.keys import Owner, by_number, owners_of
from tunerkit.offline.skeleton import open_skeleton
from tunerkit.offline.tensor_file import TensorFile
from tunerkit.plugins import LoadedMethod, get_method
from tunerkit.settings import default_of, is_empty

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tunerkit.offline.tensor_file import Entry


@dataclass(frozen=True)
class MethodInfo:
    """The method of a checkpoint, and whether it can be used here.

    Attributes:
        peft_type: What the config says.
        id: The method's id; None if `peft_type` is not a method's name.
        package: The package that offers the method, or would.
        version: The version of that package, if it is installed.
        problem: Why the checkpoint cannot be loaded here, and what to do; empty if it can.
    """

    peft_type: Any
    id: str | None
    package: str | None
    version: str | None
    problem: str


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True)
class Adapted:
    """Modules that a checkpoint's keys name, those that differ in their numbers only put together.

    Attributes:
        module: Their path, with `*` for numbers; empty for what the whole model shares.
        holds: The names under which the checkpoint holds tensors of them.
        count: How many modules there are.
        replaces: Whether the tensors are the base model's own, trained as a whole.
    """

    module: str
    holds: tuple[str, ...]
    count: int
    replaces: bool


@dataclass(frozen=True)
class BaseMatch:
    """A checkpoint matched with a base model.

    Attributes:
        folder: The model's folder.
        model: The model's class.
        fits: Whether the adapter fits.
        problem: Why it cannot be put onto the model at all, or empty.
        targets: What the keys name, as dicts with `path`, `status` and `note`.
        lacking: Modules that the config means and of which the checkpoint holds nothing.
        doubt: What that may say, or empty.
    """

    folder: str
    model: str
    fits: bool
    problem: str
    targets: list[dict[str, str]]
    lacking: list[str]
    doubt: str


@dataclass(frozen=True)
class Inspection:
    """What there is to say of a checkpoint.

    Attributes:
        checkpoint: Its folder.
        method: Its method.
        changed: The settings that are away from their defaults; from being empty, where the defaults are not known.
        settings: All settings of the file.
        tensors: The tensors, in the order of the file.
        count: How many numbers they hold in all.
        bytes: Their size in all.
        adapted: What the keys say it adapts.
        metadata: The text beside the tensors.
        base: How it fits a base model, if one was given.
    """

    checkpoint: str
    method: MethodInfo
    changed: dict[str, Any]
    settings: dict[str, Any]
    tensors: list[TensorInfo]
    count: int
    bytes: int
    adapted: list[Adapted]
    metadata: dict[str, str]
    base: BaseMatch | None

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return dataclasses.asdict(self)


def inspect_checkpoint(checkpoint: Path, base: Path | None = None) -> Inspection:
    """Say what a checkpoint holds, also where its method is not installed.

    Args:
        checkpoint: The checkpoint's folder.
        base: A transformers model's folder, of which the config is read, to match the checkpoint with.

    Raises:
        CheckpointError: The checkpoint or the model's config is not there or broken.
        TunerkitError: A base is given and transformers is not installed.
    """
    folder = check_folder(checkpoint)
    values = read_config(folder)
    metadata = read_metadata(folder)  # with better words than the next line for what is no checkpoint
    entries = TensorFile.open(folder / WEIGHTS_NAME).entries
    method, info = _method_of(values)
    config, problem = _config_of(values, info)
    owners = owners_of(entries, method, values.get("modules_to_save"))
    return Inspection(
        checkpoint=str(folder),
        method=dataclasses.replace(info, problem=problem),
        changed=_changed(values, method),
        settings=dict(sorted(values.items())),
        tensors=[TensorInfo(key, entry.shape, entry.dtype, entry.size) for key, entry in entries.items()],
        count=sum(entry.count for entry in entries.values()),
        bytes=sum(entry.size for entry in entries.values()),
        adapted=_adapted(owners),
        metadata=metadata,
        base=None if base is None else _matched(base, values, config, entries, owners),
    )


def _method_of(values: Mapping[str, Any]) -> tuple[LoadedMethod | None, MethodInfo]:
    kind = values.get("peft_type")
    if not isinstance(kind, str):
        problem = f"The config names no method: its peft_type is {kind!r}."
        return None, MethodInfo(kind, None, None, None, problem)
    try:
        name = method_id(kind)
    except TunerkitError as error:
        return None, MethodInfo(kind, None, None, None, str(error))
    try:
        method = get_method(name)
    except TunerkitError as error:
        return None, MethodInfo(kind, name, package_name(name), None, str(error))
    return method, MethodInfo(kind, name, method.distribution, method.version, "")


def _config_of(values: Mapping[str, Any], info: MethodInfo) -> tuple[PeftConfig | None, str]:
    """Return the config as its method's class, and why that cannot be if it cannot."""
    if info.problem:
        return None, info.problem
    try:
        return PeftConfig.from_peft_type(**values), ""
    except TunerkitError as error:
        return None, str(error)


def _changed(values: Mapping[str, Any], method: LoadedMethod | None) -> dict[str, Any]:
    fields = {} if method is None else {item.name: item for item in dataclasses.fields(method.method.config)}
    changed = {}
    for key, value in sorted(values.items()):
        if key == "peft_type":
            continue
        default = default_of(fields[key]) if key in fields else None
        same = value == (sorted(default) if isinstance(default, (set, frozenset)) else default)
        if not same and (key in fields or not is_empty(value)):
            changed[key] = value
    return changed


def _adapted(owners: Mapping[str, Owner]) -> list[Adapted]:
    held: dict[tuple[str, bool], dict[str, None]] = {}
    for owner in owners.values():
        held.setdefault((owner.path, owner.replaces), {})[owner.entry] = None
    groups = Counter((by_number(path), tuple(names), replaces) for (path, replaces), names in held.items())
    return [Adapted(module, names, count, replaces) for (module, names, replaces), count in groups.items()]


def _matched(
    base: Path,
    values: Mapping[str, Any],
    config: PeftConfig | None,
    entries: Mapping[str, Entry],
    owners: Mapping[str, Owner],
) -> BaseMatch:
    folder = check_folder(base)
    skeleton = open_skeleton(folder, values, {owner.path for owner in owners.values()})
    shapes = {key: torch.empty(entry.shape, device="meta") for key, entry in entries.items()}
    fit: Fit = match(skeleton.model, config, shapes, owners)
    targets = [dataclasses.asdict(target) for target in fit.targets]
    return BaseMatch(
        folder=str(folder),
        model=type(skeleton.model).__name__,
        fits=fit.fits,
        problem=fit.problem,
        targets=targets,
        lacking=list(fit.lacking),
        doubt=fit.doubt,
    )
