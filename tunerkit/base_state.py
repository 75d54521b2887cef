"""The base model's own state, under the keys it has without adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunerkit.checkpoint.report import LoadReport
from tunerkit.errors import AdapterStateError, CheckpointError
from tunerkit.journal import Journal
from tunerkit.layer import BaseTunerLayer
from tunerkit.naming import listing
from tunerkit.tuner import BaseTuner, find_tuner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state of the base model, under the keys it has without adapters.

    What is merged into its weights is in them. Biases that an adapter trains are the base model's own unless it is
    merged.

    Args:
        model: A `PeftModel`, or a model into which adapters were injected.
    """
    tuner = _tuner_of(model)
    base, biases = tuner.model, tuner.biases
    state = base.state_dict()
    if biases.shown and not any(layer.merged for layer in tuner.layers()):
        kept = {id(parameter): value for parameter, value in zip(biases.parameters(), biases.kept, strict=True)}
        state.update({key: kept[id(p)] for key, p in base.state_dict(keep_vars=True).items() if id(p) in kept})
    return {own: value for key, value in state.items() if (own := _base_key(base, key)) is not None}


def set_base_model_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> LoadReport:
    """Put the state of a base model into one that has adapters, which stay as they are.

    Args:
        model: A `PeftModel`, or a model into which adapters were injected.
        state_dict: The state, under the keys that the base model has without adapters.
        strict: Refuse missing and unexpected keys rather than report them.

    Returns:
        The report, with PEFT's `missing_keys` and `unexpected_keys`.

    Raises:
        CheckpointError: Keys are missing or unexpected and `strict` is set, or shapes differ; nothing was changed.
        AdapterStateError: Adapters are merged, so that unmerging would put the old values back.
    """
    tuner = _tuner_of(model)
    if any(layer.merged for layer in tuner.layers()):
        msg = "Adapters are merged, so unmerging would put the old weights back. Call unmerge_adapter() first."
        raise AdapterStateError(msg)
    base = tuner.model
    current = base.state_dict()
    known = {own: key for key in current if (own := _base_key(base, key)) is not None}
    report = LoadReport(
        missing_keys=[own for own in known if own not in state_dict],
        unexpected_keys=[key for key in state_dict if key not in known],
        loaded_keys=[own for own in known if own in state_dict],
    )
    for own in report.loaded_keys:
        theirs, ours = getattr(state_dict[own], "shape", None), getattr(current[known[own]], "shape", None)
        if theirs != ours:
            report.mismatched_keys.append(f"{own} is {_size(theirs)}, the model's {_size(ours)}")
    _refuse(report, strict=strict)
    with Journal() as journal:
        biases, shown = tuner.biases, tuner.biases.shown
        biases.note(journal)
        biases.show(trained=False)
        base.load_state_dict({known[own]: state_dict[own] for own in report.loaded_keys}, strict=False)
        biases.show(trained=shown)
    return report


def _tuner_of(model: nn.Module) -> BaseTuner:
    return find_tuner(model) or BaseTuner.around(model)


def _size(shape: tuple[int, ...] | None) -> str:
    return "no tensor" if shape is None else str(tuple(shape))


def _refuse(report: LoadReport, *, strict: bool) -> None:
    found = [
        f"{text}: {listing(keys, 4)}"
        for text, keys in (
            ("missing", report.missing_keys if strict else []),
            ("unexpected", report.unexpected_keys if strict else []),
            ("of another shape", report.mismatched_keys),
        )
        if keys
    ]
    if found:
        way = "" if report.mismatched_keys else ", or pass strict=False to load what fits"
        msg = f"The state dict does not fit the base model; {'; '.join(found)}. Pass that of this very model{way}."
        raise CheckpointError(msg)


def _base_key(model: nn.Module, key: str) -> str | None:
    """Return the key that an entry of a model's state has without adapters, or None if it belongs to one."""
    module: nn.Module | None = model
    parts = []
    for part in key.split("."):
        holder: object = module
        if not isinstance(holder, BaseTunerLayer):
            parts.append(part)
        elif part != holder.base_name:
            return None
        module = module._modules.get(part) if module is not None else None
    return ".".join(parts)
