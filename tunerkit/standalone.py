"""Turning a saved adapter into one that stands on the unchanged base model by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunerkit.checkpoint.files import read_checkpoint
from tunerkit.checkpoint.state import make_standalone
from tunerkit.functional import pieces_of

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torch import Tensor, nn

    from tunerkit.config import PeftConfig


def standalone(
    model: nn.Module,
    name: str,
    config: PeftConfig,
    tensors: Mapping[str, Tensor],
    initial_folder: str | os.PathLike[str] | None,
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Return the config and the tensors of an adapter in its standalone form; see `Adapter.standalone`.

    Args:
        model: The model that holds it.
        name: Its name.
        config: Its config.
        tensors: Its tensors by their keys in a checkpoint.
        initial_folder: Where it was saved before training; it is only read. It is not needed, and not looked at, of an
            adapter that is always saved so: what was saved before training has this form too.

    Raises:
        ConfigError: The method has no such form.
        CheckpointError: The initial adapter cannot be read, or is not this one's.
    """
    converted = config.standalone()
    initial = None if initial_folder is None or config.saved_standalone else read_checkpoint(initial_folder).tensors
    return converted, make_standalone(pieces_of(model, name), tensors, initial)
