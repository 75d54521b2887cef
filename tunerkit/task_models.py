"""What a task asks of a model beside its adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunerkit.errors import ConfigError
from tunerkit.naming import listing

if TYPE_CHECKING:
    from torch import nn

    from tunerkit.config import PeftConfig

_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""The names of the heads that transformers' models have for a task."""


def refuse_new_head(model: nn.Module, config: PeftConfig) -> None:
    """Refuse tasks whose freshly made head would have to be trained and saved whole, rather than leave it frozen."""
    heads = [name for name in _HEADS.get(str(config.task_type), ()) if name in model._modules]
    if heads:
        msg = (
            f"task_type={str(config.task_type)!r} trains and saves the head {listing(heads)} beside the adapter, which "
            "this version does not. Leave task_type out and train the head yourself: set requires_grad on its "
            "parameters after attaching, and save them with torch.save."
        )
        raise ConfigError(msg)
