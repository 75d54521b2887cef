"""Wrong calls: rows of a batch with adapters of their own, and what an adapter keeps of a call."""

from __future__ import annotations

import threading
import time
from typing import ClassVar

import torch
import torch.nn.functional as F
from testing.wrong.table import caught_by
from toys.bottleneck import BottleneckAdapter
from toys.shared import Projections
from toys.sound import SoundAdapter


@caught_by("test_rows")
class OneAdapterForAllRows(SoundAdapter):
    """`forward_rows` gives all rows the first adapter."""

    @classmethod
    def forward_rows(cls, adapters, x, below, groups):
        return adapters[0].forward(x, below)


@caught_by("test_rows", "test_gradients_of_rows")
class ScaleForgottenInRows(SoundAdapter):
    """`forward_rows` forgets the scale."""

    @classmethod
    def forward_rows(cls, adapters, x, below, groups):
        found = super().forward_rows(adapters, x, below, groups)
        y = below(x)
        return y + (found - y) / adapters[0].scale


@caught_by("test_gradients_of_rows", error=RuntimeError)
class RowsDetached(SoundAdapter):
    """`forward_rows` gives the right numbers without gradients."""

    @classmethod
    def forward_rows(cls, adapters, x, below, groups):
        found = super().forward_rows(adapters, x, below, groups)
        y = below(x)
        return y + (found - y).detach()


@caught_by("test_rows")
class LooksAcrossRows(BottleneckAdapter):
    """What it does with a row depends on the others, and `crosses_rows` does not say so."""

    def forward(self, x, below):
        y = below(x)
        centred = (x - x.mean(0, keepdim=True)).to(self.toy_in.weight.dtype)
        return y + self.toy_out(F.silu(self.toy_in(centred))).to(y.dtype)


@caught_by("test_rows", error=(RuntimeError, AssertionError))
class AssumesTheBatch(BottleneckAdapter):
    """It takes the batch to be of the size of the first one that it saw."""

    rows = None

    def forward(self, x, below):
        self.rows = self.rows or len(x)
        y = below(x)
        added = self.toy_out(F.silu(self.toy_in(x.to(self.toy_in.weight.dtype)))).to(y.dtype)
        return y + added.reshape(self.rows, *added.shape[1:])


@caught_by("test_identity_at_start", error=TypeError)
class SwallowsTheOutput(Projections):
    """`around` does not return what the call gives."""

    def around(self, call, *args, **kwargs):
        call(*args, **kwargs)


@caught_by("test_save_and_load")
class NoiseAround(Projections):
    """`around` adds noise to the inputs of the model."""

    def around(self, call, x, **kwargs):
        return call(x + 0.1 * torch.randn_like(x), **kwargs)


_PLACE = threading.local()


@caught_by("test_use_adapter_is_of_this_thread", "test_threads")
class OfOneThread(SoundAdapter):
    """Its scale is held in a `threading.local`, which is empty in other threads."""

    def __init__(self, site, config):
        super().__init__(site, config)
        _PLACE.scale = self.scale

    def addition(self, x):
        return super().addition(x) if hasattr(_PLACE, "scale") else super().addition(x) / self.scale


@caught_by("test_use_adapter")
class CountsOnTheLayer(SoundAdapter):
    """It counts its calls in an attribute of the layer."""

    def forward(self, x, below):
        module = below.base.module
        module.calls = getattr(module, "calls", 0) + 1
        return super().forward(x, below)


@caught_by("test_checkpoint_holds_the_declared_entries")
class ExposesNothing(Projections):
    """It exposes a method that it does not have."""

    exposes = ("count_all_sites",)


@caught_by("test_threads", error=(AssertionError, RuntimeError))
class SharedBetweenThreads(SoundAdapter):
    """What runs now is held on the class, where another thread puts its own meanwhile."""

    current: ClassVar = None

    def forward(self, x, below):
        type(self).current = self
        time.sleep(0.002)
        return SoundAdapter.forward(type(self).current, x, below)


@caught_by("test_compiles")
class CountsInANumber(SoundAdapter):
    """It counts its calls in a plain number, which a graph takes for a constant."""

    calls = 0

    def forward(self, x, below):
        self.calls += 1
        return super().forward(x, below)
