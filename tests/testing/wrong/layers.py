"""Wrong layers that a plugin writes and puts in by hand, in the manner of PEFT's."""

from __future__ import annotations

from testing.wrong.table import caught_by
from toys import hooks_by_hand
from toys.layer_by_hand import GatedLayer

from tunerkit import hookimpl


class GatedPlugin:
    """A plugin that replaces the modules by its own layers."""

    method, Config = hooks_by_hand.method, hooks_by_hand.Config
    layer = GatedLayer

    @hookimpl
    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent):
        layer = target if isinstance(target, GatedLayer) else self.layer(target)
        layer.update_layer(adapter_name, peft_config.rank)
        if layer is not target:
            setattr(parent, target_name, layer)
        return layer


class IgnoresDisable(GatedLayer):
    def forward(self, x, *args, **kwargs):
        y = self.base_layer(x, *args, **kwargs)
        for name in self.running():
            y = y + x @ self.get_delta_weight(name).T
        return y


class Subtracts(GatedLayer):
    def unmerge(self):
        weight = self.get_base_layer().weight
        for name in self.merged_adapters:
            weight.data -= self.get_delta_weight(name).detach()
        self.merged_adapters = []


class ForgetsThatItIsMerged(GatedLayer):
    def running(self):
        return [name for name in self.active_adapters if name in self.rank]


class LeavesOutTheGate(GatedLayer):
    adapter_layer_names = ("toy_down", "toy_up")


class AssumesDefault(GatedLayer):
    def running(self):
        return [name for name in super().running() if name == "default"]


@caught_by("test_disabled_is_the_base")
class NotSwitchedOff(GatedPlugin):
    """A layer written by hand does not ask whether adapters are disabled."""

    layer = IgnoresDisable


@caught_by("test_unmerge_is_exact")
class UnmergesBySubtracting(GatedPlugin):
    """A layer written by hand unmerges by subtracting what it added, which leaves rounding errors."""

    layer = Subtracts


@caught_by("test_merge_keeps_the_output", "test_two_adapters_merge")
class AddsWhatIsMerged(GatedPlugin):
    """A layer written by hand still adds what is merged."""

    layer = ForgetsThatItIsMerged


@caught_by("test_save_and_load", "test_training_changes_only_the_adapter")
class GateNotNamed(GatedPlugin):
    """A layer written by hand does not name one of its entries in `adapter_layer_names`."""

    layer = LeavesOutTheGate


@caught_by("test_two_adapters_are_independent", "test_load_beside_another")
class OnlyTheDefault(GatedPlugin):
    """A layer written by hand runs the adapter called "default" only."""

    layer = AssumesDefault


@caught_by("test_delete_restores_the_original")
class ReplacesTheBase(GatedPlugin):
    """It puts a copy of the layer below its own, so that deleting gives back another object."""

    @hookimpl
    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent):
        if not isinstance(target, GatedLayer):
            target = type(target)(target.in_features, target.out_features, bias=target.bias is not None)
            target.load_state_dict(getattr(parent, target_name).state_dict())
            target.eval()
        return super()._create_and_replace(peft_config, adapter_name, target, target_name, parent)


class HoldsADict(GatedLayer):
    def __init__(self, base_layer):
        super().__init__(base_layer)
        del self.toy_gate
        self.toy_gate = {}


@caught_by("test_state_dict")
class GateInADict(GatedPlugin):
    """A layer written by hand holds its gates in a plain dict."""

    layer = HoldsADict
