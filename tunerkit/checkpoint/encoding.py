"""The content of the two files of a checkpoint: the config as JSON, the tensors as safetensors."""

from __future__ import annotations

import json
import math
import sys
from enum import Enum
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from tunerkit.checkpoint.header import make_header
from tunerkit.errors import CheckpointError
from tunerkit.naming import listing, shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls the dtypes that it knows."""

_UNKNOWN_TO_NUMPY = {torch.bfloat16, *(dtype for dtype, name in NAMES.items() if name.startswith("F8"))}
_OF_SIZE = {1: torch.uint8, 2: torch.int16}
"""By the size of one number, what numpy takes the bytes of other dtypes as."""

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


def encode_tensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """Return the content of a safetensors file, piece by piece; tensors that share memory are each written in full.

    The bytes are taken where they lie, one tensor after the other: what is on the CPU and contiguous is not copied. It
    is done here, because safetensors takes ten times as long for many small tensors, and needs as much memory again.

    Raises:
        CheckpointError: A tensor has no elements or no data, is sparse or quantised, or has a dtype that safetensors
            does not know; or the metadata are not text. That is seen before the first piece.
    """
    _check(tensors, metadata)
    described = [(key, NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes) for key, tensor in tensors.items()]
    try:
        header, starts = make_header(sorted(described), metadata)
    except UnicodeEncodeError as error:
        msg = f"The name of a tensor, or a text beside them, is not text in UTF-8: {shown(error.object[error.start])}."
        raise CheckpointError(msg) from error
    return chain([header], (_bytes_under(key, tensors[key]) for key in starts))


def _bytes_under(key: str, tensor: torch.Tensor) -> memoryview:
    try:
        return bytes_of(tensor)
    except (NotImplementedError, RuntimeError, TypeError) as error:
        msg = (
            f"The numbers of {shown(key)}, a {type(tensor).__name__} on {tensor.device}, cannot be read "
            f"({error}). Make it a plain tensor first."
        )
        raise CheckpointError(msg) from error


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor without copying them, if it is contiguous and on the CPU."""
    plain = tensor.contiguous()
    if plain.dtype in _UNKNOWN_TO_NUMPY:
        plain = plain.view(_OF_SIZE[plain.itemsize])
    numbers = plain.numpy(force=True)
    ordered = numbers.byteswap() if sys.byteorder == "big" else numbers
    held: memoryview = ordered.reshape(-1).view("u1").data
    return held


def _check(tensors: Mapping[str, torch.Tensor], metadata: Mapping[Any, Any]) -> None:
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
    unknown = [key for key, tensor in tensors.items() if tensor.dtype not in NAMES]
    if unknown:
        dtypes = listing(sorted({str(tensors[key].dtype) for key in unknown}))
        msg = (
            f"safetensors does not know the dtype of these tensors: {listing(unknown)} ({dtypes}). Turn them into one "
            "that it knows, such as float32."
        )
        raise CheckpointError(msg)
    odd_texts = [text for item in metadata.items() for text in item if not isinstance(text, str)]
    if odd_texts:
        msg = f"What stands beside the tensors in their file is text; this is not: {listing(odd_texts)}."
        raise CheckpointError(msg)
