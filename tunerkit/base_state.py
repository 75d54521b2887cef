"""The base model's own state, under the keys it has without adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from tunerkit.checkpoint.report import LoadReport
from tunerkit.errors import AdapterStateError, CheckpointError
from tunerkit.layer import BaseTunerLayer
from tunerkit.naming import listing
from tunerkit.tuner import tuner_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from tunerkit.tuner import BaseTuner


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state of the base model, under the keys it has without adapters.

    What is merged into its weights is in them. Biases that an adapter trains are the base model's own, in copies, for
    the trained ones take their place while it is active.

    Args:
        model: A `PeftModel`, or a model into which adapters were injected.

    Raises:
        AdapterStateError: The base model's own biases are not to be had: another adapter is merged into those that one
            trains, or they are kept by a `PeftModel` around the model.
    """
    tuner = tuner_of(model)
    tuner.biases.check_kept(tuner.peft_config)
    tuner.biases.check_readable(tuner.layers())
    base, kept = tuner.model, {} if _is_merged(tuner) else tuner.biases.base_values()
    state: dict[str, Any] = base.state_dict(keep_vars=True)
    found = ((own, value) for key, value in state.items() if (own := _base_key(base, key)) is not None)
    return {own: _detached(kept.get(id(value), value)) for own, value in found}


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
        AdapterStateError: Adapters are merged, so that unmerging would put the old values back, or a `PeftModel` around
            the model keeps its own biases.
    """
    tuner = tuner_of(model)
    tuner.biases.check_kept(tuner.peft_config)
    if _is_merged(tuner):
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
    shown = tuner.biases.shown
    try:
        tuner.biases.show(trained=False)
        base.load_state_dict({known[own]: state_dict[own] for own in report.loaded_keys}, strict=False)
    finally:
        tuner.biases.show(trained=shown)
    return report


def _is_merged(tuner: BaseTuner) -> bool:
    return any(layer.merged for layer in tuner.layers())


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value  # what a module saves beside tensors may be anything


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
