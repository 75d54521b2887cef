"""Whether an adapter fits a base model: put onto the model's skeleton, target by target."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tunerkit.checkpoint.report import LoadReport
from tunerkit.errors import CheckpointError, NoMatchingPeftModuleError, TunerkitError, TyingWarning
from tunerkit.functional import cast_adapter_dtype, loading_for
from tunerkit.naming import PREFIX, closest, listing, uncompiled
from tunerkit.offline.keys import by_number, owners_of
from tunerkit.plugins import get_method
from tunerkit.replication import Replication, wanted_ranges
from tunerkit.targeting import base_path
from tunerkit.tuner import BaseTuner

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from torch import Tensor, nn

    from tunerkit.config import PeftConfig
    from tunerkit.offline.keys import Owner

NAME = "default"
"""The name of the adapter on the skeleton."""

Status = Literal["found", "missing", "shape mismatch", "incomplete", "no place"]


@dataclass(frozen=True)
class Target:
    """One module of which a checkpoint holds tensors, or would have to, and how it stands in the base model."""

    path: str
    status: Status
    note: str = ""


@dataclass(frozen=True)
class Fit:
    """How an adapter fits a base model.

    Attributes:
        targets: What the keys name, in the checkpoint's order, and what the adapter lacks beside that.
        tuner: The model with the adapter, if it could be put onto it.
        problem: Why it could not, or empty.
        lacking: The paths of modules that the config means and of which the checkpoint holds nothing.
    """

    targets: tuple[Target, ...]
    tuner: BaseTuner | None = None
    problem: str = ""
    lacking: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the adapter fits."""
        return not self.problem and all(target.status == "found" for target in self.targets)

    @property
    def doubt(self) -> str:
        """A sentence on what the config means and the checkpoint lacks, or empty."""
        if not self.lacking:
            return ""
        return (
            f"The config means {len(self.lacking)} more modules of this model, of which the checkpoint holds nothing: "
            f"{listing(self.lacking, 4)}. They stay as they are in the base. That is right if the adapter was trained "
            "on a model without them, and otherwise tensors were lost: fetch or save the checkpoint again."
        )

    def fitting_tuner(self, adapter: object, base: object) -> BaseTuner:
        """Return the model with the adapter.

        Args:
            adapter: Where the adapter comes from, for the message.
            base: Where the model comes from, likewise.

        Raises:
            CheckpointError: The adapter does not fit.
        """
        if self.fits and self.tuner is not None:
            return self.tuner
        bad = [target for target in self.targets if target.status != "found"]
        shown = "".join(f"\n  {target.path}: {target.status}. {target.note}" for target in bad[:4])
        more = f"\n  and {len(bad) - 4} more" if len(bad) > 4 else ""  # noqa: PLR2004 - as many as are shown
        counted = f" {len(bad)} of its {len(self.targets)} targets do not:{shown}{more}" if bad else f" {self.problem}"
        msg = (
            f"The adapter in '{adapter}' does not fit the model in '{base}'.{counted}\nPass the base model that it was "
            "made for; `tunerkit inspect` with --base shows every target."
        )
        raise CheckpointError(msg)


def match(
    model: nn.Module, config: PeftConfig | None, tensors: Mapping[str, Tensor], owners: Mapping[str, Owner]
) -> Fit:
    """Match a checkpoint with a skeleton, onto which the adapter is put; its tensors are on the meta device too.

    It goes where the config says, as when it is loaded. If its keys say otherwise it goes where they say: the model
    that it was trained on may have been without some of the modules that the config means, such as a pooler.

    Args:
        model: The skeleton.
        config: The adapter's config; None if its method is not known, and then only the modules are looked for.
        tensors: The checkpoint's tensors; on the meta device their shapes do.
        owners: The module that each tensor belongs to, by key.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = _in_base(owners, modules)
    paths: dict[str, list[str]] = {}
    for key, owner in owners.items():
        paths.setdefault(owner.path, []).append(key)
    if config is None:
        return Fit(tuple(_target(path, keys, modules, LoadReport(), []) for path, keys in paths.items()))
    adapted = {owner.path for owner in owners.values() if owner.path and not owner.replaces}
    try:
        planner = _planner(model, config)
        modules = dict(planner.model.named_modules(remove_duplicate=False))
        held = {id(modules[path]) for path in adapted & modules.keys()}
        tuner, lacking = _attach(model, planner, config, tensors, held)
        report = loading_for(tuner, NAME, tensors).report
    except TunerkitError as error:
        # If no module is there, the targets say so better.
        nowhere = isinstance(error, NoMatchingPeftModuleError) and modules.keys().isdisjoint(paths)
        targets = tuple(_target(path, keys, modules, LoadReport(), []) for path, keys in paths.items())
        return Fit(targets, problem="" if nowhere else str(error))
    missing: dict[str, list[str]] = {}
    # What a key means follows from all keys that there should be.
    whole = _in_base(_owners((*tensors, *report.missing_keys), config), modules)
    for key in report.missing_keys:
        missing.setdefault(whole[key].path, []).append(_below(key))
    lost = {path: missing.get(path, []) for path in (*paths, *missing)}
    targets = tuple(_target(path, paths.get(path, []), modules, report, keys) for path, keys in lost.items())
    return Fit(targets, tuner, lacking=lacking)


def _planner(model: nn.Module, config: PeftConfig) -> BaseTuner:
    """Return a tuner to plan with, around the model as the adapter has it, with the layers repeated that it repeats.

    Raises:
        TargetError: The model does not have these layers.
    """
    replication = Replication(model, wanted_ranges(config))
    planner = BaseTuner.around(replication.preview(model))
    planner.replication = replication
    return planner


def _attach(
    model: nn.Module, planner: BaseTuner, config: PeftConfig, tensors: Mapping[str, Tensor], held: set[int]
) -> tuple[BaseTuner, tuple[str, ...]]:
    """Put an adapter onto a skeleton.

    Args:
        model: The skeleton.
        planner: What plans with it.
        config: The adapter's config.
        tensors: The checkpoint's tensors.
        held: The ids of the modules that its keys say are adapted.

    Returns:
        The model with the adapter, and the paths of modules that the config means and the keys do not.

    Raises:
        TunerkitError: It cannot be put there.
    """
    method = get_method(str(config.peft_type)).method
    kind = method.tuner or BaseTuner
    meant = {id(target.module): target.name for target in planner.plan(config).targets}
    # Keys say neither which parameter of a module is meant nor, without the names of a method's entries, which module.
    by_config = getattr(config, "target_parameters", None) or (method.adapter is None and not kind.prefix)
    by_config = by_config or meant.keys() == held
    with warnings.catch_warnings():
        # Said to who trains; what merging does to weights that are shared is in the report.
        warnings.simplefilter("ignore", TyingWarning)
        tuner = kind(model, config, NAME, low_cpu_mem_usage=True, state_dict=None if by_config else dict(tensors))
    cast_adapter_dtype(tuner, NAME)
    return tuner, () if by_config else tuple(name for module, name in meant.items() if module not in held)


def _owners(keys: Iterable[str], config: PeftConfig) -> dict[str, Owner]:
    return owners_of(keys, get_method(str(config.peft_type)), getattr(config, "modules_to_save", None))


def _in_base(owners: Mapping[str, Owner], modules: Collection[str]) -> dict[str, Owner]:
    """Return owners by the paths that they have in the base model, now that its modules are known."""
    return {key: dataclasses.replace(owner, path=base_path(owner.path, modules)) for key, owner in owners.items()}


def _target(
    path: str, keys: list[str], modules: Mapping[str, nn.Module], report: LoadReport, missing: list[str]
) -> Target:
    if path not in modules:
        near = closest(by_number(path), map(by_number, modules))
        return Target(path, "missing", f"Closest: {listing(near)}." if near else "The model has nothing like it.")
    names = {_below(key) for key in keys}
    for note in report.mismatched_keys:
        if _below(note).partition(" is ")[0] in names:
            return Target(path, "shape mismatch", f"{_below(note)}.")
    if missing:
        return Target(path, "incomplete", f"The checkpoint lacks {listing(missing)}.")
    left = [_below(key) for key in report.unexpected_keys if _below(key) in names]
    if left:
        return Target(path, "no place", f"The adapter has no place for {listing(left)}.")
    return Target(path, "found")


def _below(key: str) -> str:
    return uncompiled(key).removeprefix(PREFIX)
