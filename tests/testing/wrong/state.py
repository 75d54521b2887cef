"""Wrong state: tensors that are lost, shared, of a dtype of their own, or written when they should not be."""

from __future__ import annotations

import threading
from typing import ClassVar

import torch
from testing.wrong.table import caught_by
from torch import nn
from toys.shared import Projections
from toys.sound import SoundAdapter

from tunerkit.adapter import Adapter

# What is held elsewhere than in tensors that are saved


@caught_by("test_save_and_load", "test_tensors_as_a_dict")
class DrawnAndNotSaved(SoundAdapter):
    """Its scale is drawn at random and is not saved."""

    def __init__(self, site, config):
        super().__init__(site, config)
        self.scale = 1 + float(torch.rand(()))


@caught_by("test_save_and_load", "test_modules_to_save", "test_no_tensor_left_unsaved")
class BufferNotSaved(SoundAdapter):
    """A random mask that it needs is a buffer that is not persistent."""

    entries = (*SoundAdapter.entries, "toy_mask")

    def __init__(self, site, config):
        super().__init__(site, config)
        self.register_buffer("toy_mask", torch.rand(site.out_features), persistent=False)

    def merged(self, below):
        weight, bias = super().merged(below)
        return weight, bias + self.toy_mask * self.toy_bias

    forward = Adapter.forward


@caught_by("test_save_and_load", error=RuntimeError)
class HeldInAList(SoundAdapter):
    """A tensor that it needs is held in a list, where PyTorch does not see it."""

    def __init__(self, site, config):
        super().__init__(site, config)
        self.gates = [site.normal(site.out_features)]

    def merged(self, below):
        weight, bias = super().merged(below)
        return weight, bias + self.gates[0] * self.toy_bias

    forward = Adapter.forward


@caught_by("test_checkpoint_holds_the_declared_entries")
class PlainTensor(SoundAdapter):
    """Its bias is a tensor and not a parameter."""

    def __init__(self, site, config):
        super().__init__(site, config)
        del self.toy_bias
        self.toy_bias = site.zeros(site.out_features).requires_grad_()


@caught_by("test_identity_at_start")
class ComputedAtBirth(SoundAdapter):
    """The product is computed once when the adapter is made, and is stale once its factors are trained."""

    def __init__(self, site, config):
        super().__init__(site, config)
        self.product = super().delta().detach()

    def addition(self, x):
        return x.to(self.product.dtype) @ self.product.mT + 0 * self.toy_bias

    def merged(self, below):
        return below.weight + self.product, below.bias


@caught_by("test_two_adapters_are_active_together", "test_two_adapters_merge_one_by_one")
class LeansOnAStaleWeight(SoundAdapter):
    """It keeps the layer's weight as it was when the adapter was made."""

    def __init__(self, site, config):
        super().__init__(site, config)
        self.kept = site.weight.detach().clone()

    def merged(self, below):
        return self.kept + self.delta(), super().merged(below)[1]

    forward = Adapter.forward


# What is shared


@caught_by("test_two_adapters_are_independent")
class SharedOnTheClass(SoundAdapter):
    """All adapters of a layer have one bias, held on the class."""

    shared: ClassVar = {}

    def __init__(self, site, config):
        super().__init__(site, config)
        self.toy_bias = self.shared.setdefault(site.module, self.toy_bias)


@caught_by("test_two_adapters_are_independent")
class SharedFrozen(Projections):
    """The projections of the first adapter serve all later ones, held on the class."""

    made: ClassVar = {}

    def __init__(self, sites, config):
        super().__init__(sites, config)
        self.toy_down = self.made.setdefault(sites[0].module, self.toy_down)


# What is written


@caught_by("test_training_changes_only_the_adapter")
class TrainsTheBase(SoundAdapter):
    """It lets the layer's own weight train."""

    def __init__(self, site, config):
        super().__init__(site, config)
        site.weight.requires_grad_()


@caught_by("test_disabled_is_the_base", "test_delete_restores_the_original", "test_unload_restores_the_original")
class WritesTheBase(SoundAdapter):
    """It takes its start off the layer's own weight, so that both together change nothing."""

    def __init__(self, site, config):
        super().__init__(site, config)
        self.toy_up.weight.data.normal_()
        site.weight.data.sub_(self.delta().detach())


@caught_by("test_training_changes_only_the_adapter")
class WritesAFrozenTensor(SoundAdapter):
    """A tensor that does not train is written in each call."""

    entries = (*SoundAdapter.entries, "toy_mean")

    def __init__(self, site, config):
        super().__init__(site, config)
        self.toy_mean = nn.Parameter(site.zeros(site.in_features), requires_grad=False)

    def addition(self, x):
        if self.training:
            self.toy_mean.lerp_(x.detach().flatten(0, -2).mean(0), 0.1)
        return super().addition(x)


@caught_by("test_unmerge_is_exact")
class MergesInPlace(SoundAdapter):
    """`merged` adds to the weight in place."""

    def merged(self, below):
        _, bias = super().merged(below)
        return below.weight.detach().add_(self.delta().detach()), bias


@caught_by("test_forward_agrees_with_merged")
class ChangesItsInput(SoundAdapter):
    """`forward` scales its input in place."""

    def forward(self, x, below):
        y = below(x)
        x.mul_(self.scale)
        return y + (self.addition(x) - self.toy_bias) / self.scale + self.toy_bias


@caught_by("test_use_adapter")
class FreezesItself(SoundAdapter):
    """Its bias does not train any more once it was run."""

    def forward(self, x, below):
        y = super().forward(x, below)
        self.toy_bias.requires_grad_(requires_grad=False)
        return y


# Dtypes


@caught_by("test_half_precision_base", error=RuntimeError)
class WidensTheOutput(SoundAdapter):
    """The output is in the adapter's precision and not in the layer's."""

    def forward(self, x, below):
        return below(x) + self.addition(x)


@caught_by("test_half_precision_base", error=RuntimeError)
class MixesDtypes(SoundAdapter):
    """The input is not cast to the dtype of the factors."""

    def addition(self, x):
        return self.scale * self.toy_up(self.toy_down(x)) + self.toy_bias


@caught_by("test_double_precision", error=RuntimeError)
class NamesADtype(SoundAdapter):
    """The input is cast to single precision, whatever the factors are in."""

    def addition(self, x):
        return super().addition(x) if x.dtype == torch.float32 else self.toy_up(self.toy_down(x.float()))


@caught_by("test_double_precision")
class RoundsToSingle(SoundAdapter):
    """It computes in single precision, whatever it is given."""

    def addition(self, x):
        down, up = self.toy_down.weight.float(), self.toy_up.weight.float()
        return self.scale * ((x.float() @ down.mT) @ up.mT) + self.toy_bias.float()


# Copies, pickles, calls


@caught_by("test_pickle", error=AttributeError)
class HoldsALambda(SoundAdapter):
    """It holds a lambda, which cannot be pickled."""

    def __init__(self, site, config):
        super().__init__(site, config)
        self.act = lambda x: x


@caught_by("test_deepcopy")
class HoldsAClosure(SoundAdapter):
    """It holds a function around itself, so that a copy computes with the tensors of the original."""

    def __init__(self, site, config):
        super().__init__(site, config)
        self.added = lambda x: SoundAdapter.addition(self, x)

    def addition(self, x):
        return self.added(x)


@caught_by("test_deepcopy", "test_pickle", error=TypeError)
class HoldsALock(SoundAdapter):
    """It holds a lock, which can be neither copied nor pickled."""

    def __init__(self, site, config):
        super().__init__(site, config)
        self.lock = threading.Lock()


@caught_by("test_checkpointing", "test_use_adapter_holds_in_the_backward", "test_gradients_of_rows")
class CountsItsCalls(SoundAdapter):
    """What it gives depends on how often it was called in training."""

    calls = 0

    def addition(self, x):
        if self.training:
            self.calls += 1
        return super().addition(x) * self.calls if self.calls > 1 else super().addition(x)


@caught_by("test_checkpoint_holds_the_declared_entries")
class HoldsTheLayer(SoundAdapter):
    """It holds the layer as a module of its own."""

    def __init__(self, site, config):
        super().__init__(site, config)
        self.layer = site.module
