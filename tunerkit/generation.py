"""What the core has to know of transformers' `generate`, without importing it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn


def repeats_in_generate(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return how often a call of `generate` repeats each row: as many as beams, or as returned sequences.

    The call's own settings come before those of the config that is passed, and those before the model's config.

    Args:
        model: The base model.
        args: The arguments of the call; the second is a generation config.
        kwargs: The same, by name.
    """
    passed = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    own = getattr(model, "generation_config", None)
    places = (kwargs, *(vars(config) for config in (passed, own) if config is not None))
    counts = (next((place[name] for place in places if place.get(name) is not None), 1) for name in _REPEATING)
    return max(1, *counts)


_REPEATING = ("num_beams", "num_return_sequences")
