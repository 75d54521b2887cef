"""Wrong hooks, and what a plugin leaves behind on the model."""

from __future__ import annotations

from testing.wrong.table import caught_by
from toys import sound
from toys.sound import SoundAdapter

from tunerkit import hookimpl
from tunerkit.defaults import find_site


class SoundPlugin:
    """A plugin that makes the adapters itself."""

    method, Config = sound.method, sound.Config

    @hookimpl
    def _create_and_replace(self, peft_config, adapter_name, target, current_key, parameter_name):
        return SoundAdapter(find_site(self.method, peft_config, target, current_key, parameter_name), peft_config)


@caught_by("test_identity_at_start")
class HookMisspelt(SoundPlugin):
    """A hook's name is misspelt, so that it would never be called."""

    @hookimpl
    def _check_target_modules_exists(self, peft_config, key):
        return key in peft_config.target_modules


@caught_by("test_identity_at_start")
class HookNotMarked(SoundPlugin):
    """A hook is not marked with `hookimpl`."""

    def _check_target_module_exists(self, peft_config, key):
        return key in peft_config.target_modules


@caught_by("test_identity_at_start")
class HookWithAnotherArgument(SoundPlugin):
    """A hook asks for an argument that there is not."""

    @hookimpl
    def _check_target_module_exists(self, config, key):
        return key in config.target_modules


@caught_by("test_identity_at_start")
class HookGivesNothing(SoundPlugin):
    """`_create_and_replace` makes the adapter and does not return it."""

    @hookimpl
    def _create_and_replace(self, peft_config, adapter_name, target, current_key, parameter_name):
        super()._create_and_replace(peft_config, adapter_name, target, current_key, parameter_name)


@caught_by("test_identity_at_start")
class MatchesNothing(SoundPlugin):
    """`_check_target_module_exists` compares with the whole list and matches no module."""

    @hookimpl
    def _check_target_module_exists(self, peft_config, key):
        return key == peft_config.target_modules


@caught_by("test_two_adapters_are_independent", "test_use_adapter_is_of_this_thread")
class NameAssumed(SoundPlugin):
    """It makes one adapter for a layer, whatever its name, and gives it again for the second."""

    def __init__(self):
        self.made = {}

    @hookimpl
    def _create_and_replace(self, peft_config, adapter_name, target, current_key, parameter_name):
        made = super()._create_and_replace(peft_config, adapter_name, target, current_key, parameter_name)
        return self.made.setdefault(getattr(target, "base_layer", target), made)


@caught_by("test_config_is_not_changed")
class KeepsTheFirstConfig(SoundPlugin):
    """`_prepare_adapter_config` gives the first config that it was ever given."""

    first = None

    @hookimpl
    def _prepare_adapter_config(self, peft_config):
        self.first = self.first or peft_config
        return self.first


# What is left behind


@caught_by(
    "test_delete_restores_the_original",
    "test_unload_restores_the_original",
    "test_modules_to_save",
)
class LeavesAnAttribute(SoundAdapter):
    """It leaves an attribute on the layer."""

    def __init__(self, site, config):
        super().__init__(site, config)
        site.module.adapted_by = type(self).__name__


@caught_by("test_delete_restores_the_original", "test_unload_restores_the_original")
class LeavesAHook(SoundAdapter):
    """It leaves a forward hook on the layer."""

    def __init__(self, site, config):
        super().__init__(site, config)
        site.module.register_forward_hook(LeavesAHook.note)

    @staticmethod
    def note(module, args, output):
        return None


@caught_by("test_failing_half_way_changes_nothing", "test_disabled_is_the_base")
class WritesBeforeItFails(SoundPlugin):
    """The hook rounds the layer's weight in place, which stays so if a later layer fails."""

    @hookimpl
    def _create_and_replace(self, peft_config, adapter_name, target, current_key, parameter_name):
        weight = getattr(target, "base_layer", target).weight
        weight.data.copy_(weight.data.bfloat16())
        return super()._create_and_replace(peft_config, adapter_name, target, current_key, parameter_name)
