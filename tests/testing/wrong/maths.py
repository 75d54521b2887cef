"""Wrong maths: where it starts, forms that do not agree, gradients, and what stands below."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from testing.wrong.table import caught_by
from torch import nn
from toys import shared
from toys.bias import BiasAdapter
from toys.bottleneck import BottleneckAdapter
from toys.rows import RowsAdapter
from toys.shared import SharedAdapter
from toys.sound import SoundAdapter

from tunerkit.adapter import Adapter, AdditiveAdapter

TWO_FORMS = ("test_forward_agrees_with_merged", "test_merge_keeps_the_output", "test_merge_and_unload")


# Where it starts


@caught_by("test_identity_at_start")
class StartsElsewhere(SoundAdapter):
    """The bias starts at one, so that a new adapter changes the model."""

    def __init__(self, site, config):
        super().__init__(site, config)
        self.toy_bias.data.fill_(1)


@caught_by("test_identity_at_start")
class BothFactorsRandom(SoundAdapter):
    """Both factors start at random, neither at zero."""

    def __init__(self, site, config):
        super().__init__(site, config)
        self.toy_up.weight.data.normal_()


@caught_by("test_identity_at_start")
class DoesNothing(SoundAdapter):
    """`forward` leaves out the adapter."""

    def forward(self, x, below):
        return below(x)


# Two forms that do not agree


@caught_by(*TWO_FORMS)
class BiasForgotten(SoundAdapter):
    """`merged` forgets the adapter's bias."""

    def merged(self, below):
        return below.weight + self.delta(), below.bias


@caught_by(*TWO_FORMS)
class NoBiasWhereNoneWas(SoundAdapter):
    """`merged` forgets the adapter's bias where the layer has none."""

    def merged(self, below):
        return below.weight + self.delta(), None if below.bias is None else below.bias + self.toy_bias


@caught_by("test_gradients")
class NoNewBias(BiasAdapter):
    """The bias is left out where the layer has none, in both forms."""

    def merged(self, below):
        return below.weight, None if below.bias is None else below.bias + self.toy_bias


@caught_by(*TWO_FORMS, "test_modules_to_save")
class ScaleForgottenInMerged(SoundAdapter):
    """`merged` forgets the scale."""

    def delta(self):
        return self.toy_up.weight @ self.toy_down.weight


@caught_by(*TWO_FORMS)
class ScaleForgottenInForward(SoundAdapter):
    """`forward` forgets the scale."""

    def addition(self, x):
        return self.toy_up(self.toy_down(x.to(self.toy_down.weight.dtype))) + self.toy_bias


@caught_by(*TWO_FORMS)
class ScaledTwice(SoundAdapter):
    """`forward` scales the bias too, and `merged` does not."""

    def addition(self, x):
        return super().addition(x) + (self.scale - 1) * self.toy_bias


@caught_by(*TWO_FORMS)
class Transposed(SoundAdapter):
    """What `merged` adds to the weight is transposed."""

    def delta(self):
        return super().delta().mT.reshape(super().delta().shape)


@caught_by("test_forward_agrees_with_merged", declared=True)
class ClaimsAMergedForm(BottleneckAdapter):
    """It gives a merged form although its output is not linear in its input."""

    unfoldable = None

    def merged(self, below):
        return below.weight + self.toy_out.weight @ self.toy_in.weight, below.bias


@caught_by("test_merging_without_a_merged_form_is_refused")
class UnfoldableWithoutAReason(BottleneckAdapter):
    """`unfoldable` is True, and not the reason in words."""

    unfoldable = True


@caught_by("test_forward_agrees_with_merged", "test_disabled_is_the_base")
class DropsInEval(SoundAdapter):
    """There is dropout in evaluation too."""

    def addition(self, x):
        return super().addition(F.dropout(x, 0.2))


# Gradients


@caught_by("test_gradients", "test_checkpointing")
class Detached(SoundAdapter):
    """One factor is detached in `forward`."""

    def addition(self, x):
        down = self.toy_down.weight.detach()
        return self.scale * self.toy_up(x.to(down.dtype) @ down.mT) + self.toy_bias


@caught_by("test_gradients")
class ReadsData(SoundAdapter):
    """`forward` reads the `.data` of its bias."""

    def addition(self, x):
        return super().addition(x) - self.toy_bias + self.toy_bias.data


@caught_by("test_gradients")
class WrongSlope(SoundAdapter):
    """The gradient is scaled and the output is not."""

    def addition(self, x):
        right = super().addition(x)
        return right.detach() + self.scale * (right - right.detach())


@caught_by("test_gradients")
class TrainsWhatIsNotUsed(SoundAdapter):
    """It holds a tensor that trains and that nothing reads."""

    entries = (*SoundAdapter.entries, "toy_gate")

    def __init__(self, site, config):
        super().__init__(site, config)
        self.toy_gate = nn.Parameter(site.ones(1))


# What stands below


@caught_by("test_two_adapters_are_active_together", "test_two_adapters_merge", "test_mixes_with_another_method")
class PassesBelowBy(SoundAdapter):
    """It runs and merges on the bare layer, so that the adapters below it are lost."""

    def merged(self, below):
        return super().merged(below.base)

    def forward(self, x, below):
        return super().forward(x, below.base)


@caught_by("test_two_adapters_merge")
class MergesOnTheBareLayer(SoundAdapter):
    """`merged` reads the bare layer, so that the adapters below it are lost by merging."""

    def merged(self, below):
        return super().merged(below.base)


@caught_by("test_two_adapters_merge_one_by_one")
class ClaimsToCommute(SoundAdapter):
    """It says that it commutes, and what it adds depends on what is below."""

    def merged(self, below):
        weight, bias = super().merged(below)
        return below.weight + below.weight.norm() * (weight - below.weight), bias

    forward = Adapter.forward


@caught_by("test_two_adapters_are_active_together", sample="embedding", declared=True)
class HidesAConflict(RowsAdapter):
    """`together` says nothing although two adapters that replace the same rows hide each other."""

    def together(self, others):
        return None


# What is run


@caught_by("test_identity_at_start", error=RuntimeError)
class TwoDimensions(SoundAdapter):
    """`forward` takes the input for a matrix."""

    def addition(self, x):
        return torch.addmm(self.toy_bias, x.to(self.toy_bias.dtype), self.delta().mT)


@caught_by("test_identity_at_start", sample="conv2d", error=RuntimeError)
class ClaimsConvolutions(SoundAdapter):
    """It says that it adapts convolutions, and its `forward` multiplies the last dimension."""

    kinds = frozenset({"linear", "conv2d"})


@caught_by("test_identity_at_start", error=RuntimeError)
class NotCutToSize(SharedAdapter):
    """What all layers share is not cut to the size of the layer."""

    def delta(self, base):
        return self.toy_outer * (self.part.toy_up[: base.out_features] @ (self.toy_inner * self.part.toy_down))


@caught_by("test_identity_at_start")
class ReadsThePartTooSoon(SharedAdapter):
    """It reads `self.part` in `__init__`, before it was given one."""

    def __init__(self, site, config):
        super().__init__(site, config)
        self.down = self.part.toy_down


class SharedPlugin:
    method, Config = shared.method, shared.Config


@caught_by("test_identity_at_start")
class PartForgotten(SharedPlugin):
    """`Method` does not declare the part that the adapters read."""

    method = replace(shared.method, part=None)


@caught_by("test_identity_at_start", error=NotImplementedError)
class MergedMisspelt(SoundAdapter):
    """What it does to the parameters is defined as `merge`."""

    def merge(self, below):
        return super().merged(below)

    merged, forward = Adapter.merged, Adapter.forward


@caught_by("test_identity_at_start", error=NotImplementedError)
class MethodMisspelt(SharedAdapter):
    """What it adds is defined as `get_delta_weight`, which is PEFT's name for it."""

    def get_delta_weight(self, base):
        return super().delta(base)

    delta = AdditiveAdapter.delta
