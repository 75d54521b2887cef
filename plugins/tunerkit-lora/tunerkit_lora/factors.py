"""How the two factors of a LoRA adapter start."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tunerkit_lora.inits import special_factors

if TYPE_CHECKING:
    from torch import Tensor

    from tunerkit.sites import Site
    from tunerkit_lora.config import LoraConfig


def starting_factors(site: Site, rank: int, scaling: float, config: LoraConfig) -> tuple[Tensor, Tensor]:
    """Return the factors ``A`` and ``B`` of a new adapter at a linear layer, an embedding or a convolution.

    Args:
        site: The layer.
        rank: The rank there.
        scaling: What the product of the factors is multiplied with.
        config: The settings; `init_lora_weights` says how to start.

    Returns:
        ``A``, rank x inputs, and ``B``, outputs x rank. The inputs of a convolution are its channels times the size of
        its kernel, and ``B`` has as many columns as one of its groups has; those of an embedding are its tokens.
    """
    init = config.init_lora_weights
    # As in PEFT, embeddings start as ever where a start is not for them.
    if isinstance(init, str) and init != "gaussian" and (site.kind != "embedding" or init == "mica"):
        return special_factors(site, rank, init, scaling)
    if site.kind == "embedding":
        tokens, width = site.weight.shape
        first = site.zeros(rank, tokens) if init else site.normal(rank, tokens)
        return first, site.normal(width, rank)
    groups = site.groups
    rows, columns = site.weight.shape
    shape = rank, columns * groups
    first = site.normal(*shape, std=1 / rank) if init == "gaussian" else site.kaiming_uniform(*shape)
    shape = rows, rank // groups
    return first, site.zeros(*shape) if init else site.kaiming_uniform(*shape)


def starting_bias(site: Site, rank: int, config: LoraConfig) -> Tensor | None:
    """Return the bias of the second factor of a new adapter, of size out, or None if it has none."""
    if not config.lora_bias:
        return None
    if config.init_lora_weights:
        return site.zeros(site.out_features)
    return site.uniform(site.out_features, bound=1 / math.sqrt(rank // site.groups))
