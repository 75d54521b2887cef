"""LoRA that starts on a quantised weight, from what that lacks of the base's: LoftQ."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from tunerkit.errors import CheckpointError
from tunerkit_lora.adapter import LoraAdapter
from tunerkit_lora.inits import loftq_factors

if TYPE_CHECKING:
    from torch import Tensor

    from tunerkit.adapter import Adapter
    from tunerkit.sites import Below, Site
    from tunerkit_lora.config import LoraConfig


class OnAnother:
    """What an adapter stands on, with another weight in place of the bare layer's.

    What the adapters below add to the weight is added to that one.

    Args:
        below: The layer with the adapters below.
        weight: The other weight, in the form of the layer's.
    """

    def __init__(self, below: Below, weight: Tensor) -> None:
        self._below = below
        self._other = weight

    @property
    def base(self) -> Site:
        """The bare layer with the other weight."""
        return with_weight(self._below.base, self._other)

    @property
    def weight(self) -> Tensor:
        """The other weight, with all adapters below folded in."""
        weight, own = self._below.weight, self._below.base.weight
        return self._other if weight is own else self._other + (weight - own)

    @property
    def bias(self) -> Tensor | None:
        """The bias with all adapters below folded in."""
        return self._below.bias

    def __call__(self, x: Tensor) -> Tensor:
        """Run the layer with the other weight and all adapters below."""
        return self._below.run(x, self.weight, self.bias)

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Run the layer with these parameters in place of its own."""
        return self._below.run(x, weight, bias)


def with_weight(base: Site, weight: Tensor) -> Site:
    """Return a layer with another weight, for one call; the layer itself is not touched."""
    return base.with_parameters(base.fitted(weight, base.bias))


class LoftqLora(LoraAdapter):
    """``Q + s B A``: a quantised weight ``Q`` in place of the base's, and factors that start from what it lacks.

    In PEFT ``Q`` becomes the base weight for good. Here the base stays as it is, and the adapter keeps ``Q``: it is not
    trained and not saved but derived from the weight again when a checkpoint is loaded, as in PEFT. What the layer
    computes is a simulation in the base's own dtype; a layer that is quantised indeed has
    `tunerkit_lora.replace_lora_weights_loftq`.
    """

    entries: ClassVar[tuple[str, ...]] = (*LoraAdapter.entries, "lora_start_weight")
    base_like: ClassVar[tuple[str, ...]] = ("lora_start_weight",)
    lora_start_weight: Tensor

    def start(self, site: Site, config: LoraConfig) -> tuple[Tensor, Tensor]:
        """Return the factors that LoftQ starts from, and keep the weight that goes with them."""
        first, second, weight = loftq_factors(site, self.r, self.scaling, config.loftq_settings)
        self.register_buffer("lora_start_weight", weight, persistent=False)
        return first, second

    def forward(self, x: Tensor, below: Below) -> Tensor:
        """Return the inherited result on the quantised weight."""
        return super().forward(x, OnAnother(below, self.lora_start_weight))

    def merged(self, below: Below) -> tuple[Tensor, Tensor | None]:
        """Return the inherited result on the quantised weight."""
        return super().merged(OnAnother(below, self.lora_start_weight))

    def delta(self, base: Site) -> Tensor:
        """Return what is added to the bare weight: the inherited result on the quantised one, and by what that differs.

        On a layer that has the quantised weight already that is nothing.
        """
        start = self.lora_start_weight
        return (start - base.weight) + super().delta(with_weight(base, start))

    @property
    def room(self) -> int:
        """The rank that the factors have room for; of a weight of a lower rank than `r` they have that many."""
        most: int = min(self.r, *self.lora_start_weight.shape)
        return self.r + len(self.lora_A.weight) - most

    def take(self, other: Adapter) -> None:
        """Take over another adapter, and the weight that it started on; see `Adapter.take`."""
        super().take(other)
        if isinstance(other, LoftqLora):
            self.lora_start_weight = other.lora_start_weight

    def standalone(self, tensors: dict[str, Tensor], initial: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Refuse: what stands in place of the base's weight differs from it by more than two small factors can say.

        Raises:
            CheckpointError: Always.
        """
        del tensors, initial
        msg = (
            "The adapter was started by LoftQ and stands on a quantised weight, which no plain adapter makes of the "
            "base's. Save it as it is, or merge it and save the model."
        )
        raise CheckpointError(msg)
