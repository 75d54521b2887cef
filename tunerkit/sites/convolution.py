"""`nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`."""

from __future__ import annotations

from typing import Any, ClassVar, TypeAlias

from torch import Tensor, nn

from tunerkit.sites.base import Site, unfit_weight

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d


class ConvolutionSite(Site):
    """A convolution, weight out x (in / groups * size of the kernel): its kernels, flattened.

    `in_features` counts the columns of that matrix; the layer's inputs are counted by `channels`.

    Attributes:
        layer: The class of layers that it is for, of which it makes new ones.
    """

    layer: ClassVar[type[Convolution]]
    module: Convolution
    __slots__ = ()

    @classmethod
    def takes(cls, module: nn.Module) -> str | None:
        """Return why this very layer cannot be adapted, or None."""
        return unfit_weight(module)

    @property
    def weight(self) -> Tensor:
        """The layer's kernels as a matrix."""
        return self.stored.flatten(1)

    @property
    def channels(self) -> int:
        """How many channels the input has."""
        return self.module.in_channels

    @property
    def groups(self) -> int:
        """Into how many groups the channels are divided."""
        return self.module.groups

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """The size of the kernels."""
        return self.module.kernel_size

    def scale_inputs(self, scale: Tensor) -> Tensor:
        """Return the matrix, of the shape of `weight`, by which to multiply it to scale the channels of the input.

        Args:
            scale: A number for each channel, `channels` in all.
        """
        rows = self.out_features // self.groups
        columns = scale.reshape(self.groups, -1).repeat_interleave(self.in_features * self.groups // self.channels, 1)
        return columns.repeat_interleave(rows, 0)

    def convolution(self, weight: Tensor) -> Convolution:
        """Return a convolution without bias or groups that steps over the input as the layer does.

        Args:
            weight: Its kernels, rank x `channels` * size of the kernel; they may be flattened.
        """
        module = self.module
        return self._make(
            weight.reshape(len(weight), self.channels, *self.kernel_size),
            None,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            padding_mode=module.padding_mode,
        )

    def pointwise(self, weight: Tensor, bias: Tensor | None = None) -> Convolution:
        """Return a convolution with kernels of size one and the layer's groups, which mixes channels.

        Args:
            weight: Its kernels, out x (in / groups).
            bias: Its bias, of size out, or None.
        """
        return self._make(weight.reshape(*weight.shape[:2], *(1 for _ in self.kernel_size)), bias, groups=self.groups)

    def _make(self, weight: Tensor, bias: Tensor | None, *, groups: int = 1, **settings: Any) -> Convolution:
        # On the meta device the constructor fills no weight of its own.
        made = self.layer(
            weight.shape[1] * groups,
            len(weight),
            tuple(weight.shape[2:]),  # type: ignore[arg-type]
            groups=groups,
            bias=False,
            device="meta",
            **settings,
        )
        made.weight = nn.Parameter(weight)
        made.bias = None if bias is None else nn.Parameter(bias)
        return made


class Convolution1dSite(ConvolutionSite):
    """A convolution over one dimension."""

    kind: ClassVar[str] = "conv1d"
    layer = nn.Conv1d
    __slots__ = ()


class Convolution2dSite(ConvolutionSite):
    """A convolution over two dimensions."""

    kind: ClassVar[str] = "conv2d"
    layer = nn.Conv2d
    __slots__ = ()


class Convolution3dSite(ConvolutionSite):
    """A convolution over three dimensions."""

    kind: ClassVar[str] = "conv3d"
    layer = nn.Conv3d
    __slots__ = ()
