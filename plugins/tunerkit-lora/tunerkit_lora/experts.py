"""LoRA on bare parameters: a matrix, or the stacked matrices of a mixture's experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from tunerkit.adapter import linear
from tunerkit.errors import UnsupportedSiteError
from tunerkit.stack import add_to_stack
from tunerkit_lora.base import LowRankAdapter
from tunerkit_lora.ranks import resize_first, resize_second

if TYPE_CHECKING:
    from torch import Tensor

    from tunerkit.sites import Below, ParameterSite, Site
    from tunerkit_lora.config import LoraConfig

_MATRIX, _STACK = 2, 3


class LoraExperts(LowRankAdapter):
    """``W_e + s B_e A_e`` for each expert ``e`` of a stack; a matrix is a stack of one.

    The stack is experts x out x in, or experts x in x out if the module says `is_transposed`. ``lora_A`` holds the
    first factors one below the other, (experts * r) x in, and ``lora_B`` the second ones, out x (r * experts), with
    the expert's number as the one that changes fastest: PEFT's order.

    A model that reads `weight[expert]` has only that expert's update computed.

    Raises:
        UnsupportedSiteError: The parameter is neither a matrix nor a stack of them, or is not of a floating dtype; or
            the config asks for what is defined on a layer's input or output, which a parameter does not have.
    """

    entries: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    factor_keys: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")
    kinds: ClassVar[frozenset[str]] = frozenset({"parameter"})

    def __init__(self, site: ParameterSite, config: LoraConfig) -> None:
        _check(site, config)
        super().__init__(site, config)
        *stack, rows, columns = site.weight.shape
        self.num_experts = stack[0] if stack else 1
        # PEFT asks only of a stack how it is stored.
        self.in_rows = bool(stack) and bool(getattr(site.owner, "is_transposed", False))
        inputs, outputs = (rows, columns) if self.in_rows else (columns, rows)
        rank = self.num_experts * self.r
        init = config.init_lora_weights
        first = site.normal(rank, inputs, std=1 / self.r) if init == "gaussian" else site.kaiming_uniform(rank, inputs)
        self.lora_A = linear(first)
        self.lora_B = linear(site.zeros(outputs, rank) if init else site.kaiming_uniform(outputs, rank))

    @property
    def room(self) -> int:
        """The rank that the factors of one expert have room for."""
        return len(self.lora_A.weight) // self.num_experts

    def resize(self, first: Tensor, second: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Return the factors filled up with zeros, or cut, to a rank for each expert."""
        rows = self.num_experts * rank
        return resize_first(first, rows, self.num_experts), resize_second(second, rows)

    def stacked_factors(self) -> tuple[Tensor, Tensor]:
        """Return what is multiplied for each expert, in the order in which the parameter is stored.

        Returns:
            A stack of experts x rows x r and one of experts x r x columns.
        """
        down: Tensor = self.lora_A.weight
        up: Tensor = self.lora_B.weight
        first = down.reshape(self.num_experts, -1, down.shape[-1])
        second = up.reshape(up.shape[0], -1, self.num_experts).permute(2, 0, 1)
        return (first.mT, second.mT) if self.in_rows else (second, first)

    def delta(self, base: Site) -> Tensor:
        """Return ``s B_e A_e`` for every expert, in the shape of the parameter."""
        left, right = self.stacked_factors()
        return (self.scaling * (left @ right)).reshape(base.weight.shape)

    def merged(self, below: Below) -> tuple[Tensor, Tensor | None]:
        """Return the parameter with the update, as a tensor that computes only the experts that are read of it."""
        weight = below.weight
        if weight.dim() == _MATRIX:
            return super().merged(below)
        return add_to_stack(weight, *self.stacked_factors(), self.scaling), below.bias


def _check(site: ParameterSite, config: LoraConfig) -> None:
    weight = site.weight
    name = f"The parameter {site.settings_name!r}"
    if weight.dim() not in {_MATRIX, _STACK} or not weight.is_floating_point():
        msg = (
            f"{name} has the shape {tuple(weight.shape)} and the dtype {weight.dtype}. LoRA adapts matrices and stacks "
            "of matrices (experts x ... x ...) of a floating dtype. Remove it from target_parameters."
        )
        raise UnsupportedSiteError(msg)
    fields = ("lora_dropout", "lora_bias", "use_dora", "fan_in_fan_out", "init_lora_weights")
    plain = {"init_lora_weights": (True, False, "gaussian")}
    values = {field: getattr(config, field) for field in fields}
    asked = [f"{field}={value!r}" for field, value in values.items() if value not in plain.get(field, (False,))]
    if asked:
        msg = (
            f"{name} cannot be adapted with {asked[0]}, which needs a layer: a bare parameter has no input, output or "
            "layout of its own. Give it an adapter of its own without that."
        )
        raise UnsupportedSiteError(msg)
