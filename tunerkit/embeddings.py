"""Saving the base model's embeddings beside an adapter, as PEFT does where they were resized or are adapted."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from tunerkit.adapted_layer import AdaptedLayer
from tunerkit.checkpoint.base_model import BasePiece, base_modules, file_path
from tunerkit.errors import AdapterStateError, ConfigError, SaveWarning
from tunerkit.folding import refusal
from tunerkit.layer import BaseTunerLayer, layers_in, tuner_layers
from tunerkit.model_config import config_of, embedding_layers
from tunerkit.naming import listing
from tunerkit.targeting import bare, places, wants_all_linear

if TYPE_CHECKING:
    from torch import Tensor

    from tunerkit.checkpoint.state import Piece
    from tunerkit.config import PeftConfig

NAMES = ("embed_tokens", "lm_head")
"""What PEFT takes for an embedding among the targets."""


def embeddings_to_save(model: nn.Module, config: PeftConfig, name: str, prefix: str, choice: object) -> list[Piece]:
    """Return what a checkpoint of an adapter is to hold of the base model's input and output embeddings.

    Args:
        model: The base model with the layers.
        config: The adapter's config.
        name: The adapter's name.
        prefix: What stands before the layers' paths in keys.
        choice: Whether to save them; "auto" does if they are targeted, or if the model's vocabulary is not of the size
            that the folder says from which the model came.

    Raises:
        ConfigError: The choice is something else.
    """
    if choice not in ("auto", True, False):
        msg = f"save_embedding_layers must be 'auto', True or False; it is {choice!r}."
        raise ConfigError(msg)
    targeted = _are_targeted(model, config)
    if choice == "auto":
        reason = _reason(model, config, targeted=targeted)
        if reason is None:
            return []
        msg = f"The base model's embeddings are saved with the adapter {name!r}, because {reason}."
        warnings.warn(SaveWarning(f"{msg} Pass save_embedding_layers=False if they are not to be."), stacklevel=4)
    elif not choice:
        return []
    layers = _embeddings(model)
    if not layers:
        msg = (
            f"save_embedding_layers={choice!r}, but {type(model).__name__} has no get_input_embeddings() that says "
            "which layers are the embeddings, so none are saved."
        )
        warnings.warn(SaveWarning(msg), stacklevel=4)
    # If one of the two is targeted, PEFT saves the one that is.
    return [
        BasePiece(file_path(path, prefix), module, name, _own(model, module))
        for path, module, _ in base_modules(model, name)
        if any(bare(layer) is module and (not targeted or isinstance(layer, BaseTunerLayer)) for layer in layers)
    ]


def embeddings_to_load(model: nn.Module, name: str, prefix: str) -> list[Piece]:
    """Return what a checkpoint of an adapter may hold of the base model's embeddings, under each key it may have.

    Raises:
        AdapterStateError: Adapters are merged into an embedding.
    """
    embeddings = [bare(layer) for layer in _embeddings(model)]
    if not embeddings:
        return []
    found: list[Piece] = []
    for path, module, place in base_modules(model, name):
        if any(module is embedding for embedding in embeddings):
            forms = [path, place if path != place else f"{path}.{BaseTunerLayer.base_name}"]
            found += [BasePiece(file_path(form, prefix), module, name, _own(model, module)) for form in forms]
    return found


def check_writable(model: nn.Module, pieces: list[Piece]) -> None:
    """Raise `AdapterStateError` if adapters are merged into the modules whose tensors are to be loaded."""
    for path, layer in tuner_layers(model) if pieces else ():
        if layer.merged and any(layer.get_base_layer() is piece.holder for piece in pieces):
            msg = (
                f"The checkpoint holds the weight of {path!r}, into which {listing(layer.merged_adapters)} is merged. "
                "Call unmerge_adapter() first."
            )
            raise AdapterStateError(msg)


def _own(model: nn.Module, module: nn.Module) -> dict[str, Tensor]:
    """Return a module's own tensors, also where adapters are merged into it."""
    tensors: dict[str, Tensor] = module.state_dict(keep_vars=True)
    for layer in layers_in(model):
        if isinstance(layer, AdaptedLayer) and layer.get_base_layer() is module:
            if not layer.keeps_base:
                raise refusal(layer.site.name, layer.merged_adapters)
            tensors.update({key: value for key, value in layer.originals.items() if value is not None})
    return tensors


def _embeddings(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in embedding_layers(model) if isinstance(layer, nn.Module)]


def _are_targeted(model: nn.Module, config: PeftConfig) -> bool:
    targets = getattr(config, "target_modules", None) or ()
    if not isinstance(targets, str):
        return any(name in targets for name in NAMES)
    if wants_all_linear(config):
        return False
    paths = (path for path, _, _, _ in places(model) if path.rpartition(".")[2] in NAMES)
    return any(re.fullmatch(targets, path) for path in paths)


def _reason(model: nn.Module, config: PeftConfig, *, targeted: bool) -> str | None:
    """Return why embeddings are to be saved though nobody said so, or None."""
    single_rows = any(getattr(config, name, None) for name in ("trainable_token_indices", "token_indices"))
    if targeted and not single_rows:
        return "target_modules names them"
    own, source = getattr(config_of(model), "vocab_size", None), config.base_model_name_or_path
    before = None if own is None or not source else _vocabulary(Path(source, "config.json"))
    if before is None or before == own:
        return None
    return f"the model's vocabulary has {own} entries, and {source!r} says {before}"


def _vocabulary(path: Path) -> object:
    """Return the size of the vocabulary that a model's config file states, or None."""
    try:
        values: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values.get("vocab_size") if isinstance(values, dict) else None
