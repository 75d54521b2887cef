"""`nn.MultiheadAttention`, whose input projections are bare parameters and whose output projection is only read."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from tunerkit.sites.base import Site
from tunerkit.sites.linear import LinearSite

if TYPE_CHECKING:
    from torch import Tensor, nn

SHOWN = frozenset({"_qkv_same_embed_dim"})
"""What torch's encoder layers ask of an attention layer although its name begins with an underscore."""

_READ = "torch's attention layer reads its parameters once for the whole batch"


class AttentionSite(Site):
    """The fused projection of query, key and value, weight 3 embed x embed.

    A target of this kind takes in the output projection, `out_proj`. Where the sizes of key and value differ from the
    query's, each of the three projections is a parameter of its own, and each is adapted as one.

    Torch's encoder layers may not call the layer at all but read its parameters and hand them to one fused operation;
    what they read has the adapters folded in.
    """

    kind: ClassVar[str] = "attention"
    along: ClassVar[tuple[str, ...]] = ("out_proj",)
    crosses_rows: ClassVar[str | None] = _READ
    __slots__ = ()

    @classmethod
    def parameters_of(cls, module: nn.Module) -> tuple[str, ...]:
        """Return the names of the separate projections, or nothing if the module has one for all."""
        separate = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        return tuple(name for name in separate if module._parameters.get(name) is not None)

    @classmethod
    def takes(cls, module: nn.Module) -> str | None:
        """Return why this very layer cannot be adapted, or None."""
        if module._parameters.get("in_proj_weight") is None:
            return "its in_proj_weight is not a parameter of its own (it is parametrized, or computed by a hook)"
        return None

    @property
    def weight_name(self) -> str:
        """The name of the fused weight."""
        return "in_proj_weight"

    @property
    def bias_name(self) -> str:
        """The name of the bias of the input projections."""
        return "in_proj_bias"

    @property
    def read(self) -> tuple[str, ...]:
        """The names of weight and bias."""
        return self.weight_name, self.bias_name

    @property
    def stored(self) -> Tensor:
        """The fused weight."""
        return self.module.in_proj_weight  # type: ignore[return-value]


class OutputProjectionSite(LinearSite):
    """The `out_proj` of an attention layer. The layer never calls it; what it reads has the adapters folded in."""

    crosses_rows: ClassVar[str | None] = _READ
    __slots__ = ()

    @classmethod
    def alone(cls, module: nn.Module) -> str | None:
        """Return why the layer is adapted only along with the attention layer."""
        del module
        return (
            "torch's MultiheadAttention reads its weight and never calls it, so it is adapted only along with the "
            "attention layer around it; target that"
        )

    @property
    def read(self) -> tuple[str, ...]:
        """The names of weight and bias."""
        return self.weight_name, self.bias_name

    @property
    def settings_name(self) -> str:
        """The path of the attention layer."""
        return self.name.rpartition(".")[0]
