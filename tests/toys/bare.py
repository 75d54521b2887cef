"""Adds the bare layer's weight times a low-rank matrix, whatever stands between (as HiRA)."""

from __future__ import annotations

from dataclasses import dataclass

from toys.config import ToyConfig
from tunerkit import Method
from tunerkit.adapter import AdditiveAdapter, linear


@dataclass
class Config(ToyConfig):
    peft_type: str | None = "TOY_BARE"


class BareAdapter(AdditiveAdapter):
    entries = ("toy_down", "toy_up")

    def __init__(self, site, config):
        super().__init__(site, config)
        self.toy_down = linear(site.normal(config.rank, site.in_features))
        self.toy_up = linear(site.zeros(site.out_features, config.rank))

    def delta(self, base):
        return base.weight * (self.toy_up.weight @ self.toy_down.weight)


method = Method(config=Config, adapter=BareAdapter)
