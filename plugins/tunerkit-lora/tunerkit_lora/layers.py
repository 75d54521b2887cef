"""What LoRA adds to the layers that hold its adapters: names that PEFT's have, and calls that change the scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunerkit import BaseTunerLayer
from tunerkit_lora.base import LowRankAdapter

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tunerkit.adapted_layer import AdaptedLayer


class LoraLayer(BaseTunerLayer, method="lora"):
    """A layer is one exactly while it holds a LoRA adapter.

    The scale of an adapter is `layer.scaling[name]`, to be read and set. While an adapter is merged its scale is part
    of the weight, so a change is refused.
    """

    def set_scale(self: Any, adapter: str, scale: float) -> None:
        """Set an adapter's scale to a multiple of the one that follows from its rank and alpha.

        Args:
            adapter: Its name; one that this layer does not have is passed over.
            scale: The multiple.

        Raises:
            AdapterStateError: The adapter is merged.
        """
        _set(self, {name: scale * low.initial_scaling for name, low in _low_rank(self, [adapter])})

    def scale_layer(self: Any, scale: float) -> None:
        """Multiply the scale of the active adapters.

        Raises:
            AdapterStateError: One of them is merged.
        """
        _set(self, {name: low.scaling * scale for name, low in _low_rank(self, self.active_adapters)})

    def unscale_layer(self: Any, scale: float | None = None) -> None:
        """Divide the scale of the active adapters, or without a number set it to what follows from rank and alpha.

        Raises:
            AdapterStateError: One of them is merged.
        """
        found = _low_rank(self, self.active_adapters)
        _set(self, {name: low.initial_scaling if scale is None else low.scaling / scale for name, low in found})

    # PEFT's layers have all of these, whatever they adapt; here they are asked only where no adapter has an own.

    @property
    def lora_A(self) -> dict[str, Any]:
        """The first factors by adapter: none."""
        return {}

    @property
    def lora_B(self) -> dict[str, Any]:
        """The second factors by adapter: none."""
        return {}

    @property
    def lora_embedding_A(self) -> dict[str, Any]:
        """The first factors of an embedding by adapter: none."""
        return {}

    @property
    def lora_embedding_B(self) -> dict[str, Any]:
        """The second factors of an embedding by adapter: none."""
        return {}

    @property
    def lora_magnitude_vector(self) -> dict[str, Any]:
        """The magnitudes by adapter: none."""
        return {}

    @property
    def in_features(self: Any) -> int:
        """The number of features, channels or tokens that the layer takes."""
        site = self.bare_site
        return int(site.out_features if site.kind == "embedding" else site.channels)

    @property
    def out_features(self: Any) -> int:
        """The number of features or channels that the layer returns."""
        site = self.bare_site
        return int(site.in_features if site.kind == "embedding" else site.out_features)

    @property
    def fan_in_fan_out(self: Any) -> bool:
        """Whether the layer stores its weight in x out."""
        return bool(self.bare_site.transposed)


class Linear(LoraLayer, method="lora", kind="linear"):
    """A linear layer with a LoRA adapter; transformers' `Conv1D` is one too."""


class Embedding(LoraLayer, method="lora", kind="embedding"):
    """An embedding with a LoRA adapter."""


class Conv1d(LoraLayer, method="lora", kind="conv1d"):
    """A convolution over one dimension with a LoRA adapter."""


class Conv2d(LoraLayer, method="lora", kind="conv2d"):
    """A convolution over two dimensions with a LoRA adapter."""


class Conv3d(LoraLayer, method="lora", kind="conv3d"):
    """A convolution over three dimensions with a LoRA adapter."""


class MultiheadAttention(LoraLayer, method="lora", kind="attention"):
    """An attention layer with a LoRA adapter on its fused input projections."""


class ParamWrapper(LoraLayer, method="lora", kind="parameter"):
    """A module of which one parameter has a LoRA adapter."""


def _low_rank(layer: AdaptedLayer, names: Iterable[str]) -> list[tuple[str, LowRankAdapter]]:
    adapters = layer.adapters
    return [(name, low) for name in names if isinstance(low := adapters.get(name), LowRankAdapter)]


def _set(layer: AdaptedLayer, scales: dict[str, float]) -> None:
    for name in scales:
        layer.check_not_merged(name)
    for name, scale in scales.items():
        layer.scaling[name] = scale
