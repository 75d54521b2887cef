"""Wrong checkpoints and configs: keys that are lost, forms that do not come back, settings that change."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from testing.wrong.table import caught_by
from toys import sound
from toys.shared import Projections
from toys.sound import SoundAdapter

# Entries


@caught_by("test_checkpoint_holds_the_declared_entries")
class EntryTooMany(SoundAdapter):
    """It declares an entry that holds nothing."""

    entries = (*SoundAdapter.entries, "toy_nothing")


@caught_by("test_checkpoint_holds_the_declared_entries")
class EntryNotDeclared(SoundAdapter):
    """It does not declare the entry of its bias."""

    entries = ("toy_down", "toy_up")


@caught_by("test_checkpoint_holds_the_declared_entries")
class EntryMisspelt(SoundAdapter):
    """It declares `toy_biases` and holds `toy_bias`."""

    entries = ("toy_down", "toy_up", "toy_biases")


@caught_by("test_checkpoint_holds_the_declared_entries")
class PartEntryNotDeclared(Projections):
    """The part does not declare one of its entries."""

    entries = ("toy_down",)


# The form in a checkpoint


@caught_by("test_save_and_load", "test_load_beside_another")
class KeyLost(SoundAdapter):
    """`to_checkpoint` leaves out the bias."""

    def to_checkpoint(self, tensors):
        return {key: tensor for key, tensor in tensors.items() if key != "toy_bias"}


@caught_by("test_save_and_load", "test_tensors_as_a_dict")
class NotTheReverse(SoundAdapter):
    """`to_checkpoint` scales the bias and `from_checkpoint` does not undo it."""

    def to_checkpoint(self, tensors):
        return {**tensors, "toy_bias": self.scale * tensors["toy_bias"]}


@caught_by("test_save_and_load")
class SavedInHalf(SoundAdapter):
    """`to_checkpoint` rounds the tensors to half precision."""

    def to_checkpoint(self, tensors):
        return {key: tensor.to(torch.bfloat16).to(tensor.dtype) for key, tensor in tensors.items()}


@caught_by("test_save_and_load", "test_load_on_meta", error=RuntimeError)
class ReadsNumbersAtBirth(SoundAdapter):
    """It reads a number of its tensors when it is made, which has none while a checkpoint is loaded."""

    def __init__(self, site, config):
        super().__init__(site, config)
        self.size = self.toy_down.weight.norm().item()


# Settings


@dataclass
@caught_by("test_config_round_trip")
class ChangesOnTheWay(sound.Config):
    """`__post_init__` doubles a setting each time, so also when the config is read."""

    def __post_init__(self):
        super().__post_init__()
        self.scale *= 2


@dataclass
@caught_by("test_config_round_trip")
class NotPlain(sound.Config):
    """A setting is a tuple, which JSON gives back as a list."""

    ranks: tuple = (1, 2)


@dataclass
@caught_by("test_config_is_not_changed")
class CopiedByName(sound.Config):
    """Its `copy` gives the caller's own config."""

    def copy(self):
        return self


@caught_by("test_save_and_load")
class ChangesItsConfig(SoundAdapter):
    """It changes a setting of its config, so that the layers after it and the file have another."""

    def __init__(self, site, config):
        super().__init__(site, config)
        config.scale /= 2
