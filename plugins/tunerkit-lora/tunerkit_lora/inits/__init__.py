"""The starts of LoRA's factors that are more than random numbers and zeros.

None of them writes the base weight. Those whose product is not zero are taken off again by the adapter, see
`tunerkit_lora.anchored`, or go with a quantised weight in place of the base's, see `tunerkit_lora.loftq`.
"""

from __future__ import annotations

import functools
import re
import warnings
from typing import TYPE_CHECKING

import torch

from tunerkit.errors import ConfigError, LoadWarning, UnsupportedSiteError
from tunerkit.sites import is_making_on_meta
from tunerkit_lora.inits.orthogonal import orthogonal
from tunerkit_lora.inits.quantising import loftq
from tunerkit_lora.inits.spectral import minor_directions, olora, pissa, pissa_lowrank

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from tunerkit.sites import Site
    from tunerkit_lora.subconfigs import LoftQConfig

ANCHORED = re.compile(r"pissa|pissa_niter_\d+|olora")
"""The starts that are taken off again."""

SPECIAL = re.compile(rf"{ANCHORED.pattern}|eva|orthogonal|mica|loftq")
"""The starts that are made here."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def special_factors(site: Site, rank: int, init: str, scaling: float) -> tuple[Tensor, Tensor]:
    """Return the factors ``A`` and ``B`` of a new adapter for a start that matches `SPECIAL`.

    Those of a start that is taken off again are made for real also while tensors are made on the meta device, because
    no checkpoint holds them.

    Args:
        site: The bare layer.
        rank: The rank there.
        init: The start.
        scaling: What the product is multiplied with.

    Returns:
        ``A``, rank x inputs, and ``B``, outputs x rank, on the layer's device and in its dtype.

    Raises:
        UnsupportedSiteError: The layer is not of a kind that the start is for, or its weight cannot be read.
        ConfigError: The rank does not fit the start.
    """
    _check_kind(site, init)
    if init == "eva":
        return site.kaiming_uniform(rank, site.in_features), site.zeros(site.out_features, rank)
    if init == "mica":
        return _minor(site, rank)
    if init == "orthogonal":
        if rank % 2:
            msg = f"init_lora_weights='orthogonal' needs an even rank; it is {rank} on {site.name!r}. Set another."
            raise ConfigError(msg)
        first, second = orthogonal(site.out_features, site.in_features, rank)
    else:
        if site.weight.is_meta and is_making_on_meta():
            # In the skeleton of a model; who has the weight makes the adapter anew.
            count = min(rank, *site.weight.shape)
            return site.empty(count, site.in_features), site.empty(site.out_features, count)
        matrix = _matrix(site, init)
        if init.startswith("pissa_") and is_making_on_meta():
            msg = (
                f"The adapter was saved with init_lora_weights={init!r}, relative to a start that was drawn at random "
                "and is not in the file. The one that is derived here comes as close to it as PEFT's does. To keep "
                "such an adapter exactly, save it in PEFT with path_initial_model_for_weight_conversion."
            )
            warnings.warn(LoadWarning(msg), stacklevel=2)
        first, second = _decomposition(init)(matrix, rank, scaling)
    return first.to(site.device, site.dtype), second.to(site.device, site.dtype)


def _check_kind(site: Site, init: str) -> None:
    if site.kind not in ("linear", "embedding"):
        msg = (
            f"The module {site.name!r} is a {type(site.module).__name__}, and init_lora_weights={init!r} is for "
            "linear layers. Use True, or do not target it."
        )
        raise UnsupportedSiteError(msg)


def loftq_factors(site: Site, rank: int, scaling: float, config: LoftQConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factors ``A`` and ``B`` that LoftQ starts with, and the weight that it puts in place of the base's.

    They are made for real also while tensors are made on the meta device; see `special_factors`.

    Args:
        site: The bare layer.
        rank: The rank there.
        scaling: What the product is multiplied with.
        config: The settings.

    Returns:
        ``A``, rank x inputs, ``B``, outputs x rank, and a weight in the form of the layer's, on its device and in its
        dtype.

    Raises:
        UnsupportedSiteError: The layer is quantised already, or its weight cannot be read.
    """
    if site.quantised:
        msg = (
            f"init_lora_weights='loftq' quantises the weight itself, and that of {site.name!r} is quantised already. "
            "Give it the full model, or use True here and then replace_lora_weights_loftq. An adapter that was trained "
            "on these quantised weights is loaded with init_lora_weights=True in its config."
        )
        raise UnsupportedSiteError(msg)
    if site.weight.is_meta and is_making_on_meta():
        count = min(rank, *site.weight.shape)
        shapes = (count, site.in_features), (site.out_features, count), (site.out_features, site.in_features)
        first, second, weight = (site.empty(*shape) for shape in shapes)
        return first, second, weight
    made = loftq(_matrix(site, "loftq"), rank, scaling, config.loftq_bits, config.loftq_iter)
    first, second, weight = (each.to(site.device, site.dtype) for each in made)
    return first, second, weight


def _decomposition(init: str) -> Callable[[Tensor, int, float], tuple[Tensor, Tensor]]:
    if init.startswith("pissa_"):
        return functools.partial(pissa_lowrank, iterations=int(init.rpartition("_")[2]))
    return pissa if init == "pissa" else olora


def _minor(site: Site, rank: int) -> tuple[Tensor, Tensor]:
    inputs, outputs = site.in_features, site.out_features
    if site.kind == "embedding":
        inputs, outputs = outputs, inputs
    if rank > min(outputs, inputs):
        msg = (
            f"init_lora_weights='mica' takes singular vectors of the weight, of which {site.name!r} has "
            f"{min(outputs, inputs)}; the rank is {rank}. Set a lower one."
        )
        raise ConfigError(msg)
    second = site.empty(outputs, rank)
    if not second.is_meta:  # otherwise a checkpoint holds it
        second.copy_(minor_directions(_matrix(site, "mica"), rank))
    return site.zeros(rank, inputs), second


def _matrix(site: Site, init: str) -> Tensor:
    """Return the weight as the matrix from inputs to outputs, in float32."""
    weight = site.weight.detach()
    if weight.dtype not in _DTYPES:
        msg = (
            f"init_lora_weights={init!r} decomposes the weight, and that of {site.name!r} is {weight.dtype}; it must "
            "be float32, float16 or bfloat16. Convert the model, or use another start."
        )
        raise UnsupportedSiteError(msg)
    if weight.is_meta:
        msg = (
            f"init_lora_weights={init!r} is derived from the weight, and that of {site.name!r} is on the meta device. "
            "Load the base model's weights first."
        )
        raise UnsupportedSiteError(msg)
    return (weight.T if site.kind == "embedding" else weight).float()
