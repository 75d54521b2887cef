"""`LoraModel`: a model with LoRA adapters, and what only such a model can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunerkit import BaseTuner
from tunerkit_lora.combination import add_weighted
from tunerkit_lora.layers import LoraLayer
from tunerkit_lora.targets import DEFAULT_TARGETS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tunerkit.combine import MajoritySign


class LoraModel(BaseTuner, method="lora"):
    """A tuner is one exactly while it holds a LoRA adapter."""

    prefix = "lora_"
    tuner_layer_cls = LoraLayer
    target_module_mapping = DEFAULT_TARGETS

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: MajoritySign = "total",
    ) -> None:
        """Add an adapter that is made of others; it is not active yet.

        "svd" takes the weighted sum of the updates and the closest factors of a rank, which it finds without building
        the sum; "cat" puts the factors side by side, which is exact and has the sum of the ranks. "linear" adds up the
        factors each by themselves, which is quick and rough. "magnitude_prune", "dare_linear" (arXiv 2311.03099),
        "ties" (arXiv 2306.01708) and "dare_ties" first prune the factors, and with `_svd` the updates. One adapter
        alone is taken over as it is.

        Args:
            adapters: The names of the others.
            weights: A weight for each; negative ones take an adapter's effect away.
            adapter_name: The name of the new adapter.
            combination_type: How they are combined.
            svd_rank: The rank of the new adapter where the updates are combined; the largest of the others' if not
                given.
            svd_clamp: A quantile at which the numbers of the factors are cut off, where the updates are combined.
            svd_full_matrices: Accepted for PEFT's sake; the result is the same.
            svd_driver: What `torch.linalg.svd` uses on a GPU.
            density: The share of the numbers that pruning keeps, above 0 and at most 1.
            majority_sign_method: How "ties" and "dare_ties" elect a sign: by the "total" or by "frequency".

        Raises:
            AdapterNameError: The name is illegal or taken.
            UnknownAdapterError: The model has none of one of the names.
            CombinationError: The adapters cannot be combined so; the model is as it was.
        """
        del svd_full_matrices
        add_weighted(
            self,
            adapters,
            weights,
            adapter_name,
            combination_type,
            svd_rank,
            svd_clamp,
            svd_driver,
            density,
            majority_sign_method,
        )
