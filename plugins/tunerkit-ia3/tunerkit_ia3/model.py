"""`IA3Layer` and `IA3Model`: what holds IA3 adapters, and what only such a model can do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tunerkit import BaseTuner, BaseTunerLayer
from tunerkit.combine import weighted_sum
from tunerkit.errors import CombinationError
from tunerkit.weighted import add_combined, check_call
from tunerkit_ia3.targets import DEFAULT_TARGETS

if TYPE_CHECKING:
    from collections.abc import Sequence


class IA3Layer(BaseTunerLayer, method="ia3"):
    """A layer is one exactly while it holds an IA3 adapter."""


class IA3Model(BaseTuner, method="ia3"):
    """A tuner is one exactly while it holds an IA3 adapter."""

    prefix = "ia3_"
    tuner_layer_cls = IA3Layer
    target_module_mapping = DEFAULT_TARGETS

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add an adapter whose factors are the weighted sums of those of others; it is not active yet.

        Weights that sum to one interpolate. A layer that one of the adapters leaves alone counts with factors of one.

        Args:
            adapters: The names of the others.
            weights: A weight for each.
            adapter_name: The name of the new adapter.

        Raises:
            AdapterNameError: The name is illegal or taken.
            UnknownAdapterError: The model has none of one of the names.
            CombinationError: The adapters cannot be combined; the model is as it was.
        """
        entries: set[str] = set()
        for name in check_call(self, adapters, weights, adapter_name):
            wanted: Any = getattr(self.peft_config[name], "feedforward_modules", None)
            if isinstance(wanted, str):
                msg = (
                    f"feedforward_modules of {name!r} is a pattern, {wanted!r}; to combine, give both a list of names."
                )
                raise CombinationError(msg)
            entries.update(wanted or ())
        add_combined(self, adapters, weights, adapter_name, _fill, feedforward_modules=entries)


def _fill(path: str, new: Any, parts: list[tuple[Any, float]]) -> None:
    here = [adapter for adapter, _ in parts if adapter is not None]
    if any(adapter.is_feedforward != new.is_feedforward for adapter in here):
        msg = f"On {path!r} one of the adapters rescales the inputs and another the outputs, so their factors differ."
        raise CombinationError(msg)
    with torch.no_grad():
        factors = [torch.ones_like(new.ia3_l) if adapter is None else adapter.ia3_l for adapter, _ in parts]
        new.ia3_l.copy_(weighted_sum(factors, [weight for _, weight in parts]))
