"""Making one LoRA adapter of several."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunerkit.combine import (
    PRUNING,
    MajoritySign,
    check_combination,
    clamp_to_quantile,
    combine,
    low_rank,
    low_rank_sum,
)
from tunerkit.errors import CombinationError
from tunerkit.naming import listing
from tunerkit.weighted import add_combined, check_call

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tunerkit import BaseTuner
    from tunerkit_lora.base import LowRankAdapter
    from tunerkit_lora.config import LoraConfig

    Weighted = list[tuple[LowRankAdapter, float]]
    Factors = tuple[Tensor, Tensor]

OF_FACTORS = ("linear", *PRUNING)
"""The combinations that treat each of the two factors by itself: quick, and no sum of the updates."""

OF_UPDATES = ("svd", *(f"{name}_svd" for name in PRUNING))
"""The combinations that combine the updates themselves and take the closest factors of the asked rank."""

COMBINATIONS = ("svd", "linear", "cat", *PRUNING, *OF_UPDATES[1:])


def add_weighted(
    tuner: BaseTuner,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    svd_rank: int | None,
    svd_clamp: float | None,
    svd_driver: str | None,
    density: float | None,
    majority_sign_method: MajoritySign,
) -> None:
    """Add a LoRA adapter that is made of others; see `LoraModel.add_weighted_adapter`."""
    check_combination(combination_type, COMBINATIONS, density, majority_sign_method)
    if svd_clamp is not None and not 0 <= svd_clamp <= 1:
        msg = f"svd_clamp is a quantile, from 0 to 1; it is {svd_clamp!r}."
        raise CombinationError(msg)
    configs: list[Any] = [tuner.peft_config[name] for name in check_call(tuner, adapters, weights, adapter_name)]
    # One adapter alone is taken over as it is, whatever the combination.
    kind = "linear" if len(adapters) == 1 else combination_type
    rank = _rank(kind, adapters, configs, svd_rank)

    def fill(path: str, new: LowRankAdapter, parts: list[tuple[LowRankAdapter | None, float]]) -> None:
        here: Weighted = [(adapter, weight) for adapter, weight in parts if adapter is not None]
        with torch.no_grad():
            if kind in OF_FACTORS:
                factors = _factors_combined(path, here, kind, density, majority_sign_method)
            else:
                _refuse_groups(path, new, kind)
                factors = _updates_combined(here, rank, kind, density, majority_sign_method, svd_clamp, svd_driver)
            _write(new, *factors)
            _write_bias(new, here)

    add_combined(
        tuner,
        adapters,
        weights,
        adapter_name,
        fill,  # type: ignore[arg-type]
        r=rank,
        lora_alpha=rank,
        # The scale is in the factors already: a root in its denominator would scale them once more.
        use_rslora=False,
        rank_pattern={},
        alpha_pattern={},
        init_lora_weights=True,
        lora_bias=any(config.lora_bias for config in configs),
    )


def _rank(kind: str, adapters: Sequence[str], configs: Sequence[LoraConfig], svd_rank: int | None) -> int:
    """Return the rank of the new adapter, of whose factors some layers may need less."""
    for name, config in zip(adapters, configs, strict=True):
        if getattr(config, "use_dora", False):
            msg = (
                f"{name!r} learns magnitudes (use_dora=True), which cannot be combined into factors. Merge it instead."
            )
            raise CombinationError(msg)
        if getattr(config, "is_anchored", False):
            msg = (
                f"{name!r} leans on factors of the base's weight (init_lora_weights={config.init_lora_weights!r}). "
                "Save it with path_initial_model_for_weight_conversion, and combine what that gives."
            )
            raise CombinationError(msg)
        if getattr(config, "replaces_base", False):
            msg = (
                f"{name!r} stands on a quantised weight in place of the base's (init_lora_weights='loftq'), which "
                "factors cannot say. Merge it instead."
            )
            raise CombinationError(msg)
    largest = [max([config.r, *(config.rank_pattern or {}).values()]) for config in configs]
    if kind == "cat":
        return sum(largest)
    if kind in OF_FACTORS and len(set(largest)) > 1:
        msg = (
            f"combination_type={kind!r} combines factors of one rank, and those of {listing(adapters)} are {largest}. "
            "Use 'svd', which takes any, or 'cat'."
        )
        raise CombinationError(msg)
    if kind in OF_UPDATES and svd_rank is not None:
        if type(svd_rank) is not int or svd_rank < 1:
            msg = f"svd_rank must be a whole number above 0; it is {svd_rank!r}."
            raise CombinationError(msg)
        return svd_rank
    return max(largest)


def _factors_combined(
    path: str, here: Weighted, kind: str, density: float | None, majority_sign_method: MajoritySign
) -> Factors:
    """Combine the factors each by itself, both with the root of the weight, and the first with its sign too."""
    ranks = [adapter.r for adapter, _ in here]
    if len(set(ranks)) > 1:
        msg = (
            f"combination_type={kind!r} combines factors of one rank, and on {path!r} they have {ranks}. Use 'svd', "
            "which takes any, or 'cat'."
        )
        raise CombinationError(msg)
    totals = [weight * float(adapter.scaling) for adapter, weight in here]
    roots = [math.sqrt(abs(total)) for total in totals]
    signed = [math.copysign(root, total) for root, total in zip(roots, totals, strict=True)]
    downs, ups = zip(*(adapter.factors for adapter, _ in here), strict=True)
    down = combine(kind, downs, signed, density, majority_sign_method)
    return combine(kind, ups, roots, density, majority_sign_method), down


def _updates_combined(
    here: Weighted,
    rank: int,
    kind: str,
    density: float | None,
    majority_sign_method: MajoritySign,
    clamp: float | None,
    driver: str | None,
) -> Factors:
    scaled = [(adapter.factors, float(adapter.scaling), weight) for adapter, weight in here]
    if kind == "cat":
        return (
            torch.cat([up for (_, up), _, _ in scaled], dim=1),
            torch.cat([down * (scaling * weight) for (down, _), scaling, weight in scaled]),
        )
    if kind == "svd" and clamp is None:
        return low_rank_sum([(up * (scaling * weight), down) for (down, up), scaling, weight in scaled], rank)
    updates = [scaling * (up @ down) for (down, up), scaling, _ in scaled]
    of_updates = "linear" if kind == "svd" else kind.removesuffix("_svd")
    whole = combine(of_updates, updates, [weight for _, _, weight in scaled], density, majority_sign_method)
    factors = low_rank(whole, rank, driver)
    return factors if clamp is None else clamp_to_quantile(factors, clamp)


def _refuse_groups(path: str, new: LowRankAdapter, kind: str) -> None:
    if new.unfoldable is not None:
        msg = (
            f"combination_type={kind!r} works on the product of the factors, and on {path!r} there is none: "
            f"{new.unfoldable}. Use 'linear'."
        )
        raise CombinationError(msg)


def _write(new: LowRankAdapter, up: Tensor, down: Tensor) -> None:
    """Give an adapter its factors; where they have a smaller rank the rest is zero."""
    own_down, own_up = new.factors
    # The scales of the others are in the factors, and its own, which need not be 1, comes on top.
    own_up.copy_(F.pad(up, (0, own_up.shape[1] - up.shape[1])) / new.initial_scaling)
    own_down.copy_(F.pad(down, (0, 0, 0, own_down.shape[0] - down.shape[0])))


def _write_bias(new: LowRankAdapter, here: Weighted) -> None:
    bias = new.factor_bias
    if bias is not None:
        bias.zero_()
        for adapter, weight in here:
            if adapter.factor_bias is not None:
                bias.add_(adapter.factor_bias, alpha=weight * float(adapter.scaling) / new.initial_scaling)
