"""Adds a vector to every column of the weight, less the vector it started from (as PiSSA)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from toys.config import ToyConfig
from tunerkit import Method
from tunerkit.adapter import AdditiveAdapter


@dataclass
class Config(ToyConfig):
    peft_type: str | None = "TOY_STARTED"
    start: float = 1.0
    always: bool = False

    @property
    def saved_standalone(self):
        return self.always

    def standalone(self):
        changed = self.copy()
        changed.start, changed.always = 0.0, False
        return changed


class StartedAdapter(AdditiveAdapter):
    entries = ("toy_shift",)

    def __init__(self, site, config):
        super().__init__(site, config)
        self.start = config.start
        self.toy_shift = nn.Parameter(site.ones(site.out_features) * config.start)

    def delta(self, base):
        return (self.toy_shift - self.start)[:, None].expand_as(base.weight)

    def standalone(self, tensors, initial):
        begun = self.start if initial is None else initial["toy_shift"]
        return {"toy_shift": tensors["toy_shift"] - begun}


method = Method(config=Config, adapter=StartedAdapter)
