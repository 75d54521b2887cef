"""Wrong traces and words: what an adapter keeps or draws, what it targets, and what it tells of itself."""

from __future__ import annotations

import torch
from testing.wrong.hooks import SoundPlugin
from testing.wrong.table import caught_by
from toys.shared import Projections
from toys.sound import SoundAdapter

from tunerkit import hookimpl
from tunerkit.adapter import Adapter

# What a call leaves behind


@caught_by("test_keeps_nothing_of_a_call")
class KeepsItsInput(SoundAdapter):
    """It keeps the input of its last call, which stays in memory until the next one."""

    last = None

    def addition(self, x):
        object.__setattr__(self, "last", x)
        return super().addition(x)


@caught_by("test_keeps_nothing_of_a_call")
class KeepsItsOutput(SoundAdapter):
    """It keeps what it added in training, and with it the whole graph of the gradients."""

    last = ()

    def addition(self, x):
        added = super().addition(x)
        if self.training:
            self.last = (added,)
        return added


_SEEN = []


@caught_by("test_keeps_nothing_of_a_call")
class NotesElsewhere(SoundAdapter):
    """It notes the input of the last call in a list of its module."""

    def addition(self, x):
        _SEEN[:] = [x]
        return super().addition(x)


@caught_by("test_draws_nothing_in_evaluation")
class DrawsForNothing(SoundAdapter):
    """It draws a mask in each call and uses it in training only, so evaluation changes what is drawn afterwards."""

    def addition(self, x):
        mask = torch.rand_like(x, dtype=torch.float32)
        return super().addition(x * (mask > 0) if self.training else x)


# What is adapted


@caught_by("test_targets_only_what_is_asked")
class TargetsMore(SoundPlugin):
    """`_check_target_module_exists` takes in a layer that was not asked for."""

    @hookimpl
    def _check_target_module_exists(self, peft_config, key):
        return key if key in {*peft_config.target_modules, "head"} else None


# What it tells of itself


@caught_by("test_has_effect")
class DeniesItsEffect(SoundAdapter):
    """`has_effect` says that it changes nothing."""

    def has_effect(self, base):
        return False


@caught_by("test_hotswap")
class SettingNotNamed(SoundAdapter):
    """`settings` does not name its scale, which stays as it was when another adapter is swapped in."""

    settings = ()


@caught_by("test_identity_at_start")
class SettingMisspelt(SoundAdapter):
    """`settings` names `scael`, and the adapter has `scale`."""

    settings = ("scael",)


@caught_by("test_words_are_of_the_contract")
class ForwardMisspelt(SoundAdapter):
    """Its cheaper way is called `foward`, so the core runs the one with the merged parameters."""

    def foward(self, x, below):
        return super().forward(x, below)

    forward = Adapter.forward


@caught_by("test_words_are_of_the_contract")
class EffectMisspelt(SoundAdapter):
    """It defines `has_efect`, which nobody asks."""

    def has_efect(self, base):
        return bool(self.toy_up.weight.any())


@caught_by("test_words_are_of_the_contract")
class AroundMisspelt(Projections):
    """What the part does around a call is called `arround`."""

    def arround(self, call, *args, **kwargs):
        return call(*args, **kwargs)


@caught_by("test_hotswap")
class TakesHalf(SoundAdapter):
    """`take` leaves out the bias."""

    def take(self, other):
        bias = self.toy_bias.detach().clone()
        super().take(other)
        self.toy_bias.data.copy_(bias)


@caught_by("test_tensors_as_a_dict")
class OnlyTheReverse(SoundAdapter):
    """It defines `from_checkpoint` and no `to_checkpoint`, so that the first is never called."""

    def from_checkpoint(self, tensors):
        return {**tensors, "toy_bias": self.scale * tensors["toy_bias"]}
