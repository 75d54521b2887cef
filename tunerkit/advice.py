"""What to say when a plan matched nothing, or an entry of its config did: the closest names, the likeliest mistake."""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING

from tunerkit.errors import ConfigWarning, TargetWarning, TyingWarning
from tunerkit.naming import closest, listing, shown
from tunerkit.targeting import ALL_LINEAR, is_linear, match_name, modules_outside_adapters

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import nn

    from tunerkit.plan import Plan


def nothing_matched(model: nn.Module, plan: Plan, from_state: bool) -> str:
    """Return why a plan has no targets.

    Args:
        model: The model.
        plan: The plan.
        from_state: Whether the keys of a state dict were to say what to adapt.
    """
    names = [decision.name for decision in plan.decisions]
    if from_state:
        return (
            f"No key of the state dict belongs to a module of the model, which has {listing(names)}. Pass the tensors "
            "of an adapter that was made for this model."
        )
    wanted = list(plan.entries)
    if not wanted:
        return f"The config targets nothing: set target_modules to names of modules, a pattern, or {ALL_LINEAR!r}."
    modules, parameters = (getattr(plan.config, name, None) for name in ("target_modules", "target_parameters"))
    where = "target_parameters" if parameters and not modules else "target_modules"
    target = f"{where}={_shown(getattr(plan.config, where))}"
    if any(plan.entries.values()) and any(item.reason == "layers_to_transform" for item in plan.decisions):
        settings = {name: getattr(plan.config, name, None) for name in ("layers_to_transform", "layers_pattern")}
        chosen = ", ".join(f"{name}={value!r}" for name, value in settings.items() if value is not None)
        first = next(item.name for item in plan.decisions if item.reason == "layers_to_transform")
        return (
            f"{target} matches modules such as {first!r}, and none that is in a layer which {chosen} means. A layer's "
            "number stands in the path after a name, which layers_pattern can give."
        )
    if any(plan.entries.values()):
        without = [
            f"{name}={_shown(left)}"
            for name in ("exclude_modules", "modules_to_save")
            if (left := getattr(plan.config, name, None))
        ]
        return (
            f"{target} matches {sum(plan.entries.values())} modules, and all of them are excluded by "
            f"{' and '.join(without)}. Exclude fewer, or target others."
        )
    return f"{target} matches nothing in the model. {_advice(model, plan, wanted, names)}"


def _advice(model: nn.Module, plan: Plan, wanted: list[str], names: list[str]) -> str:
    text = isinstance(getattr(plan.config, "target_modules", None), str)
    if any(re.sub(r"[\W_]", "", entry.lower()) == ALL_LINEAR.replace("-", "") for entry in wanted):
        return f"Did you mean {ALL_LINEAR!r}?" if text else f"For all linear layers pass the text, {ALL_LINEAR!r}."
    if text and any(match_name(wanted, name) for name in names):
        return (
            f"{wanted[0]!r} is text, so it is a pattern for whole paths. For modules of that name pass a list: "
            f"target_modules={wanted}."
        )
    near = [name for entry in wanted for name in _near(entry, names)]
    linear = dict.fromkeys(
        key.rpartition(".")[2] for key, module in modules_outside_adapters(model) if is_linear(module)
    )
    hint = f"The model has {listing(names)}."
    if near:
        hint = f"Closest names: {listing(dict.fromkeys(near))}."
    elif linear:
        hint = f"The names of its linear layers end in {listing(linear)}."
    return (
        f"{hint} An entry is a whole path or its end after a dot; text that is not in a list is a pattern for the "
        f"whole path; {ALL_LINEAR!r} means all linear layers."
    )


def _shown(entries: Collection[str] | str | None) -> str:
    return shown(entries) if isinstance(entries, str) else f"[{listing(sorted(entries or ()))}]"


def closest_to(entry: str, names: list[str]) -> str:
    """Return text that names what is closest to an entry, to be put after it."""
    near = _near(entry, names)
    return f"; closest: {listing(near)}" if near else ""


def _near(entry: str, names: list[str]) -> list[str]:
    depth = entry.count(".") + 1
    return closest(entry, [*(".".join(name.split(".")[-depth:]) for name in names), *names])


def warn_of(plan: Plan, biases: str | None) -> None:
    """Say what a user should know of a plan that was carried out.

    Args:
        plan: The plan.
        biases: The setting by which biases were to be trained, if there were none to train.
    """
    unmatched = plan.unmatched()
    if biases is not None:
        unmatched.append(f"bias={biases!r} trains nothing, for there is no bias to train")
    for sentence in unmatched:
        warnings.warn(TargetWarning(f"{sentence}. The other entries were matched."), stacklevel=3)
    for sentence in plan.corrections:
        warnings.warn(ConfigWarning(f"{sentence}; it was corrected in the completed config."), stacklevel=3)
    for sentence in plan.ties:
        warnings.warn(TyingWarning(sentence), stacklevel=3)
