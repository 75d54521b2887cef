"""Wrong surroundings: what an adapter takes for granted about other methods, dtypes, seeds, compilers and names."""

from __future__ import annotations

import random
import time

import torch
from testing.wrong.layers import GatedPlugin
from testing.wrong.table import caught_by
from toys.layer_by_hand import GatedLayer
from toys.rows import RowsAdapter
from toys.sound import SoundAdapter

from tunerkit.adapter import Adapter

# Other methods and names


@caught_by("test_mixes_with_another_method", error=AttributeError)
class TakesOthersForItsOwn(RowsAdapter):
    """`together` takes every other adapter for one of its own method."""

    def together(self, others):
        taken = {row for other in others for row in other.rows}
        return "both replace the same rows" if taken.intersection(self.rows) else None


class RunsIdentifiers(GatedLayer):
    def running(self):
        return [name for name in super().running() if name.isidentifier()]


@caught_by("test_hostile_names")
class NamesAreIdentifiers(GatedPlugin):
    """A layer written by hand runs only adapters whose names are identifiers."""

    layer = RunsIdentifiers


# Dtypes and devices


@caught_by("test_autocast", error=RuntimeError)
class TakesTheDtypeOfTheInput(SoundAdapter):
    """It adds to the layer's output in place, in the dtype of the input, which autocast makes another."""

    def forward(self, x, below):
        y = below(x)
        hidden = self.toy_down(x.to(self.toy_down.weight.dtype)).to(x.dtype)
        up = (self.scale * self.toy_up.weight).to(x.dtype)
        added = y.flatten(0, -2).addmm_(hidden.flatten(0, -2), up.mT).reshape(y.shape)
        return added + self.toy_bias.to(y.dtype)


@caught_by("test_half_precision", "test_half_precision_base", error=RuntimeError)
class InvertsInHalf(SoundAdapter):
    """It inverts a matrix in the dtype of the input, which PyTorch cannot do in half precision."""

    def addition(self, x):
        one = torch.eye(len(self.toy_bias), dtype=x.dtype, device=x.device)
        return super().addition(x) @ torch.linalg.inv(one).to(self.toy_bias.dtype)


@caught_by("test_moved_with_to", "test_load_on_meta")
class KeepsAConstant(SoundAdapter):
    """A constant is a plain attribute, which neither moves with the model nor comes from the meta device."""

    def __init__(self, site, config):
        super().__init__(site, config)
        self.signs = [site.ones(site.out_features)]

    def merged(self, below):
        weight, bias = super().merged(below)
        return weight, bias + 0 * self.signs[0].to(bias)

    forward = Adapter.forward


# Seeds


@caught_by("test_no_tensor_left_unsaved")
class DrawsAGate(SoundAdapter):
    """It draws a tensor at random that is in no checkpoint."""

    def __init__(self, site, config):
        super().__init__(site, config)
        self.gates = [torch.rand(site.out_features)]

    def addition(self, x):
        return super().addition(x) * self.gates[0]


@caught_by("test_seed_is_honoured")
class OwnGenerator(SoundAdapter):
    """It draws its start from a generator that is seeded by the clock."""

    def __init__(self, site, config):
        super().__init__(site, config)
        generator = torch.Generator().manual_seed(time.perf_counter_ns())
        self.toy_down.weight.data.copy_(torch.randn(self.toy_down.weight.shape, generator=generator))


@caught_by("test_seed_is_honoured")
class DrawsElsewhere(SoundAdapter):
    """It draws its start from Python's `random`, which `torch.manual_seed` does not seed."""

    def __init__(self, site, config):
        super().__init__(site, config)
        self.toy_down.weight.data.mul_(random.uniform(1, 2))  # noqa: S311 - which is what is wrong


@caught_by("test_seed_is_honoured")
class SeedsTheProgram(SoundAdapter):
    """It seeds torch, so that all adapters start alike, and so does what the program draws afterwards."""

    def __init__(self, site, config):
        torch.manual_seed(0)
        super().__init__(site, config)


# Compilers, and the input


@caught_by("test_compiles", "test_exports", error=RuntimeError)
class AsksTheNumbers(SoundAdapter):
    """It goes another way where the input is all nought."""

    def forward(self, x, below):
        return super().forward(x, below) if bool(x.any()) else below(x) + self.toy_bias


@caught_by("test_input_is_not_changed")
class ReusesItsInput(SoundAdapter):
    """It clears its input where no gradients are asked for."""

    def forward(self, x, below):
        y = super().forward(x, below)
        if not torch.is_grad_enabled():
            x.zero_()
        return y
