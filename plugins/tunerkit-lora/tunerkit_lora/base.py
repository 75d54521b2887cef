"""`LowRankAdapter`: what the LoRA adapters of all kinds of layers have in common."""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from tunerkit.adapter import AdditiveAdapter
from tunerkit.errors import AdapterStateError, CheckpointError
from tunerkit_lora.ranks import resize_first, resize_second

if TYPE_CHECKING:
    from torch import Tensor

    from tunerkit.adapter import Adapter
    from tunerkit.sites import Site
    from tunerkit_lora.config import LoraConfig


_MATRIX = 2
"""The number of dimensions of a factor that is no kernel."""


class LowRankAdapter(AdditiveAdapter):
    """An update that is a product of two small factors, times a scale.

    Attributes:
        r: The rank.
        lora_alpha: The numerator of the scale.
        use_rslora: Whether its denominator is the root of the rank.
        scaling: The scale now; it can be changed.
        lora_dropout: The probability with which each element of the input is dropped while training.
        lora_bias: Whether the second factor has a bias.
        use_dora: Whether magnitude and direction of the weight are learned apart.
        factor_keys: Where the first and the second factor are.
        has_own_start: Whether the factors started from what belongs to this layer alone.
        rank_groups: Into how many groups the rank is divided.
    """

    r: int
    lora_alpha: float
    use_rslora: bool
    scaling: float
    lora_dropout: float
    lora_bias: bool
    has_own_start: bool
    use_dora: bool = False
    settings: ClassVar[tuple[str, ...]] = ("scaling",)
    factor_keys: ClassVar[tuple[str, str]]
    rank_groups: int = 1

    def __init__(self, site: Site, config: LoraConfig) -> None:
        super().__init__(site, config)
        # Not by attributes, which would cost more than the factors, and a model may have thousands of layers.
        state, name = self.__dict__, site.settings_name
        state["r"] = config.rank_for(name)
        state["lora_alpha"] = config.alpha_for(name)
        state["use_rslora"] = config.use_rslora
        state["lora_dropout"] = config.lora_dropout
        state["lora_bias"] = config.lora_bias
        state["has_own_start"] = config.has_own_start
        state["scaling"] = self.initial_scaling

    @property
    def initial_scaling(self) -> float:
        """The scale that follows from rank and alpha."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """The matrices ``A``, r x inputs, and ``B``, outputs x r, whose product is the update without its scale.

        They are the very tensors, kernels flattened: what is written into them is written into the adapter.
        """
        first, second = (operator.attrgetter(key)(self) for key in self.factor_keys)
        return (first, second) if first.dim() == _MATRIX else (first.flatten(1), second.flatten(1))

    @property
    def factor_bias(self) -> Tensor | None:
        """The bias of the second factor, of size out, or None."""
        return None

    # The words in which DoRA is written

    def added(self, y: Tensor, x: Tensor, base: Site, gain: Tensor | None = None) -> Tensor:
        """Return an output of the layer with the update added, without a matrix of the weight's size.

        Args:
            y: The output.
            x: The input, after dropout.
            base: The bare layer.
            gain: A number for each output by which the update is multiplied.
        """
        raise NotImplementedError

    def dropped(self, x: Tensor) -> Tensor:
        """Return the input with dropout while training, otherwise the input itself."""
        return F.dropout(x, self.lora_dropout) if self.lora_dropout and self.training else x

    def along_outputs(self, vector: Tensor) -> Tensor:
        """Return a vector with a number for each output in a shape that broadcasts to the layer's output."""
        return vector

    # Starts that are made after the adapter

    def restart(self, base: Site, first: Tensor, second: Tensor) -> None:
        """Start anew from other factors, in place.

        Args:
            base: The bare layer.
            first: ``A``. Fewer rows than there are leave the others as they are, with zeros in ``B``.
            second: ``B``.
        """
        del base
        ours, theirs = self.factors
        ours[: len(first)].copy_(first)
        theirs.zero_()[:, : len(first)].copy_(second)

    # Checkpoints

    def standalone(self, tensors: dict[str, Tensor], initial: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Return ``[A; A0]`` and ``[B, -B0]`` for the initial factors ``A0`` and ``B0``.

        Raises:
            CheckpointError: The adapter stands on a convolution with groups.
        """
        if self.unfoldable is not None:
            msg = f"The adapter cannot be joined with its start: {self.unfoldable}. Save it as it is."
            raise CheckpointError(msg)
        before = initial or {}
        return {key: self._joined(key, tensor, before.get(key)) for key, tensor in tensors.items()}

    def _joined(self, key: str, tensor: Tensor, before: Tensor | None) -> Tensor:
        entry, _, leaf = key.partition(".")
        if before is None or entry not in self.entries[:2]:
            return tensor
        before = before.to(tensor)
        if leaf == "bias":
            return tensor - before
        return torch.cat([tensor, before]) if entry == self.entries[0] else torch.cat([tensor, -before], 1)

    # Making room for factors of a larger rank

    def make_room(self, rank: int | None, device: torch.device) -> None:
        """Fill the factors up with zeros to a rank, and make the scale a tensor; see `Adapter.make_room`."""
        super().make_room(rank, device)
        if rank is not None:
            self._hold(rank)

    @property
    def room(self) -> int:
        """The rank that the factors have room for: `r`, or more while they are filled up with zeros."""
        first: Tensor = operator.attrgetter(self.factor_keys[0])(self)
        return first.shape[0]

    def resize(self, first: Tensor, second: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Return the factors filled up with zeros, or cut, to a rank."""
        return resize_first(first, rank, self.rank_groups), resize_second(second, rank, self.rank_groups)

    def take(self, other: Adapter) -> None:
        """Take over another adapter, whatever its rank; see `Adapter.take`. A larger rank needs new tensors."""
        if not isinstance(other, LowRankAdapter):
            super().take(other)
            return
        if type(other) is not type(self):
            msg = (
                f"The adapter is a {type(other).__name__} there and a {type(self).__name__} here (use_dora, "
                "init_lora_weights), so it cannot be swapped in place. Load it as another adapter."
            )
            raise AdapterStateError(msg)
        room = max(self.room, other.room)
        self._hold(room)
        other._hold(room)
        super().take(other)
        self.r, self.lora_alpha = other.r, other.lora_alpha

    def _hold(self, rank: int) -> None:
        """Fill the factors up with zeros to a rank; what is there already is left as it is."""
        if rank == self.room:
            return
        if rank < self.room or rank % self.rank_groups:
            why = f"its layer has {self.rank_groups} groups, which divide it"
            if rank < self.room:
                why = f"it has rank {self.room}"
            msg = f"An adapter cannot be brought to rank {rank}: {why}. Choose another target_rank."
            raise AdapterStateError(msg)
        old = [self.get_parameter(key) for key in self.factor_keys]
        for key, before, after in zip(self.factor_keys, old, self.resize(old[0], old[1], rank), strict=True):
            module, _, leaf = key.rpartition(".")
            made = nn.Parameter(after.detach(), requires_grad=before.requires_grad)
            self.get_submodule(module)._parameters[leaf] = made

    def to_checkpoint(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors without the zeros that the factors were filled up with."""
        return tensors if self.room == self.r else self._resized(tensors, self.r)

    def from_checkpoint(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a checkpoint's tensors, filled up with zeros as those of the adapter are."""
        return tensors if self.room == self.r else self._resized(tensors, self.room)

    def _resized(self, tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
        first, second = self.factor_keys
        return {
            **tensors,
            **dict(zip(self.factor_keys, self.resize(tensors[first], tensors[second], rank), strict=True)),
        }
