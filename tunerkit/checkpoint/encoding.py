"""The content of the two files of a checkpoint: the config as JSON, the tensors as safetensors."""

from __future__ import annotations

import json
import math
from enum import Enum
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from tunerkit.errors import CheckpointError
from tunerkit.naming import listing

if TYPE_CHECKING:
    from collections.abc import Mapping

_MAX_DEPTH = 50


def config_text(config: Mapping[str, Any]) -> str:
    """Return a config as JSON, its keys sorted; sets become sorted lists, enums their values.

    Raises:
        CheckpointError: A value is nothing that JSON can hold; the message names its key.
    """
    plain = {str.__str__(key): _plain(value, key) for key, value in config.items()}
    return json.dumps(plain, indent=2, sort_keys=True)


def _plain(value: Any, key: str, depth: int = 0) -> Any:
    if depth > _MAX_DEPTH:
        msg = f"The value of {key!r} cannot be saved: it holds itself or is nested over {_MAX_DEPTH} deep. Flatten it."
        raise CheckpointError(msg)
    if isinstance(value, Enum):
        return _plain(value.value, key, depth + 1)
    if isinstance(value, str):
        return str.__str__(value)  # The method of `str` itself, for a subclass may show itself as something else.
    if value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {str.__str__(name): _plain(item, key, depth + 1) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, key, depth + 1) for item in value]
    if isinstance(value, (set, frozenset)):
        items = [_plain(item, key, depth + 1) for item in value]
        try:
            return sorted(items)
        except TypeError:  # Items of several types.
            return sorted(items, key=repr)
    found = f"{value!r:.60}"
    kind = "a dict with keys that are not strings" if isinstance(value, dict) else f"of type {type(value).__name__}"
    msg = (
        f"The value of {key!r} cannot be saved as JSON: it holds {found}, {kind}. JSON holds strings, finite numbers, "
        "booleans, None, lists, and dicts with strings as keys: use one of those."
    )
    raise CheckpointError(msg)


def tensor_bytes(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """Return the content of a safetensors file; tensors that share memory are each written in full.

    Raises:
        CheckpointError: A tensor has no elements or no data, is sparse or quantised, or has a dtype that safetensors
            does not know; or the metadata are not text.
    """
    empty = [key for key, tensor in tensors.items() if tensor.numel() == 0]
    if empty:
        msg = (
            f"These tensors would be saved empty: {listing(empty)}. They have no elements here, as when sharding keeps "
            "them elsewhere: gather them first."
        )
        raise CheckpointError(msg)
    meta = [key for key, tensor in tensors.items() if tensor.is_meta]
    if meta:
        msg = f"These tensors are on the meta device and hold no data: {listing(meta)}. Load or initialise them first."
        raise CheckpointError(msg)
    odd = [key for key, tensor in tensors.items() if tensor.layout != torch.strided or tensor.is_quantized]
    if odd:
        msg = f"These tensors are sparse or quantised, which safetensors cannot hold: {listing(odd)}. Make them dense."
        raise CheckpointError(msg)
    storable: dict[str, torch.Tensor] = {}
    storages = set()
    for key, tensor in tensors.items():
        plain = tensor.detach().cpu().resolve_conj().contiguous()
        if plain.untyped_storage().data_ptr() in storages:
            plain = plain.clone()
        storages.add(plain.untyped_storage().data_ptr())
        storable[key] = plain
    try:
        # Not `save_file`: it goes through a temporary of its own, which a kill leaves behind, and which only its owner
        # may read.
        return safetensors.torch.save(storable, metadata=metadata)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        dtypes = listing(sorted({str(tensor.dtype) for tensor in storable.values()}))
        msg = f"safetensors cannot hold these tensors or metadata ({error}); the tensors' dtypes are {dtypes}."
        raise CheckpointError(msg) from error
