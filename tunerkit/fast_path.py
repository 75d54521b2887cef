"""Keeping torch's encoders from running past the layers with adapters in them.

In evaluation without gradients `nn.TransformerEncoderLayer` hands the weights of all its layers to one fused operation
and calls none of them, and `nn.TransformerEncoder` packs padded batches for that into nested tensors. An adapter would
have no effect there, without a word. So while an encoder holds layers with adapters it is told that the fast path is
not for it, by the attribute that torch itself sets for such encoders.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from tunerkit.adapted_layer import AdaptedLayer
from tunerkit.layer import layers_in
from tunerkit.sites import AttentionSite, OutputProjectionSite
from tunerkit.targeting import bare

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tunerkit.journal import Journal

_SWITCHES: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu"),
    (nn.TransformerEncoder, "use_nested_tensor"),
)
"""What torch's encoders ask before they take the fast path: no, if it is false."""

ENCODERS = tuple(kind for kind, _ in _SWITCHES)
"""Torch's encoders."""

_BEFORE = "_fast_path_before_adapters"
"""Where an encoder that must not take it keeps what it said; on the encoder, for it may be copied or pickled."""


def set_fast_paths(
    model: nn.Module, journal: Journal, *, disabled: bool, encoders: Iterable[nn.Module] | None = None
) -> None:
    """Let the encoders in a model take their fast path exactly if the layers in them need not be called.

    Args:
        model: The model.
        journal: Where each change is noted before it is made.
        disabled: Whether the adapters are switched off.
        encoders: The encoders that are in the model, if they are known.
    """
    for module in _encoders(model) if encoders is None else (model, *encoders):
        state = module.__dict__
        for kind, switch in _SWITCHES:
            # An encoder from an old file may lack the switch, and then it does not take the fast path at all.
            if not isinstance(module, kind) or switch not in state:
                continue
            leaves = not disabled and _must_be_called(module)
            if leaves == (_BEFORE in state):
                continue
            journal.note_module(module)
            if leaves:
                state[_BEFORE], state[switch] = state[switch], False
            else:
                state[switch] = state.pop(_BEFORE)


def _encoders(module: nn.Module) -> list[nn.Module]:
    """Return the encoders that a module is and holds; of layers with adapters only the base is entered."""
    found, left = [], [module]
    for one in left:  # which grows meanwhile
        if isinstance(one, ENCODERS):
            found.append(one)
        for child in one._modules.values():
            base = None if child is None else bare(child)
            if base is not None and base._modules:
                left.append(base)
    return found


def _must_be_called(encoder: nn.Module) -> bool:
    """Return whether the encoder holds adapters other than those that are in what it reads of its attention."""
    layers = layers_in(encoder)
    return not all(
        isinstance(layer, AdaptedLayer) and isinstance(layer.site, (AttentionSite, OutputProjectionSite))
        for layer in layers
    )
